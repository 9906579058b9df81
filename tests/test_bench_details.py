"""Details of ``python -m bench``: what its rows compute, on which inputs, in how many rounds, of
which a fault went unseen by its own tests."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from test_bench import CPU, method

from bench import step, targets, timing
from bench.rows import Row, consistency, dependence
from bench.timing import interleaved
from imcl_fast import functional as F


def test_the_last_level_cache_is_the_largest(tmp_path, monkeypatch):
    for index, size in enumerate(("32K", "2M", "1024K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(timing, "Path", lambda _: tmp_path)
    assert timing.cache_bytes(CPU) == 2 * 2**20


def test_rounds_go_on_for_as_long_as_asked_within_their_bounds(monkeypatch):
    clock = itertools.count()  # a round takes a second
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    counts = [len(interleaved({"a": lambda i: i}, seconds)["a"]) for seconds in (0, 12, 1000)]
    assert counts == [5, 12, 200]


def test_inputs_are_those_that_a_row_names():
    row = Row("representation", "", ((4, 8, 4, 4),), torch.bfloat16, channels_last=True)
    (x,) = row.inputs(0, CPU)
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    assert (x >= 0).all() and (x == 0).any() and row.bytes == 2 * x.numel()
    (weight,) = Row("kernel", "", ((8, 4),)).inputs(0, CPU)
    assert (weight < 0).any()
    views = dependence("", ((1, 32), (1, 16)), 64).inputs(0, CPU)
    assert [x.shape[1] for x in views] == [32, 32, 32, 16, 16, 16]
    assert F.dependence(views[0], views[2], kernel="linear", normalize=True) > 0.2
    with Row("kernel", "", ((8, 4),), precision="medium").settings():
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Row("representation", "", ((2, 8, 4, 4),), center=True),
         lambda xs, y: F.representation_similarity(xs, center=True)),
        (Row("representation", "", ((2, 8, 4, 4),), penalty="abs"),
         lambda xs, y: F.representation_similarity(xs, penalty="abs")),
        (Row("kernel", "", ((8, 4),), penalty="abs"),
         lambda xs, y: F.kernel_similarity(xs, penalty="abs")),
        (consistency(3, 4, 5, divergence="jsd"),
         lambda xs, y: F.collaborative_consistency(xs, y, temperature=2.0, divergence="jsd")),
        (dependence("", ((1, 32), (1, 16)), 8),
         lambda xs, y: F.view_dependence([xs[0::3], xs[1::3], xs[2::3]])),
    ],
)  # fmt: skip
def test_a_row_computes_what_its_name_says(row, expected):
    xs = row.inputs(0, CPU)
    y = row.target(CPU) if row.operation == "consistency" else None
    torch.testing.assert_close(row.loss("torch", CPU)(xs), expected(xs, y))


def test_the_memory_of_a_step_is_the_most_of_all_networks():
    steps = {
        "a": {"methods": {step.SCHEDULED: method(1.0, 0.0, 0.05)}},
        "b": {"methods": {step.SCHEDULED: method(1.0, 0.0, 0.01)}},
        "c": {"methods": {step.PLAIN: method(1.0, 0.0, 0.0)}},
    }
    assert targets._memory({"steps": steps}) == (0.05, "a, the most of 2 networks")


def test_the_time_of_a_graph_is_that_of_one_set(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    took = iter([3.0, 9.0, 6.0])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(timing, "elapsed", lambda device, run: [next(took)])
    sets = [[torch.ones(1, requires_grad=True)] for _ in range(2)]
    assert timing.replayed(lambda xs: xs[0].sum(), sets, 3) == 3.0
