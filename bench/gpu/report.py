"""The results as text, whatever there is of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def report(results: dict[str, Any]) -> str:
    return "\n".join([*_head(results), *_operations(results), *_step(results)]) + "\n"


def _head(results: dict[str, Any]) -> Iterator[str]:
    for name in ("facts", "rates"):
        one = results.get(name, {})
        numbers = one.get("found", {}).items()
        yield ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers)
        yield from _missing(name, one)


def _missing(name: str, one: dict[str, Any]) -> Iterator[str]:
    for kind in ("failed", "not_timed", "left_out"):
        if kind in one:
            yield f"{name:16s} {kind.replace('_', ' ')}: {one[kind]}"


def _operations(results: dict[str, Any]) -> Iterator[str]:
    bandwidth = results.get("rates", {}).get("found", {}).get("copy_bytes_per_s")
    for name, row in results.get("operations", {}).items():
        floor = 1e3 * row["bytes"] / bandwidth if bandwidth else None
        at_least = f"floor {floor:.3f} ms, " if floor else ""
        yield f"\n{name}: forward and backward, {at_least}{row['bytes']} bytes"
        yield f"{'':16s}{'device ms':>12s}{'of copy':>9s}{'called ms':>12s}{'peak MB':>10s}"
        for impl, said in row["impls"].items():
            yield from _missing(impl, said)
            if "found" in said:
                yield _timed(impl, said["found"], floor)


def _timed(impl: str, one: dict[str, Any], floor: float | None) -> str:
    device = one.get("device_ms")
    share = f"{floor / device:.0%}" if device and floor else ""
    line = (
        f"{impl:16s}{f'{device:.3f}' if device else '':>12s}{share:>9s}"
        f"{one['called_ms']:>12.3f}{one['peak_bytes'] / 1e6:>10.1f}"
    )
    return f"{line}  no graph: {one['no_graph']}" if "no_graph" in one else line


def _step(results: dict[str, Any]) -> Iterator[str]:
    steps = results.get("step", {})
    if steps:
        yield "\nResNet-18 step, bf16 autocast, channels_last, batch 128"
    plain = steps.get("plain", {}).get("found")
    for name, said in steps.items():
        yield from _missing(name, said)
        one = said.get("found")
        if one:
            more = [f"{one[k] / plain[k] - 1:+.1%}" if plain else "" for k in ("ms", "peak_bytes")]
            yield (
                f"{name:16s}{one['ms']:>10.2f} ms {more[0]:>8s}"
                f"{one['peak_bytes'] / 1e6:>10.0f} MB {more[1]:>8s}"
            )
