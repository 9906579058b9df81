"""Tables as text: names to the left, numbers to the right."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tabulate import tabulate


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """``lines`` under ``head``; the first ``left`` columns are names."""
    align = ["left" if i < left else "right" for i in range(len(head))]
    # The head as a line like others: as a head it would widen every column.
    first, *rest = tabulate(
        [head, *lines], tablefmt="plain", colalign=align, disable_numparse=True
    ).split("\n")
    return "\n".join([first, "-" * max(map(len, [first, *rest])), *rest])


def number(value: object, form: str = ".4f", scale: float = 1.0) -> str:
    """``value`` times ``scale`` in a format; ``-`` for what isn't a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return format(scale * value, form)


def show(text: str) -> None:
    """Print ``text``. A reader that has left, as ``head`` does, is no error: it has what it
    wanted, and what else there is to do is done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Or Python, which flushes once more when it ends, would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
