"""What a figure is of: the name of the processor."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def processor() -> str:
    """The CPU's model with its family and number, for the model is at times a brand only."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(.+?)\s*: (.*)$", info, re.MULTILINE))
    name = found.get("model name", platform.machine())
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name
