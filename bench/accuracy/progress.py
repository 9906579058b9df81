"""What a person sees of a study under way: a line for each run, a bar beneath on a terminal."""

from __future__ import annotations

import datetime
import sys
import time

from tqdm import tqdm

from .results import Result


class Progress:
    """Counts ``runs`` runs, of which ``done`` were done before."""

    def __init__(self, runs: int, done: int) -> None:
        self._runs, self._done, self._new = runs, done, 0
        self._start = time.monotonic()
        self._bar = tqdm(
            total=runs,
            initial=done,
            unit="run",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def finished(self, result: Result) -> None:
        """A run gave ``result``."""
        self._new += 1
        fitted = ""
        if result.fit_noisy is not None:
            fitted = f", wrong labels fitted {result.fit_noisy:.1%}"
        self.said(
            f"{self._done + self._new}/{self._runs} {result.name}: {result.held_out} accuracy "
            f"{result.accuracy:.2%} (best {result.best_accuracy:.2%} in epoch "
            f"{result.best_epoch}){fitted}, {result.seconds:.0f} s{self._left()}"
        )
        self._bar.update()

    def failed(self, text: str) -> None:
        """A run gave none, for the reasons in ``text``."""
        self._runs -= 1
        self.said(text)

    def said(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()

    def _left(self) -> str:
        left = self._runs - self._done - self._new
        if left == 0:
            return ""
        seconds = (time.monotonic() - self._start) / self._new * left
        return f"; about {datetime.timedelta(seconds=round(seconds))} left"
