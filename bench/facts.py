"""What a figure belongs to: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import imcl_fast
from imcl_fast import operators
from imcl_fast.machine import processor

from .timing import cache_bytes

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("triton", "numpy", "torchvision", "torchdistill", "liger-kernel")


def why_no_bfloat16(device: torch.device) -> str | None:
    """Why what is of bfloat16 is not measured on this machine, or None."""
    levels = operators.build_info.isa_levels() if operators.build_info is not None else []
    if device.type != "cpu" or "avx512bf16" in levels:
        return None
    return "this CPU has no bfloat16 units: PyTorch takes ten times as long as in float32"


def machine(device: torch.device) -> str:
    """Name of the machine in file names: the processor and, of a CPU, the threads used."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return f"{_slug(processor())}-{torch.get_num_threads()}-threads"


def facts(device: torch.device) -> dict[str, str]:
    """What is written beside every figure."""
    found = {
        "cpu": processor(),
        "threads": str(torch.get_num_threads()),
        "last-level cache": f"{cache_bytes(torch.device('cpu')) / 2**20:.0f} MiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["driver"] = _driver()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["imcl_fast"] = imcl_fast.__version__
    if operators.build_info is not None:
        found["compiler"] = operators.build_info.compiler()
        found["ISA"] = operators.build_info.isa_chosen()
    found["commit"] = commit()
    found["date"] = datetime.date.today().isoformat()
    return found


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    return subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


def commit() -> str:
    """The commit of the checkout, with -dirty where files differ from it; without git that of the
    environment variable IMCL_FAST_COMMIT."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        said = done.stdout.strip()
    except OSError:
        said = ""
    return said or os.environ.get("IMCL_FAST_COMMIT", "unknown")


def _slug(name: str) -> str:
    plain = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
