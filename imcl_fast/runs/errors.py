"""What ends a training run early, each with the exit code of the command line."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class TrainingError(Exception):
    """A run can't start or go on; the message is one line that says what to do.

    Attributes:
        told: whether another process, where it came up, says it.
    """

    exit_code = 1
    told = False


class UsageError(TrainingError):
    """The configuration, the data or the run folder don't allow the run."""

    exit_code = 2


class CheckpointError(TrainingError):
    """A checkpoint can't be read, or isn't one."""

    exit_code = 2


class NonFiniteError(TrainingError):
    """The loss or the weights are no longer numbers."""


class DiskFullError(TrainingError):
    """There is no room left for a checkpoint or a record of the run."""


class Interrupted(TrainingError):
    """A signal asked the run to stop, which it did after a whole step."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number  # as shells report it


@contextlib.contextmanager
def as_usage_error(*kinds: type[Exception]) -> Iterator[None]:
    """Have errors of these kinds be ``UsageError`` of the same words."""
    try:
        yield
    except kinds as error:
        raise UsageError(str(error)) from error


def one_line(error: Exception) -> str:
    """What an error says, without the ends of its lines."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """With a mark in place of what is no text, as in paths whose bytes aren't UTF-8."""
    return text.encode("utf-8", "replace").decode()
