"""The benchmarks report what they should, and time nobody who is wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import (
    allocator,
    competitors,
    contention,
    facts,
    host,
    instructions,
    memory,
    operations,
    render,
    roofline,
    scaling,
    shapes,
    step,
    targets,
    timing,
)
from bench.rows import Row, consistency, rows
from bench.timing import Sample, interleaved, quartiles, sets_needed
from imcl_fast import operators
from imcl_fast.imcl import IMCL
from imcl_fast.schedule import Schedule

CPU = torch.device("cpu")
TINY = Row("representation", "tiny", ((2, 8, 4, 4), (2, 6, 3, 3)))
RATES = {"copy_bytes_per_s": 1e9, "float32_flops_per_s": 1e9, "bfloat16_flops_per_s": 4e9}


@pytest.mark.parametrize("quick", [True, False])
def test_no_two_results_have_the_same_name(quick: bool) -> None:
    for names in ([row.name for row in rows(quick)], [one.name for one in step.steps(quick)]):
        assert len(set(names)) == len(names)


# ---- the gate --------------------------------------------------------------------------


def twice(row: Row) -> competitors.Competitor:
    loss = row.loss("reference", CPU)
    return competitors.Competitor("twice", lambda xs: 2 * loss(xs))


def wrong_gradient(row: Row) -> competitors.Competitor:
    loss = row.loss("reference", CPU)

    def right_value(xs: Sequence[Tensor]) -> Tensor:
        value = loss(xs)
        other = xs[0].square().sum()
        return value + other - other.detach()

    return competitors.Competitor("wrong gradient", right_value)


def not_finite(row: Row) -> competitors.Competitor:
    return competitors.Competitor("nan", lambda xs: sum(x.sum() * math.nan for x in xs), same=False)


def raising(row: Row) -> competitors.Competitor:
    def loss(xs: Sequence[Tensor]) -> Tensor:
        raise RuntimeError("no kernel for that")

    return competitors.Competitor("raising", loss)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (twice, "the loss is off by 1.0e+00, the gradient of input 0 is off by 1.0e+00, the "
                "gradient of input 1 is off by 1.0e+00 of its largest value"),
        (wrong_gradient, "the gradient of input 0 is off"),
        (not_finite, "not finite"),
        (raising, "RuntimeError: no kernel for that"),
    ],
)  # fmt: skip
def test_who_is_wrong_is_not_timed(make, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = competitors.Competitor("good", TINY.loss("reference", CPU))
    bad = make(TINY)
    monkeypatch.setattr(operations, "competitors", lambda *_: ([good, bad], {}))
    found = operations.measure(TINY, CPU, 0, fewest=1)
    assert set(found.samples) == set(found.peaks) == {"good"}
    assert reason in found.left_out[bad.name]


def test_an_error_that_stays_with_the_gpu_ends_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loss(xs: Sequence[Tensor]) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    faulting = competitors.Competitor("faulting", loss)
    monkeypatch.setattr(operations, "competitors", lambda *_: ([faulting], {}))
    with pytest.raises(torch.AcceleratorError):
        operations.measure(TINY, CPU, 0, fewest=1)


@pytest.mark.parametrize(("dtype", "timed"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_naive_form_is_timed_however_it_rounds(
    dtype: torch.dtype, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("representation", "tiny", ((2, 8, 4, 4),), dtype)
    rough = twice(row)._replace(name="reference")
    monkeypatch.setattr(operations, "why_no_bfloat16", lambda device: None)
    monkeypatch.setattr(operations, "competitors", lambda *_: ([rough], {}))
    found = operations.measure(row, CPU, 0, fewest=1)
    assert (set(found.samples) == {"reference"}) == timed


def test_what_no_graph_can_hold_is_timed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(*_) -> float:
        raise torch.AcceleratorError("CUDA error: operation failed due to a previous error")

    monkeypatch.setattr(operations, "GRAPHS", ("cpu",))
    monkeypatch.setattr(operations, "replayed", captured)
    found = operations.measure(TINY, CPU, 0, only=["torch"], fewest=1, most=1)
    assert set(found.samples) == {"torch"} and not found.graphs
    assert "previous error" in found.left_out["torch, as a graph"]


@pytest.mark.parametrize(
    "row",
    [
        TINY,
        Row("representation", "tiny", ((2, 8, 4, 4),), torch.bfloat16, True, True),
        Row("kernel", "tiny", ((8, 4, 3, 3), (5, 8, 1, 1)), precision="medium"),
        Row("kernel", "tiny", ((8, 4),), penalty="abs"),
        consistency(3, 4, 10),
        consistency(3, 4, 10, dtype=torch.bfloat16),
    ],
    ids=lambda row: row.name,
)
def test_a_row_is_measured(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "why_no_bfloat16", lambda device: None)
    before = torch.get_float32_matmul_precision()
    found = operations.measure(row, CPU, 0, fewest=2, most=2)
    assert torch.get_float32_matmul_precision() == before
    assert {"torch", "reference"} <= set(found.samples)
    summary = found.as_json()
    assert json.loads(json.dumps(summary)) == summary
    for one in summary["competitors"].values():
        assert one["rounds"] == 2
        assert 0 < one["both"]["q1"] <= one["both"]["median"] <= one["both"]["q3"]
        assert one["both"]["median"] >= max(one["forward"]["median"], one["backward"]["median"])
    assert all(reason for reason in found.left_out.values())
    names = set(found.samples) | set(found.left_out)
    assert {"cpp", "triton", "cuda", "torch.compile(torch)"} <= names
    published = {name for name, operation, _ in competitors.THIRD_PARTY
                 if operation == row.operation}  # fmt: skip
    assert published <= names


def test_bfloat16_is_left_out_where_a_cpu_has_no_units_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = ["baseline", "avx2"]
    monkeypatch.setattr(operators.build_info, "isa_levels", lambda: levels)
    row, one = (consistency(3, 4, 10, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    found = operations.measure(row, CPU, 0, fewest=1, most=1)
    assert not found.samples and "no bfloat16 units" in found.left_out["reference"]
    assert operations.measure(one, CPU, 0, fewest=1, most=1).samples
    half = step.measure(step.Step("resnet18", 2, width=8, size=8, bfloat16=True), CPU, 0)
    assert not half["methods"] and "no bfloat16 units" in half["left_out"][step.PLAIN]
    entry = {"operation": row.operation, "floors": {}, **found.as_json()}
    results = {"operations": {row.name: entry}, "steps": {"half": half}}
    assert render.losing(results) == "None in this run.\n"
    assert "no bfloat16 units" in render.left_out(results)
    levels.append("avx512bf16")
    assert operations.measure(row, CPU, 0, fewest=1, most=1).samples


# ---- how it is timed -------------------------------------------------------------------


def test_host_time_is_that_over_the_plain_step_at_each_place_of_the_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host, "PERIOD", 3)
        found = host.measure(CPU, 0, fewest=2)
    assert list(found) == list(host.METHODS)
    for name, one in found.items():
        for what in ("forward", "both"):
            assert one[what]["fullest"] >= one[what]["average"]
            assert (one[what]["ratio"] == 1) == (name == host.PLAIN)
    assert found[host.PLAIN]["both"]["average"] == found[host.PLAIN]["both"]["fullest"] == 0
    plain = [[Sample(1.0, 1.0)] * host.PERIOD] * 3
    ours = [[Sample(1.5, 1.0), *[Sample(1.0, 1.0)] * 14, Sample(1.0, 5.0)]] * 3
    assert host._over(ours, plain, "forward") == {
        "average": 0.5 / 16, "fullest": 0.5, "least": 0, "ratio": 16.5 / 16,
    }  # fmt: skip
    assert host._over(ours, plain, "both")["fullest"] == 4


def test_a_process_is_busy_as_long_as_the_steps_beside_it_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def start(*args, **options) -> subprocess.Popen:
        processes.append(popen(*args, **options))
        return processes[-1]

    running = []

    def timed(runs, *_, **__):
        running.append([process.poll() is None for process in processes])
        return {name: [[1.0, 1.5], [2.0, 4.0]][len(running) - 1] for name in runs}

    monkeypatch.setattr(contention.subprocess, "Popen", start)
    monkeypatch.setattr(contention, "interleaved", timed)
    monkeypatch.setattr(contention, "STEP", step.Step("resnet18", 2, width=8, size=8))
    found = contention.measure(CPU, 0)
    assert running == [[], [True]]
    assert [process.poll() is None for process in processes] == [False]
    assert found[step.FUSED]["ratio"] == 3.0 / 1.25
    assert found[step.FUSED]["over plain"] == {"quiet": 0, "busy": 0}


FAULTS = """
import torch
from bench.allocator import _faults, keep_freed_memory

def faults_of_another() -> int:
    # Freed at once, and larger than what comes next: whatever else lands in the gap.
    torch.ones(2**26)
    before = _faults()
    torch.ones(2**24)  # 64 MiB
    return _faults() - before

given_back = faults_of_another()
print(int(keep_freed_memory()), given_back, faults_of_another())
"""


def test_freed_memory_is_kept_and_faults_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept, given_back, faults = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc: freed memory is where it puts it")
    assert given_back > 8 > faults


def test_memory_is_given_back_before_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def timed(runs, *_, **__):
        order.append("timed")
        return {name: [run(0) for _ in range(2)] for name, run in runs.items()}

    monkeypatch.setattr(allocator, "interleaved", timed)
    monkeypatch.setattr(allocator, "STEP", step.Step("resnet18", 2, width=8, size=8))
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: bool(order.append("kept")) or True)
    found = allocator.measure(CPU, 0)
    assert order == ["timed", "kept", "timed"]
    assert set(found) == {step.PLAIN, step.FUSED}
    for one in found.values():
        assert set(one) == {allocator.GIVEN_BACK, allocator.KEPT}
        assert all(c["seconds"]["median"] > 0 <= c["faults"]["median"] for c in one.values())
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: False)
    assert allocator.measure(CPU, 0) == {}


def test_rounds_take_everybody_in_turn_and_begin_with_another() -> None:
    calls: list[tuple[str, int]] = []
    runs = {name: (lambda i, n=name: calls.append((n, i)) or i) for name in "abc"}
    found = interleaved(runs, 0, fewest=4, most=4, warm_up=1)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 5
    assert [sorted(name for name, _ in one) for one in rounds] == 5 * [["a", "b", "c"]]
    assert [one[0][0] for one in rounds] == ["a", "b", "c", "a", "b"]
    assert all(len({index for _, index in one}) == 1 for one in rounds)
    assert found == dict.fromkeys("abc", [1, 2, 3, 4])  # the warm-up isn't among them


def test_who_fails_takes_part_no_longer() -> None:
    def run(name: str, index: int) -> int:
        if (name, index) in (("b", 0), ("c", 3)):
            raise ValueError(f"{name} at {index}")
        return index

    runs = {name: partial(run, name) for name in "abc"}
    told: list[tuple[str, Exception]] = []
    found = interleaved(runs, 0, fewest=4, most=4, warm_up=1, drop=lambda *who: told.append(who))
    assert found == {"a": [1, 2, 3, 4]}
    assert [(name, str(error)) for name, error in told] == [("b", "b at 0"), ("c", "c at 3")]
    with pytest.raises(ValueError, match="b at 0"):
        interleaved(runs, 0)


def test_a_long_round_is_warm_up_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"a": lambda i: i}
    assert interleaved(runs, 0, fewest=1, most=1, warm_up=3) == {"a": [3]}
    monkeypatch.setattr(timing, "LONG", 0.0)
    assert interleaved(runs, 0, fewest=1, most=1, warm_up=3) == {"a": [1]}


def test_competitors_of_a_round_have_inputs_of_their_own() -> None:
    sets = [[torch.tensor(float(i), requires_grad=True)] for i in range(7)]
    seen: dict[str, list[float]] = {"a": [], "b": [], "c": []}

    def loss_of(name: str):
        def loss(xs: Sequence[Tensor]) -> Tensor:
            seen[name].append(float(xs[0].detach()))
            return xs[0] * 2

        return loss

    losses = {name: loss_of(name) for name in seen}
    operations.interleaved_losses(losses, sets, 0, CPU, fewest=12, most=12)
    assert all(len(set(one)) == 3 for one in zip(*seen.values(), strict=True))
    assert all(len(set(values)) == len(sets) for values in seen.values())


def test_inputs_rotate_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing.cache_bytes", lambda device: 2**20)
    assert sets_needed(2**18, 3, CPU) == 8
    assert sets_needed(2**24, 5, CPU) == 5  # as many as compete
    assert sets_needed(1, 3, CPU) == 256  # no more than that
    assert sets_needed(2**40, 3, CPU) == 3


def test_quartiles() -> None:
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}
    assert quartiles([2.5]) == {"q1": 2.5, "median": 2.5, "q3": 2.5}


def test_peak_memory_counts_what_a_call_takes_and_gives_back() -> None:
    size = 64 * 2**20

    def run() -> None:
        torch.ones(size, dtype=torch.uint8)

    peak = memory.peak_bytes(run, CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak memory")
    assert size * 0.98 < peak < size * 1.1
    small = memory.peak_bytes(lambda: None, CPU)
    assert small is not None and small < 2**20


def test_the_peak_of_tensors_is_to_the_byte_in_all_threads() -> None:
    kilobyte = torch.ones(256, requires_grad=True)

    def run() -> None:
        kilobyte.grad = None
        square = kilobyte * kilobyte  # kept for the backward pass, which runs in another thread
        del square
        (kilobyte.exp() * 2).sum().backward()

    run()
    # exp, its product, and of both the gradients, one of which is the leaf's: three at a time.
    found = [memory.peak_of_tensors(run, CPU) for _ in range(3)]
    assert found == [found[0]] * 3 and 3 * 1024 <= found[0] <= 3 * 1024 + 64
    assert memory.peak_of_tensors(lambda: torch.ones(5), CPU) == 20
    assert memory.peak_of_tensors(lambda: None, CPU) == 0


def test_the_peak_of_tensors_is_of_those_that_the_call_makes() -> None:
    """Not less what it frees, where a profiler before saw another tensor at the same address."""
    numel = 2**24  # so many that malloc maps them by themselves, and the next ones where they lay
    activities = [torch.profiler.ProfilerActivity.CPU]
    others, address = [torch.empty(numel)], 0
    while len(others) < 100 and others[-1].data_ptr() != address:
        # What one freed in malloc's heap may have gone to others or back: then once more.
        with torch.profiler.profile(activities=activities, profile_memory=True):
            seen = torch.empty(numel)
        address = seen.data_ptr()
        del seen
        others.append(torch.empty(numel))
    assert others[-1].data_ptr() == address, "no tensor came to lie there again"
    made, runs = [], itertools.count()

    def run() -> None:
        if next(runs):  # the second time
            others.pop()
        made.append(torch.empty(numel))

    assert memory.peak_of_tensors(run, CPU) == 4 * numel


def stored_run() -> dict:
    return {
        "facts": facts.facts(CPU) | {"commit": "before", "date": "then"},
        "rates": {"copy_bytes_per_s": 1e10, "float32_flops_per_s": 1e11,
                  "bfloat16_flops_per_s": 1e11},
        "operations": {"kernel R18 float32": {"old": 1}, "kernel R50 float32": {"old": 2}},
    }  # fmt: skip


def test_a_row_measured_again_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = operations.Measured({}, {}, {}, {"torch": "a reason"}, ())
    monkeypatch.setattr(operations, "measure", lambda *_: measured)
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(facts, "commit", lambda: "after")
    monkeypatch.setattr(step, "measure", lambda one, *_: {"step": one.name})
    title = "resnet18, width 64, 32x32, batch 128, float32"
    results = {**stored_run(), "steps": {title: {"old": 3}, "another": {"old": 4}}}
    command.again(results, ["kernel R18 float32", title], CPU)
    row = results["operations"]["kernel R18 float32"]
    assert "old" not in row and row["left_out"] == {"torch": "a reason"} and row["floors"]
    assert row["again"] == {"commit": "after", "date": facts.facts(CPU)["date"]}
    assert results["operations"]["kernel R50 float32"] == {"old": 2}
    assert results["steps"] == {title: {"step": title, "again": row["again"]},
                                "another": {"old": 4}}  # fmt: skip
    line = render.machine(results)
    assert "commit before, then." in line
    assert line.endswith(f"commit after, {row['again']['date']}: kernel R18 float32; {title}.\n")


def test_rows_of_another_machine_are_not_mixed() -> None:
    results = stored_run()
    results["facts"]["cpu"] = "another CPU"
    with pytest.raises(ValueError, match="of another machine: cpu was another CPU, and is"):
        command.again(results, ["kernel R18 float32"], CPU)
    with pytest.raises(ValueError, match="'kernel R19': no such row; there are .*kernel R18"):
        command.again(stored_run(), ["kernel R19"], CPU)
    assert results["operations"]["kernel R18 float32"] == {"old": 1}


# ---- what is counted -------------------------------------------------------------------


def test_networks_have_the_weights_that_they_are_known_for() -> None:
    def parameters(weights: shapes.Shapes) -> int:
        return sum(math.prod(shape) for shape in weights)

    # The convolutions' own, from the published totals less norms, biases and classifiers.
    assert (len(shapes.resnet18_weights()), parameters(shapes.resnet18_weights())) == (
        20, 11_159_232,
    )  # fmt: skip
    vgg16, resnet50 = shapes.weights("vgg16"), shapes.weights("resnet50")
    assert (len(vgg16), parameters(vgg16)) == (13, 14_710_464)
    assert (len(resnet50), parameters(resnet50)) == (53, 23_454_912)
    assert len(shapes.weights("convnext_tiny")) == 22


def test_bytes_and_flops() -> None:
    # (2, 3, 4): X is read, read again, its gradient written; the Gram has 6 entries to make.
    primal = roofline.work(Row("representation", "", ((2, 3, 2, 2),)))
    assert primal == (96, 192, 2 * 6 * 2 * 4, 2 * 9 * 2 * 4)
    # Six kernels of two weights: the 2 x 2 form.
    dual = roofline.work(Row("kernel", "", ((6, 2),), torch.bfloat16))
    assert dual == (24, 48, 3 * 2 * 6, 4 * 2 * 6)
    assert roofline.work(Row("kernel", "", ((6, 2),), penalty="abs")) == (48, 96, 84, 144)
    assert roofline.work(consistency(3, 4, 5)) == (240, 240, 0, 0)


def test_a_floor_is_the_larger_of_moving_and_computing() -> None:
    moving = roofline.floors(consistency(3, 4, 5), RATES)
    assert moving == pytest.approx({"forward": 240e-9, "backward": 240e-9, "both": 480e-9})
    wide = Row("kernel", "", ((64, 128),))
    computing = roofline.floors(wide, RATES)
    assert computing["both"] == pytest.approx((64 * 65 * 128 + 2 * 64 * 64 * 128) / 1e9)
    medium = roofline.floors(Row("kernel", "", ((64, 128),), precision="medium"), RATES)
    assert medium["both"] == pytest.approx(computing["both"] / 4)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_the_slope_of_a_power_law_is_its_exponent(exponent: float) -> None:
    assert scaling.slope([(x, 3.0 * x**exponent) for x in (1, 2, 4, 8)]) == pytest.approx(exponent)


def test_the_plot_repeats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = {
        axis.quantity: {"cpp": {"points": [(1, 1e-3), (2, 2e-3)], "slope": 1.0}}
        for axis in scaling.AXES
    }
    for name in ("a.svg", "b.svg"):
        scaling.plot(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_text().count('id="axes_') == len(scaling.AXES)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


# ---- tables ----------------------------------------------------------------------------


def times(forward: float, backward: float, *, same: bool = True) -> dict:
    return {
        "forward": quartiles([forward]),
        "backward": quartiles([backward]),
        "both": quartiles([forward + backward]),
        "rounds": 5, "peak_bytes": 3 * 2**20, "same": same,
    }  # fmt: skip


def method(seconds: float, overhead: float, extra: float) -> dict:
    return {
        "seconds": quartiles([seconds]), "rounds": 3, "images_per_second": 1 / seconds,
        "overhead": overhead, "overhead_quartiles": [overhead - 0.01, overhead + 0.02],
        "peak_bytes": 2**30, "extra_memory": extra,
    }  # fmt: skip


def host_times(seconds: float, average: float, fullest: float, ratio: float) -> dict:
    return {"seconds": quartiles([seconds]), "average": average, "fullest": fullest,
            "ratio": ratio}  # fmt: skip


RESULTS = {
    "facts": {"cpu": "A CPU", "threads": "2", "torch": "2.13", "python": "3.11", "commit": "abc",
              "date": "2000-01-01", "ISA": "avx2"},
    "rates": RATES,
    "operations": {
        "kernel R18 float32": {
            "operation": "kernel",
            "floors": {"forward": 0.01, "backward": 0.02, "both": 0.03},
            "competitors": {
                "reference": times(0.1, 0.2), "cpp": times(0.03, 0.03),
                "torch": times(0.02, 0.05), "foreign": times(0.001, 0.001, same=False),
            },
            "left_out": {"cuda": "no | GPU"},
        },
    },
    "steps": {
        "a step": {
            "base": "plain cross entropy", "kernels": 16,
            "methods": {
                "plain cross entropy": method(1.0, 0.0, 0.0),
                "four ways, fused": method(1.1, 0.08, 0.02),
            },
            "left_out": {},
        },
        "a middling step": {
            "base": "plain cross entropy", "kernels": 16,
            "methods": {
                "plain cross entropy": method(1.0, 0.0, 0.0),
                "four ways, fused": method(1.2, 0.19, 0.02),
            },
            "left_out": {},
        },
        "a dear step, compiled": {
            "base": "plain cross entropy, compiled", "kernels": 16,
            "methods": {
                "plain cross entropy, compiled": method(1.0, 0.0, 0.0),
                "four ways, naive, compiled": method(1.9, 0.876, 0.5),
                "four ways, fused, compiled": method(1.3, 0.28, 0.02),
            },
            "left_out": {},
        },
    },
    "host": {
        "plain cross entropy": {what: host_times(0.008, 0.0, 0.0, 1.0)
                                for what in ("forward", "both")},
        "four ways": {"forward": host_times(0.009, 0.0005, 0.001, 1.1),
                      "both": host_times(0.0105, 0.0012, 0.0025, 1.25)},
    },
    "contention": {
        name: {"quiet": quartiles([1.0]), "busy": quartiles([busy]), "ratio": busy,
               "over plain": {"quiet": 0.06, "busy": 0.09}}
        for name, busy in (("plain cross entropy", 5.0), ("four ways, fused", 6.0))
    },
    "allocator": {
        "plain cross entropy": {
            which: {"seconds": quartiles([seconds]), "faults": quartiles([faults])}
            for which, seconds, faults in (("given back", 2.0, 200000.0), ("kept", 1.5, 0.0))
        },
    },
    "scaling": {"batch": {"cpp": {"points": [(8, 1e-3), (16, 2e-3)], "slope": 1.0}}},
    "memory": {"auto": [(1024, 2**22)], "reference": []},
    "instructions": {"reason": "valgrind is not installed"},
}  # fmt: skip


def test_every_table_is_a_table_or_says_why_not() -> None:
    for name, renderer in render.TABLES.items():
        text = renderer(RESULTS)
        assert text.endswith("\n"), name
        lines = text.splitlines()
        if lines[0].startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, name


def test_tables_say_what_was_measured() -> None:
    kernel = render.TABLES["kernel"](RESULTS)
    assert "| R18 float32 | cpp | 30.0 | 30.0 | 60.0 | 60.0 - 60.0 |  | 50% | 3 |" in kernel
    assert "| R18 float32 | reference | 100 | 200 | 300 | 300 - 300 | 5.00 | 10% | 3 |" in kernel
    assert "foreign (another quantity)" in kernel
    host_row = "| four ways | 9.00 | 10.5 | +0.50 | +1.00 | +1.20 | +2.50 | 1.25 |"
    assert host_row in render.TABLES["host"](RESULTS)
    busy = render.TABLES["contention"](RESULTS).splitlines()[2:]
    assert busy == ["| plain cross entropy | 1000 | 5000 | 5.0 |  |  |",
                    "| four ways, fused | 1000 | 6000 | 6.0 | +6.0 % | +9.0 % |"]  # fmt: skip
    assert render.TABLES["freed"](RESULTS).splitlines()[2:] == [
        "| plain cross entropy | 2000 (2000 - 2000) | 200,000 | 1500 (1500 - 1500) | 0 | -25.0 % |"
    ]
    older = {name: found for name, found in RESULTS.items() if name not in ("host", "allocator")}
    assert render.TABLES["host"](older) == render.TABLES["freed"](older) == "Not measured yet.\n"
    assert "A CPU, 2 threads" in render.TABLES["machine"](RESULTS)
    kept = {**RESULTS, "facts": {**RESULTS["facts"], "freed memory": "kept"}}
    assert ", freed memory kept;" in render.TABLES["machine"](kept)


def test_bfloat16_is_shown_of_whoever_measured_it_last(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = ("machine", "kernel", "step")
    place = "<!-- bfloat16:{0} -->\n<!-- /bfloat16:{0} -->\n"
    page.write_text("".join(place.format(name) for name in names))
    assert render.fill_bfloat16(page, [RESULTS]) == list(names)
    assert page.read_text().count("Not measured yet.") == 3

    (title, row) = next(item for item in RESULTS["operations"].items() if "kernel" in item[0])
    half, empty = title.replace("float32", "bfloat16"), {**row, "competitors": {}}

    def of(cpu: str, date: str, row: dict) -> dict:
        step = {"a step": RESULTS["steps"]["a step"], "a step, bfloat16 autocast":
                {**RESULTS["steps"]["a step"], "base": "plain"}}  # fmt: skip
        return {**RESULTS, "facts": {**RESULTS["facts"], "cpu": cpu, "date": date}, "steps": step,
                "operations": {title: row, half: row}}  # fmt: skip

    old, new = of("the old", "2026-01-01", row), of("the new", "2026-02-01", row)
    without = of("without units", "2026-03-01", empty)
    render.fill_bfloat16(page, [new, without, old])
    text = page.read_text()
    assert "on the new, 2 threads" in text and "the old" not in text and "without" not in text
    assert "R18 bfloat16 | cpp" in text and "R18 float32" not in text
    assert "| a step, bfloat16 autocast |" in text and "| a step |" not in text


def test_the_targets_of_all_machines_stand_side_by_side(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- machines:targets -->\n<!-- /machines:targets -->\n")
    cheap = {**RESULTS["operations"], "kernel R18 float32": {
        "competitors": {"cpp": times(0.001, 0.001)}, "floors": {"both": 0.004},
    }}  # fmt: skip
    new = {**RESULTS, "facts": {**RESULTS["facts"], "cpu": "the new", "date": "2026-02-01"}}
    old = {**RESULTS, "operations": cheap, "host": {},
           "facts": {**RESULTS["facts"], "cpu": "the old", "date": "2026-01-01"}}  # fmt: skip
    assert render.fill_machines(page, [old, new]) == ["targets"]
    head, _, *lines = page.read_text().splitlines()[1:-1]
    assert head.startswith("| target | reach | the new, 2026-02-01, ")
    assert [line.split(" | ")[0] for line in lines] == [f"| {t.what}" for t in targets.TARGETS]
    assert "| kernel R18 float32 | at most 1.00 x | **2.00 x** | 0.50 x |" in lines
    (of_host,) = (line for line in lines if "host time" in line)
    assert of_host.startswith("| host time") and of_host.endswith(" |  |")


def found_lines(results: dict) -> list[tuple[str, list[str]]]:
    empty = {"steps": {}, "host": {}, "contention": {}}
    return [(line[0], line[1:]) for line in targets.lines({**empty, **results})]


def test_targets_say_what_was_reached_and_what_it_is_made_of() -> None:
    title = "resnet18, width 64, 32x32, batch 128, float32"
    scheduled = {**method(1.02, 0.012, 0.05), "kinds": {"neither": 0.01, "kernel": 0.06}}
    steps = {title: {"methods": {step.SCHEDULED: scheduled}, "left_out": {}}}
    times_ = {"average": 0.0003, "fullest": 0.0011, "least": 0.0002}
    of_host = {host.SCHEDULE: {"both": times_}, host.ONE_AND_TWO: {"both": {"least": 0.0006}}}
    operations = {
        **RESULTS["operations"],
        "consistency 5 x 128 x 1000 float32": {
            "floors": {"both": 0.001},
            "competitors": {
                "cpp": times(0.001, 0.001), "torch.compile(torch)": times(0.004, 0.005),
            },
        },
    }  # fmt: skip
    found = {**RESULTS, "steps": steps, "host": of_host, "operations": operations}
    lines = {line[0]: line[1:] for line in targets.lines(found)}
    assert lines[f"step over plain: {title}"] == [
        "at most +1.5%", "+1.2%", "yes",
        "quartiles +0.2% to +3.2%; similarities computed: neither +1.0%, kernel +6.0%",
    ]  # fmt: skip
    assert lines["peak memory of a step over plain"][1:3] == ["+5.0%", "no"]
    average, fullest = (line for name, line in lines.items() if "host" in name or "fullest" in name)
    assert average[:3] == ["at most 0.40 ms", "0.30 ms", "yes"] and "+0.60" in average[3]
    assert fullest[:3] == ["at most 1.00 ms", "1.10 ms", "no"]
    assert lines["kernel R18 float32"][:3] == ["at most 1.00 x", "2.00 x", "no"]
    consistency = lines["consistency 5 x 128 x 1000 float32"]
    assert consistency == [
        "at least 4.00 x", "4.50 x", "yes",
        "torch.compile(torch) over fused; fused is at 50% of the floor",
    ]  # fmt: skip
    assert lines["what a busy process slows the ways down by, over plain"][1:3] == ["1.20 x", "no"]
    medium = {"kernel R18 float32 medium": operations["kernel R18 float32"]}
    found = {"operations": {**operations, **medium}}
    (ratio,) = (line for name, line in found_lines(found) if "medium" in name)
    assert ratio[1] == "1.00 x"
    again = {"kernel R18 float32 medium": {**medium["kernel R18 float32 medium"], "again": {}}}
    found = {"operations": {**operations, **again}}  # rows of two runs have no ratio
    assert not [name for name, _ in found_lines(found) if "medium" in name]
    unmeasured = set(lines) ^ {target.what for target in targets.TARGETS}
    assert len(lines) == 7 and any("bfloat16" in what for what in unmeasured)


def test_targets_are_of_rows_and_steps_that_are_measured() -> None:
    measured = [one.name for one in step.steps(quick=False)] + [row.name for row in rows(False)]
    named = [word for target in targets.TARGETS for word in getattr(target.find, "args", ())]
    titles = {word for word in named if isinstance(word, str) and "float" in word}
    assert len(titles) == 12 and titles <= set(measured)


def test_the_steps_that_cost_the_least_and_the_most_are_shown() -> None:
    shown = render.TABLES["step-summary"](RESULTS).splitlines()
    assert shown[0].startswith("| the least and the most of 3 training steps | objective |")
    assert [line.split(" | ")[0] for line in shown[2:]] == (
        2 * ["| a step"] + 3 * ["| a dear step, compiled"]
    )
    assert shown[3] == (
        "| a step | four ways, fused | 1100 | 1 | +8.0 % (+7.0 % to +10.0 %) | +2.0 % |"
    )
    assert shown[6].endswith("| +28.0 % (+27.0 % to +30.0 %) | +2.0 % |")
    # Whichever is first.
    steps = dict(reversed(RESULTS["steps"].items()))
    again = render.TABLES["step-summary"]({**RESULTS, "steps": steps})
    assert again.splitlines() == shown
    # What a run can't tell is not quoted as the least, but never hidden where it is the most.
    def blurred(name: str) -> dict:
        found = RESULTS["steps"][name]
        of = {title: {**one, "overhead_quartiles": [-0.1, one["overhead"] + 0.1]}
              for title, one in found["methods"].items()}  # fmt: skip
        return {**RESULTS, "steps": {**RESULTS["steps"], name: {**found, "methods": of}}}

    noisy = render.TABLES["step-summary"](blurred("a step")).splitlines()
    assert noisy[2].startswith("| a middling step |") and noisy[0] == shown[0]
    dear = render.TABLES["step-summary"](blurred("a dear step, compiled")).splitlines()
    assert dear[4].startswith("| a dear step, compiled |")
    one = {"a step": RESULTS["steps"]["a step"]}
    assert len(render.TABLES["step-summary"]({**RESULTS, "steps": one}).splitlines()) == 4


def test_what_the_naive_form_costs_is_as_measured() -> None:
    assert render.TABLES["naive"](RESULTS) == (
        "Written plainly in PyTorch they make a training step 88 % longer (a dear step, "
        "compiled).\n"
    )


def test_the_layers_of_way_4_are_counted() -> None:
    said = render.TABLES["step-kernels"](RESULTS)
    assert said.startswith("Layers whose kernels way 4 takes: a step: 16; a middling step: 16;")


def test_what_took_less_than_the_floor_is_listed_and_only_that() -> None:
    assert render.TABLES["below-floor"](RESULTS) == "None in this run.\n"
    row = RESULTS["operations"]["kernel R18 float32"]
    lower = {**row, "floors": {"forward": 0.02, "backward": 0.04, "both": 0.06}}
    said = render.TABLES["below-floor"]({**RESULTS, "operations": {"kernel R18 float32": lower}})
    assert said.splitlines()[2:] == [
        "| kernel R18 float32 | backward | cpp | 30.0 | 40.0 | 133% |",
    ]  # equal is not below, and what computes another quantity does not count


@pytest.mark.parametrize(("network", "kernels"), [("vit", 19), ("fcn_resnet18", 17)])
def test_a_transformer_and_a_segmentation_network_are_steps_too(network, kernels) -> None:
    shown = step.Step(network, 2, width=32, size=16, methods=(step.PLAIN, step.FUSED))
    assert network in {each.network for each in step.steps(quick=False)}
    found = step.measure(shown, CPU, 0, fewest=1)
    assert not found["left_out"] and set(found["methods"]) == {step.PLAIN, step.FUSED}
    assert found["kernels"] == kernels
    network = step.network_of(shown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no way is switched off
        imcl = IMCL(network, torch.rand(2, 3, 16, 16), impl="torch")
    assert len(imcl.layers) == 4 and imcl.classifier in ("heads.head", "classifier")


def test_the_steps_of_a_schedule_by_kind() -> None:
    kinds = {kind: share for kind, (share, _) in step.kinds_of_steps(Schedule(4, 8)).items()}
    assert kinds == {"representation": 1 / 4, "kernel": 1 / 8, "neither": 5 / 8}
    every = {kind: share for kind, (share, _) in step.kinds_of_steps(Schedule(1, 1, 5)).items()}
    assert every == {"representation and kernel": 1.0}


def test_a_schedule_is_timed_by_its_kinds_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[frozenset[str]] = []
    forward = IMCL.forward

    def recording(self, x, y):
        out = forward(self, x, y)
        computed.append(frozenset(out.terms))
        return out

    took = {"representation": 4.0, "kernel": 6.0, "neither": 2.0}

    def constant(runs, *_, **__):  # a second round of which all but the plain step is slower
        for run in runs.values():
            run(0), run(1)
        return {name: [took.get(name.removeprefix(f"{step.SCHEDULED} "), 2.0),
                       took.get(name.removeprefix(f"{step.SCHEDULED} "), 1.0) * 2]
                for name in runs}  # fmt: skip

    monkeypatch.setattr(IMCL, "forward", recording)
    monkeypatch.setattr(step, "interleaved", constant)
    monkeypatch.setattr(step, "peak_of_tensors", lambda run, device: 1)
    found = step.measure(
        step.Step("resnet18", 2, width=8, size=8, methods=(step.PLAIN, step.SCHEDULED)), CPU, 0
    )["methods"][step.SCHEDULED]
    similarities = [terms & {"representation_similarity", "kernel_similarity"}
                    for terms in computed]  # fmt: skip
    kinds = ({"representation_similarity"}, set(), {"kernel_similarity"})
    assert similarities == [kind for kind in kinds for _ in range(2)]
    first, over = 4 / 8 + 6 / 16 + 2 * 13 / 16, 1 / 8 + 2 / 16
    assert found["seconds"]["median"] == 1.5 * first
    assert found["overhead"] == (over + 1 + 2 * over) / 2
    assert found["overhead_quartiles"] == [over + (1 + over) / 4, over + 3 * (1 + over) / 4]
    assert found["kinds"] == {"representation": 2.0, "neither": 0.5, "kernel": 3.5}
    assert found["fullest"] == 3.5


@pytest.mark.parametrize("who", [step.PLAIN, step.FUSED, step.SCHEDULED])
def test_a_step_that_fails_is_left_out_and_the_others_are_measured(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = step.training

    def failing(one, options, device, *, compiled):
        run, schedule = made(one, options, device, compiled=compiled)
        if options is not step.METHODS[who]:
            return run, schedule

        def fails_in_the_second_round(index: int):
            if index == 1:
                raise RuntimeError("out of luck\nand of memory")
            return run(index)

        return fails_in_the_second_round, schedule

    monkeypatch.setattr(step, "training", failing)
    methods = (step.PLAIN, step.FUSED, step.SCHEDULED)
    one = step.Step("resnet18", 2, width=8, size=8, methods=methods, rounds=2)
    found = step.measure(one, CPU, 0)
    assert found["left_out"] == {who: "RuntimeError: out of luck"}
    right = [] if who == step.PLAIN else [name for name in methods if name != who]
    assert list(found["methods"]) == right
    assert "out of luck" in render.left_out({"operations": {}, "steps": {one.name: found}})
    with pytest.raises(RuntimeError, match="out of luck"):
        step.measure(one, CPU, 0, strict=True)


def test_losing_passes_are_listed_and_only_those() -> None:
    losing = render.TABLES["losing"](RESULTS).splitlines()[2:]
    # torch's forward is faster; what computes another quantity does not count.
    assert losing == ["| kernel R18 float32 | forward | 30.0 | torch: 20.0 | 1.50 |"]


def test_tables_are_filled_in_between_their_markers_only(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- bench:memory -->\nold\n<!-- /bench:memory -->\nafter\n")
    assert render.fill(document, RESULTS) == ["memory"]
    once = document.read_text()
    assert once.startswith("before\n<!-- bench:memory -->\n| kernels N |")
    assert once.endswith("|\n<!-- /bench:memory -->\nafter\n")
    assert "old" not in once
    render.fill(document, RESULTS)
    assert document.read_text() == once


@pytest.mark.parametrize(
    "text",
    [
        "<!-- bench:nonsense -->\n<!-- /bench:nonsense -->\n",
        "<!-- bench:memory -->\nno end\n",
        "<!-- bench:memory -->\n<!-- bench:step -->\n<!-- /bench:memory -->\n",
    ],
)
def test_a_document_of_wrong_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(render.MarkerError, match=r"README.md: expected"):
        render.fill(document, RESULTS)
    assert document.read_text() == text


def test_the_documents_have_places_for_tables_that_exist() -> None:
    root = Path(__file__).resolve().parents[1]
    for document in ("README.md", "docs/performance.md"):
        marked = render.marked("bench").findall((root / document).read_text())
        assert all(name in render.TABLES for _, name, _, _ in marked)
    assert len(marked) == len(render.TABLES) - len(("summary", "step-summary", "naive"))


def test_the_tables_in_the_documents_are_those_of_the_stored_results(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    stored = [json.loads(path.read_text()) for path in (root / "bench/results").glob("*.json")]
    for document in ("README.md", "docs/performance.md"):
        text = (root / document).read_text()
        copy = tmp_path / Path(document).name
        copy.write_text(text)
        render.fill_bfloat16(copy, stored)
        render.fill_machines(copy, stored)
        filled = []
        for results in stored:  # one for each machine
            render.fill(copy, results)
            filled.append(copy.read_text())
        assert text in filled


# ---- instruction counts ----------------------------------------------------------------

COUNTS = {"compiler": "g++ 12", "isa": "avx2", "instructions": {"a": 1000, "b": 1000}}


@pytest.mark.parametrize(
    ("instructions_now", "good", "says"),
    [
        ({"a": 1029, "b": 1000}, True, "+2.90%"),
        ({"a": 1031, "b": 1000}, False, "too many"),
        ({"a": 900, "b": 1000}, True, "fewer"),
        ({"a": 1000}, False, "only in the baseline"),
        ({"a": 1000, "b": 1000, "c": 1}, False, "only in the driver"),
    ],
)
def test_counts_may_grow_by_three_per_cent(instructions_now, good: bool, says: str) -> None:
    lines, verdict = instructions.compare({**COUNTS, "instructions": instructions_now}, COUNTS)
    assert verdict is good
    assert any(says in line for line in lines)


def test_counts_of_another_compiler_are_not_compared() -> None:
    lines, good = instructions.compare({**COUNTS, "compiler": "clang 19"}, COUNTS)
    assert good
    assert lines == ["not compared: the baseline's compiler is g++ 12, this one's clang 19"]


def test_the_baseline_has_every_case_of_the_driver() -> None:
    baseline = instructions.read_baseline()
    assert {"compiler", "isa", "valgrind"} < set(baseline)
    cases = {case.removesuffix(", forward").removesuffix(", backward")
             for case in baseline["instructions"]}  # fmt: skip
    named = re.findall(r'"((?:representation|kernel|consistency) \d[^"]*)"',
                       instructions.DRIVER.read_text())  # fmt: skip
    assert cases == set(named) and len(named) >= 12
