"""Until way 3 and way 4 got a schedule by default, a run was told an interval of 1 where its study
wrote one, and not where it was left to the objective. Every interval of 1 is written since, and
none is told."""

from __future__ import annotations

from ..study import NEUTRAL, PlannedRun, hashed

NAMES = ("representation_interval", "kernel_interval")


def before(run: PlannedRun) -> set[str]:
    """The fingerprint that a run's rows had where its study wrote both; none where it writes
    another interval, or none."""
    if any(getattr(run.config, name) != NEUTRAL[name] for name in NAMES):
        return set()
    return {hashed({**run.told, **{name: NEUTRAL[name] for name in NAMES}})}
