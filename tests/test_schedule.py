"""Ways 3 and 4 on a schedule: when they are computed, that nothing is lost, and what is kept."""

import copy
import io
import itertools
import math
from unittest.mock import Mock

import pytest
import torch
from conftest import DEFAULT_INTERVALS
from test_imcl import WAYS_ON, FlatCNN, build, only, step
from torch._dynamo.testing import CompileCounter

from imcl_fast import IMCL, calls
from imcl_fast.schedule import Schedule

R, K = "representation_similarity", "kernel_similarity"
X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 4, 5])


def scheduled(representation, kernel, **options):
    """In float64 and without what is random, so that calls on the same batch are the same."""
    torch.manual_seed(0)
    intervals = dict(representation_interval=representation, kernel_interval=kernel)
    return build(FlatCNN().double(), X, dropout=0.0, **intervals, **options)


def computed(imcl, calls):
    """For each of the calls "r", "k", both or neither."""
    found = []
    for _ in range(calls):
        terms = imcl(X, Y).terms
        found.append("r" * (R in terms) + "k" * (K in terms))
    return found


# When


@pytest.mark.parametrize(
    ("representation", "kernel", "expected"),
    [
        (1, 1, ["rk"] * 4),
        (4, 8, ["r", "", "k", "", "r", "", "", "", "r", "", "k"]),
        (8, 4, ["r", "", "k", "", "", "", "k", "", "r", "", "k"]),
        (2, 2, ["r", "k", "r", "k"]),
        (1, 2, ["rk", "r", "rk", "r"]),
        (2, 3, ["rk", "", "r", "k", "r", "", "rk"]),  # there is no way to keep them apart
        (6, 9, ["r", "k", "", "", "", "", "r", "", "", "", "k"]),
    ],
)
def test_a_way_is_computed_in_every_kth_call(representation, kernel, expected):
    assert computed(scheduled(representation, kernel), len(expected)) == expected


def test_no_call_computes_both_where_that_can_be_avoided():
    for a, b in itertools.product(range(1, 13), repeat=2):
        turn, both, of = Schedule(a, b).turn, 0, {a: 0, b: 0}
        for _ in range(math.lcm(a, b)):
            assert turn.representation in (0, a) and turn.kernel in (0, b)
            both += bool(turn.representation and turn.kernel)
            of[a] += turn.representation
            of[b] += turn.kernel if a != b else 0
            turn = turn.next
        assert turn is Schedule(a, b).turn or turn.position == 0
        assert set(of.values()) == {math.lcm(a, b)}  # each way's weights make up for its rests
        assert (both == 0) == (math.gcd(a, b) > 1)


def test_what_is_not_computed_costs_nothing(monkeypatch):
    imcl = scheduled(2, 4)
    similarity = Mock(wraps=calls.pairwise)
    monkeypatch.setattr(calls, "pairwise", similarity)
    counts = []
    for _ in range(4):
        similarity.reset_mock()
        out = imcl(X, Y)
        counts.append(similarity.call_count)
        assert "multilayer_consistency" in out.terms and "output_consistency" in out.terms
    assert counts == [3, 1, 3, 0]  # a call for each layer, one for all kernels


def test_calls_that_train_nothing_do_not_count():
    imcl = scheduled(2, 4)
    every = scheduled(1, 1).eval()
    for expected in ("r", "k", "r", "", "r"):
        imcl(X)
        imcl.eval()
        every.load_state_dict(imcl.state_dict())  # the running statistics
        out, plain = imcl(X, Y), every(X, Y)
        imcl.train()
        assert R in out.terms and K in out.terms
        torch.testing.assert_close(out.loss, plain.loss)
        with torch.no_grad():
            assert {R, K} <= set(imcl(X, Y).terms)
        with pytest.raises(ValueError, match="target"):
            imcl(X, Y[:-1])
        assert computed(imcl, 1) == [expected]


# How much


def test_a_way_counts_as_often_as_it_rests():
    imcl = scheduled(2, 4)
    for _ in range(4):
        out = imcl(X, Y)
        ways = [("output_weight", "output_consistency", 1)]
        ways += [("multilayer_weight", "multilayer_consistency", 1)]
        ways += [("representation_weight", R, 2), ("kernel_weight", K, 4)]
        expected = out.terms["cross_entropy"]
        for weight, term, times in ways:
            expected = expected + times * WAYS_ON[weight] * out.terms.get(term, 0)
        torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("intervals", [(4, 8), (2, 3), (1, 4), (5, 1)])
def test_the_mean_over_a_period_is_that_of_every_step(intervals):
    expected = step(scheduled(1, 1), X, Y)[1]
    imcl = scheduled(*intervals)
    calls = math.lcm(*intervals)
    for _ in range(calls):
        (imcl(X, Y).loss / calls).backward()
    for name, p in imcl.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_a_weight_may_change_and_counts_from_the_next_call():
    imcl = scheduled(2, 2)
    first = imcl(X, Y)
    imcl.kernel_weight = 3 * WAYS_ON["kernel_weight"]
    imcl.output_weight = 0.5
    imcl.label_smoothing = 0.1
    second = imcl(X, Y)
    assert R in first.terms and K in second.terms
    terms = second.terms
    expected = terms["cross_entropy"] + 0.5 * terms["output_consistency"]
    expected += WAYS_ON["multilayer_weight"] * terms["multilayer_consistency"]
    expected += 2 * 3 * WAYS_ON["kernel_weight"] * terms[K]
    torch.testing.assert_close(second.loss.detach(), expected)
    smoothed = torch.nn.functional.cross_entropy(second.logits, Y, label_smoothing=0.1)
    torch.testing.assert_close(terms["cross_entropy"], smoothed.detach())


# What is kept


def test_the_place_is_saved_with_the_heads():
    imcl, whole = scheduled(4, 8), scheduled(4, 8)
    expected = computed(whole, 16)
    found = computed(imcl, 3)
    state = imcl.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = scheduled(4, 8)
    computed(other, 2)
    other.load_state_dict(state)
    assert found + computed(other, 13) == expected
    assert list(other.model.state_dict()) == list(FlatCNN().state_dict())


def test_a_state_from_before_there_was_a_schedule_begins_it():
    imcl = scheduled(2, 4)
    state = scheduled(2, 4).state_dict()
    del state["_extra_state"]
    computed(imcl, 3)
    imcl.load_state_dict(state)
    assert computed(imcl, 2) == ["r", "k"]
    inside = torch.nn.ModuleDict({"imcl": scheduled(2, 4)})
    inside.load_state_dict({f"imcl.{name}": value for name, value in state.items()})


def test_a_state_of_another_schedule_keeps_the_ways_apart():
    imcl = scheduled(6, 9)
    computed(imcl, 11)
    other = scheduled(2, 4)
    other.load_state_dict(imcl.state_dict())  # the 12th call, after two whole periods of 4
    assert computed(other, 4) == ["", "r", "k", "r"]


def test_copies_and_files_go_on_where_it_stands():
    imcl = scheduled(1000, 2000)  # as deep as no recursion may go
    computed(imcl, 1)
    file = io.BytesIO()
    torch.save(imcl, file)
    file.seek(0)
    for twin in (copy.deepcopy(imcl), torch.load(file, weights_only=False)):
        assert twin._schedule.turn.position == 1
        computed(twin, 1)
        assert twin._schedule.turn.position == 2 and imcl._schedule.turn.position == 1


# torch.compile


@pytest.mark.parametrize(
    ("intervals", "graphs"),
    [((1, 1), 1), pytest.param((4, 8), 3, marks=pytest.mark.slow), ((2, 3), 4)],
)
def test_a_graph_for_each_set_of_ways_and_none_after_the_first_period(intervals, graphs):
    torch._dynamo.reset()
    imcl, eager = (scheduled(*intervals) for _ in range(2))
    counter = CompileCounter()
    compiled = torch.compile(imcl, fullgraph=True, backend=counter)
    period = math.lcm(*intervals)
    for call in range(3 * period):
        out, expected = compiled(X, Y), eager(X, Y)
        torch.testing.assert_close(out.loss, expected.loss)
        assert list(out.terms) == list(expected.terms)
        if call + 1 == period:
            assert counter.frame_count == graphs
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_a_compiled_function_around_it_keeps_the_schedule_too():
    torch._dynamo.reset()
    imcl, eager = scheduled(2, 4), scheduled(2, 4)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def loss_of(x, y):
        return imcl(x, y).loss

    for _ in range(8):
        torch.testing.assert_close(loss_of(X, Y), eager(X, Y).loss)
    imcl.load_state_dict(eager.state_dict())
    state = {**eager.state_dict(), "_extra_state": torch.tensor(3)}
    for module in (imcl, eager):
        module.load_state_dict(state)
    for _ in range(4):
        torch.testing.assert_close(loss_of(X, Y), eager(X, Y).loss)
    assert counter.frame_count == 3


# By default


def test_the_schedule_by_default(monkeypatch):
    """That which the study's rule chose: way 3 in every 8th call, way 4 in every 16th."""
    assert DEFAULT_INTERVALS == {"representation_interval": 8, "kernel_interval": 16}
    for name, interval in DEFAULT_INTERVALS.items():
        monkeypatch.setitem(IMCL.__init__.__kwdefaults__, name, interval)
    imcl = build(FlatCNN().double(), X, dropout=0.0)
    assert (imcl.representation_interval, imcl.kernel_interval) == (8, 16)
    period = ["r", *[""] * 3, "k", *[""] * 3, "r", *[""] * 7]
    assert computed(imcl, 20) == period + period[:4]


# What can be wrong


@pytest.mark.parametrize("name", ["representation_interval", "kernel_interval"])
def test_intervals_are_whole_numbers(name):
    for value, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"{name}: expected an int"):
            IMCL(FlatCNN(), X.float(), **{name: value})
    imcl = IMCL(FlatCNN(), X.float(), **{name: 3}, **only("output_weight"))
    assert getattr(imcl, name) == 3
    for value, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=f"{name}: expected an int"):
            setattr(imcl, name, value)
    assert getattr(imcl, name) == 3


def test_intervals_can_be_changed_between_steps():
    """Where the schedule stands stays."""
    imcl = build(FlatCNN().double(), X, representation_interval=2, kernel_interval=4, dropout=0.0)
    assert computed(imcl, 3) == ["r", "k", "r"]
    imcl.kernel_interval = 2
    assert (imcl.representation_interval, imcl.kernel_interval) == (2, 2)
    assert computed(imcl, 3) == ["k", "r", "k"]
    imcl.representation_interval = imcl.kernel_interval = 1
    assert computed(imcl, 2) == ["rk", "rk"]


def test_a_period_has_an_end():
    with pytest.raises(ValueError, match="least common multiple of at most 100000, got 499 and 50"):
        Schedule(499, 503)
    assert Schedule(1000, 64).turn.position == 0


def test_a_position_beyond_the_period_is_its_remainder():
    assert Schedule(2, 3, 13).turn.position == 1


def test_where_the_schedule_stands_is_on_the_cpu_whatever_the_default():
    from torch import nn
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    imcl = IMCL(network, torch.rand(2, 1, 8, 8), layers=["1"], output_weight=0, multilayer_weight=0)
    with torch.device("meta"):
        state = imcl.get_extra_state()
    assert state.device.type == "cpu" and state == 0


def test_weights_made_anew_are_seen_from_the_first_call_on():
    from torch import nn
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    nn.utils.parametrizations.weight_norm(network[2])
    IMCL(network, torch.rand(2, 1, 8, 8), output_weight=0, multilayer_weight=0,
         representation_weight=0, representation_interval=4, kernel_interval=4, kernels=["2"])
    assert network[2].parametrizations.weight._forward_hooks
