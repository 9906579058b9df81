"""The loss Modules: the functions, with their arguments kept."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from conftest import Impl, assert_same_bits
from strategies import Matrices

import imcl_fast
from imcl_fast import functional as F

PAIRS = {
    "representation": (imcl_fast.RepresentationSimilarityLoss, F.representation_similarity),
    "kernel": (imcl_fast.KernelSimilarityLoss, F.kernel_similarity),
    "consistency": (imcl_fast.CollaborativeConsistencyLoss, F.collaborative_consistency),
}
# Their behaviour is tested in test_dependence.py and test_divergences.py: they have other
# implementations.
ALL_PAIRS = {
    **PAIRS,
    "dependence": (imcl_fast.ViewDependence, F.view_dependence),
    "mixture": (imcl_fast.JensenShannonLoss, F.jensen_shannon),
}
# Every argument away from its default, and not all at once: some undo each other.
OPTIONS = {
    "representation": [
        {}, {"penalty": "abs"}, {"penalty": "signed", "center": True}, {"eps": 5.0},
    ],
    "kernel": [{}, {"penalty": "abs"}, {"eps": 7.0}],
    "consistency": [
        {},
        {"temperature": 4.0, "ce_weight": 0.5, "kl_weight": [1.0, 0.0, 2.0]},
        {"teacher": "pairwise", "detach_teacher": False, "reduction": "sum"},
        {"label_smoothing": 0.2, "ignore_index": 1, "reduction": "none"},
        {"groups": [1, 2], "temperature": [1.0, 3.0], "teacher": ["mean", "final"]},
        {"return_terms": True},
        {"weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0])},
    ],
}
CASES = [(kind, options) for kind, many in OPTIONS.items() for options in many]


def inputs(kind: str, device: str = "cpu") -> tuple:
    if kind == "representation":
        return ([Matrices(s, True, seed=1, spread=4.0).build(torch.float32, device)
                 for s in ((2, 5, 4, 4), (2, 9, 3))],)
    if kind == "kernel":
        return ([Matrices(s, False, seed=1, spread=4.0).build(torch.float32, device)
                 for s in ((8, 3, 3, 3), (10, 4))],)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=generator).to(device)
    return logits, torch.tensor([1, 5, 0, 1], device=device)


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [result[0], *result[1].values()]


@pytest.mark.parametrize("kind,options", CASES, ids=str)
def test_module_is_the_function(impl: Impl, kind: str, options: dict) -> None:
    module, function = PAIRS[kind]
    args = inputs(kind, impl.device)
    options = {k: v.to(impl.device) if torch.is_tensor(v) else v for k, v in options.items()}
    loss = module(impl=impl.name, **options)
    expected = flat(function(*args, impl=impl.name, **options))
    assert_same_bits(flat(loss(*args)), expected)
    assert_same_bits(flat(copy.deepcopy(loss)(*args)), expected)
    assert_same_bits(flat(pickle.loads(pickle.dumps(loss))(*args)), expected)
    if options and "return_terms" not in options:
        default = flat(function(*args, impl=impl.name))
        assert not default[0].sum().equal(expected[0].sum()), "the option changed nothing"


@pytest.mark.parametrize("kind", ALL_PAIRS)
def test_module_has_the_arguments_of_the_function(kind: str) -> None:
    module, function = ALL_PAIRS[kind]

    def keywords(signature: inspect.Signature) -> dict:
        return {
            name: (p.default, p.annotation)
            for name, p in signature.parameters.items()
            if p.kind == p.KEYWORD_ONLY
        }

    def positional(signature: inspect.Signature) -> list:
        return [
            name
            for name, p in signature.parameters.items()
            if p.kind == p.POSITIONAL_OR_KEYWORD and name != "self"
        ]

    of_function = inspect.signature(function)
    kept, each = (keywords(inspect.signature(f)) for f in (module.__init__, module.forward))
    assert kept | each == keywords(of_function) and not set(kept) & set(each)
    assert positional(inspect.signature(module.__init__)) == []
    assert positional(inspect.signature(module.forward)) == positional(of_function)


@pytest.mark.parametrize("kind", ALL_PAIRS)
def test_module_holds_nothing_to_train_or_save(kind: str) -> None:
    loss = ALL_PAIRS[kind][0]()
    assert not list(loss.parameters()) and not list(loss.buffers())
    assert not loss.state_dict()
    loss.to(torch.float64).eval().train()


def test_class_weights_go_with_the_module() -> None:
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0])
    loss = imcl_fast.CollaborativeConsistencyLoss(weight=weight)
    assert loss.state_dict()["weight"].equal(weight)
    assert loss.double().weight.dtype == torch.float64
    logits, target = inputs("consistency")
    share = torch.tensor([1.0, 0.0, 2.0, 0.5])
    assert_same_bits(
        [loss(logits, target, sample_weight=share)],
        [F.collaborative_consistency(logits, target, weight=weight, sample_weight=share)],
    )
    with pytest.raises(TypeError, match="^weight: expected a Tensor or None, got list"):
        imcl_fast.CollaborativeConsistencyLoss(weight=[1.0, 2.0])


@pytest.mark.parametrize("kind", PAIRS)
def test_module_trains(impl: Impl, kind: str) -> None:
    """A few steps down the gradient lower each loss."""
    module, _ = PAIRS[kind]
    xs, *rest = inputs(kind, impl.device)
    xs = [x.clone().requires_grad_() for x in xs]
    loss = module(impl=impl.name)
    optimizer = torch.optim.Adam(xs, lr=0.02)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(xs, *rest)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


@pytest.mark.parametrize("kind", PAIRS)
def test_module_traces_without_a_break(impl: Impl, kind: str) -> None:
    torch.compiler.reset()
    loss = PAIRS[kind][0](impl=impl.name)
    args = inputs(kind, impl.device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), loss(*args))


def test_repr_shows_what_matters() -> None:
    text = repr(imcl_fast.RepresentationSimilarityLoss(penalty="abs", center=True, impl="torch"))
    assert text == "RepresentationSimilarityLoss(penalty='abs', center=True, impl='torch')"
    assert repr(imcl_fast.KernelSimilarityLoss()) == (
        "KernelSimilarityLoss(penalty='square', impl='auto')"
    )
    text = repr(imcl_fast.CollaborativeConsistencyLoss(temperature=3.0, teacher="final"))
    assert text.startswith("CollaborativeConsistencyLoss(temperature=3.0, teacher='final'")


def test_public_names() -> None:
    for name in imcl_fast.__all__:
        assert getattr(imcl_fast, name).__doc__, name
    for function in (*(f for _, f in PAIRS.values()),):
        assert function.__doc__ and "Raises:" in function.__doc__


@pytest.mark.parametrize("kind", ["consistency", "mixture"])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_modules_keep_where_the_classes_are(kind, class_dim):
    module, function = ALL_PAIRS[kind]
    z, y = torch.randn(3, 5, 5), torch.arange(15).view(3, 5) % 5
    got = module(class_dim=class_dim)([z, 2 * z], y)
    assert_same_bits([got], [function([z, 2 * z], y, class_dim=class_dim)])


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_is_that_of_the_function(detach):
    z, y = inputs("consistency")
    gradients = []
    for loss in (imcl_fast.CollaborativeConsistencyLoss(detach_teacher=detach),
                 lambda z, y: F.collaborative_consistency(z, y, detach_teacher=detach)):
        x = z.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(x, y), x)
    assert_same_bits(gradients[:1], gradients[1:])
