"""What the results of a study say: values by seed, and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from imcl_fast.reports.paired import Interval, interval

from .results import Result
from .study import Study


class Analysis:
    """The results of a study, by what they are of.

    Attributes:
        study: which.
        results: in its order.
    """

    def __init__(self, study: Study, results: Iterable[Result]) -> None:
        self.study = study
        self.results = list(results)
        self._by: dict[tuple[str, str, str], dict[int, Result]] = {}
        for result in self.results:
            key = (result.condition, result.network, result.method)
            self._by.setdefault(key, {})[result.seed] = result

    def runs(self, condition: str, network: str, method: str) -> Mapping[int, Result]:
        """By seed."""
        return self._by.get((condition, network, method), {})

    def cells(self) -> list[tuple[str, str]]:
        """The conditions and networks that have results."""
        return [
            (condition, network)
            for condition in self.study.conditions
            for network in self.study.networks
            if any(self.runs(condition, network, method) for method in self.study.methods)
        ]

    def title(self, condition: str, network: str) -> str:
        """What tables and plots call them."""
        return f"{self.study.conditions[condition].title}, {self.study.networks[network].title}"

    def points(
        self, condition: str, networks: Sequence[str], method: str, other: str,
        value: str = "accuracy",
    ) -> list[float]:  # fmt: skip
        """``method`` minus ``other`` in a field of ``Result``, a number per seed that both have
        on all ``networks``: its mean over them.

        Networks of a seed share their wrong labels and the order of their images, hence are no
        runs of their own to an interval.
        """
        by_network = []
        for network in networks:
            first = self.runs(condition, network, method)
            second = self.runs(condition, network, other)
            by_network.append({
                seed: getattr(first[seed], value) - getattr(second[seed], value)
                for seed in first if seed in second
            })  # fmt: skip
        common = set.intersection(*map(set, by_network)) if by_network else set()
        return [statistics.fmean(each[seed] for each in by_network) for seed in sorted(common)]

    def difference(
        self, condition: str, networks: Sequence[str], method: str, other: str,
        value: str = "accuracy",
    ) -> Interval | None:  # fmt: skip
        """The mean of ``points`` with its 95 % interval; None without a seed in common."""
        points = self.points(condition, networks, method, other, value)
        return interval(points) if points else None

    def slowdown(self, condition: str, network: str, method: str) -> float | None:
        """The median over seeds of the time per step, over that of the baseline on the same
        machine."""
        own = self.runs(condition, network, method)
        base = self.runs(condition, network, self.study.baseline)
        ratios = [
            own[seed].seconds_per_step / base[seed].seconds_per_step
            for seed in own
            if seed in base
            and (own[seed].machine, own[seed].threads, own[seed].jobs)
            == (base[seed].machine, base[seed].threads, base[seed].jobs)
        ]
        return statistics.median(ratios) if ratios else None
