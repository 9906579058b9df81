"""Signals that ask a run to stop, heard at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Takes note of SIGINT and SIGTERM as long as its context lasts.

    A second one of the same kind has its usual effect at once. Outside the main thread,
    where Python allows no handlers, none is noted.

    Attributes:
        signal: number of the first signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._before.pop(number))
