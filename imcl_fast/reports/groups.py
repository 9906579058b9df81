"""Runs that differ by their seed alone, and what they are compared to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.config import OBJECTIVE, PROVENANCE, SETTINGS
from ..runs.folder import Run
from .paired import Interval, interval

Key = tuple[tuple[str, str], ...]
PLAIN = "ce"
# Said by the run's label.
NAMED = ("method", "ways")


class NotComparable(ValueError):
    """The runs, or the baseline, can't be compared; the message is one line."""


@dataclass
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        method: the label of its runs.
        treatment: the method and its settings.
        context: all other settings that change results, the seed apart.
        runs: by seed.
        name: the method, and those settings in which the groups differ.
        baseline: the group with the baseline's treatment in the same context.
    """

    method: str
    treatment: Key
    context: Key
    runs: dict[Any, Run] = field(default_factory=dict)
    name: str = ""
    baseline: Group | None = None

    def accuracies(self, best: bool = False) -> list[float]:
        """Of every run, shares."""
        values = [run.best_accuracy if best else run.accuracy for run in self.runs.values()]
        return [value for value in values if value is not None]

    @property
    def fitted(self) -> float | None:
        """The share of wrong labels that was fitted, a mean over the runs that have some."""
        values = [run.last("fit_noisy") for run in self.runs.values()]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def median_of(self, key: str) -> float | None:
        """The median over the runs of a number of their summaries."""
        values = [run.summary[key] for run in self.runs.values() if _is_number(run.summary, key)]
        return statistics.median(values) if values else None

    def difference(self) -> Interval | None:
        """Accuracy minus the baseline's, seed by seed; None without a seed in common."""
        if self.baseline is None or self.baseline is self:
            return None
        pairs = [
            (run.accuracy, self.baseline.runs[seed].accuracy)
            for seed, run in self.runs.items()
            if seed in self.baseline.runs
        ]
        points = [a - b for a, b in pairs if a is not None and b is not None]
        return interval(points) if points else None

    def slowdown(self) -> float | None:
        """Time per step over the baseline's."""
        if self.baseline is None or self.baseline is self:
            return None
        own, other = self.median_of("seconds_per_step"), self.baseline.median_of("seconds_per_step")
        return own / other if own is not None and other else None


def group(runs: Sequence[Run], baseline: str | None = None) -> list[Group]:
    """The groups, those of one context together and the baseline first.

    Args:
        baseline: a group's name, a method's label, or the folder of one of the runs. None
            is plain cross entropy where there is one.

    Raises:
        NotComparable: two runs have all settings and the seed in common, or ``baseline``
            is none of the runs, or more than one.
    """
    groups: dict[tuple[Key, Key], Group] = {}
    for run in runs:
        treatment, context = _settings(run)
        found = groups.setdefault((context, treatment), Group(run.label, treatment, context))
        seed = run.setting("seed")
        if seed in found.runs:
            raise NotComparable(
                f"{found.runs[seed].folder} and {run.folder}: the same settings and the same "
                f"seed ({seed}); leave one of them out"
            )
        found.runs[seed] = run
    listed = list(groups.values())
    _name(listed)
    wanted = _baseline(listed, baseline)
    for each in listed:
        each.baseline = None if wanted is None else groups.get((each.context, wanted))
    contexts = list(dict.fromkeys(each.context for each in listed))
    return sorted(
        listed, key=lambda each: (contexts.index(each.context), each is not each.baseline)
    )


def _settings(run: Run) -> tuple[Key, Key]:
    """The run's treatment and its context."""
    treatment, context = [("label", run.label)], list[tuple[str, str]]()
    # Whatever the configuration leaves open: accuracies of other qualities can't be compared, nor
    # those of other folders, or of two networks of one class.
    which = {f"{name} fingerprint": value for name, value in run.fingerprints.items()}
    actual = {**run.config, **run.own, **which, "qualities": run.measured_at}
    for name, value in sorted(actual.items()):
        known = SETTINGS.get(name)
        if name in PROVENANCE or name in ("seed", *NAMED) or (known and not known.fixed):
            continue
        part = treatment if known is not None and known.group == OBJECTIVE else context
        part.append((name, json.dumps(value, sort_keys=True)))
    return tuple(treatment), tuple(context)


def _name(groups: Sequence[Group]) -> None:
    settings = [dict(each.treatment + each.context) for each in groups]
    names = sorted({name for each in settings for name in each} - {"label"})
    varying = [name for name in names if len({each.get(name) for each in settings}) > 1]
    for each, own in zip(groups, settings, strict=True):
        (run, *_) = each.runs.values()
        parts = [f"{name}={_actual(run, name, own.get(name))}" for name in varying]
        each.name = " ".join([each.method, *parts])


def _actual(run: Run, name: str, value: str | None) -> str:
    """A setting's JSON as a user would write it; what is left open, as it turned out in the run."""
    if value is None:
        return "-"
    content = json.loads(value)
    if name == "weights":
        content = run.used.get("weights", content)
    if content is None:
        content = run.used.get("settings", {}).get(name)
    if isinstance(content, Mapping):
        return ",".join(f"{key}={entry:g}" for key, entry in content.items()) or "default"
    if content is None:  # the run is of a version that didn't write down which
        return "default"
    return content if isinstance(content, str) else json.dumps(content)


def _baseline(groups: Sequence[Group], wanted: str | None) -> Key | None:
    name = PLAIN if wanted is None else wanted
    found = {each.treatment for each in groups if name in (each.name, each.method)}
    if not found and wanted is not None:
        folder = Path(wanted).resolve()
        for each in groups:
            if any(run.folder.resolve() == folder for run in each.runs.values()):
                found.add(each.treatment)
    if len(found) == 1:
        return found.pop()
    if wanted is None:
        return None
    names = ", ".join(repr(each.name) for each in groups)
    if found:
        raise NotComparable(f"baseline: {wanted!r} is more than one of {names}; name one")
    raise NotComparable(f"baseline: expected one of {names}, or a run's folder, got {wanted!r}")


def _is_number(summary: Mapping[str, Any], key: str) -> bool:
    value = summary.get(key)
    return isinstance(value, int | float) and not isinstance(value, bool)
