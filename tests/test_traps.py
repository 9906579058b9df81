"""What goes wrong without a word elsewhere: heads outside the optimizer, transforms, meta
tensors."""

import copy
import warnings
from functools import partial

import pytest
import torch
from test_imcl import WEIGHTS, FlatCNN, build
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from imcl_fast import IMCL, Perturbation, calls, unlearnt
from imcl_fast import functional as F
from imcl_fast.heads import average
from imcl_fast.imcl import EVERY_WAY

X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 5])


# An optimizer without the heads


SGD = partial(torch.optim.SGD, lr=0.01)


def trained(imcl, parameters, steps=6, accumulate=1, kind=SGD):
    optimizer = kind(parameters)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(steps):
            for _ in range(accumulate):
                imcl(X, Y).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(warning.message) for warning in told]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_heads_that_the_optimizer_lacks_are_told_of_once(accumulate):
    imcl = build(FlatCNN(), X)
    told = trained(imcl, imcl.model.parameters(), accumulate=accumulate)
    assert len(told) == 1 and "imcl.heads.parameters()" in told[0]
    assert not trained(imcl, imcl.model.parameters())


def test_heads_are_missed_however_many_batches_make_a_step(monkeypatch):
    monkeypatch.setattr(unlearnt, "PATIENCE", 10)
    imcl = build(FlatCNN(), X)
    assert len(trained(imcl, imcl.model.parameters(), steps=4, accumulate=8)) == 1
    idle = build(FlatCNN(), X)
    assert not trained(idle, idle.model.parameters(), steps=1, accumulate=14)
    assert idle._heads_move.done  # nothing is looked for for ever


def test_heads_that_a_fused_optimizer_trains_are_seen():
    """Whose step counts up no version."""
    imcl = build(FlatCNN(), X)
    heads = torch.optim.AdamW(imcl.heads.parameters(), lr=1e-3, fused=True)
    network = torch.optim.SGD(imcl.model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            imcl(X, Y).loss.backward()
            for optimizer in (heads, network):
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_heads_that_a_fused_optimizer_lacks_are_told_of_once(accumulate):
    fused = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    imcl = build(FlatCNN(), X)
    versions = [p._version for p in imcl.model.parameters()]
    told = trained(imcl, imcl.model.parameters(), accumulate=accumulate, kind=fused)
    assert versions == [p._version for p in imcl.model.parameters()]  # or this proves nothing
    assert len(told) == 1 and "imcl.heads.parameters()" in told[0]
    complete = build(FlatCNN(), X)
    assert not trained(complete, complete.parameters(), accumulate=accumulate, kind=fused)
    waiting = build(FlatCNN(), X)
    assert not trained(waiting, waiting.model.parameters(), steps=1, accumulate=6, kind=fused)
    frozen = build(FlatCNN(), X)
    frozen.model.requires_grad_(False)
    assert not trained(frozen, frozen.heads.parameters(), steps=2, accumulate=6, kind=fused)


def test_nothing_is_told_where_nothing_is_wrong():
    imcl = build(FlatCNN(), X)
    assert not trained(imcl, imcl.parameters())
    assert not trained(imcl, imcl.model.parameters())  # they have been trained
    frozen = build(FlatCNN(), X)
    frozen.heads.requires_grad_(False)
    assert not trained(frozen, frozen.model.parameters())
    still = build(FlatCNN(), X)
    assert not trained(still, still.heads.parameters())
    one = build(FlatCNN(), X, multilayer_weight=0.0)
    assert not trained(one, one.parameters())
    late = build(FlatCNN(), X)
    optimizer = torch.optim.SGD(late.model.parameters(), lr=0.01)
    optimizer.add_param_group({"params": late.heads.parameters()})
    late(X, Y).loss.backward()
    optimizer.step()
    assert not trained(copy.deepcopy(late), late.parameters(), steps=1)


def test_perturbed_weights_are_no_training():
    """Two blocks are accumulated; what they write to the network they take back."""
    network = FlatCNN()
    imcl = build(network, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            with Perturbation(network, 0.01, imcl) as perturbation:
                imcl(X, Y).loss.backward()
                perturbation.move()
                imcl(X, Y).loss.backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="the auxiliary heads have not"):
        for _ in range(5):
            with Perturbation(network, 0.01, imcl) as perturbation:
                imcl(X, Y).loss.backward()
                perturbation.move()
                imcl(X, Y).loss.backward()
            optimizer.step()


def test_weights_that_were_taken_apart_are_named():
    """As FSDP1 leaves a slice of all of a unit's parameters in each place."""
    imcl = build(FlatCNN(), X)
    first = imcl.kernels[0]
    module = imcl.model.get_submodule(first)
    module.weight = torch.nn.Parameter(module.weight.detach().flatten()[3:])
    with pytest.raises(RuntimeError, match=f"kernel_weight: the weight of {first!r} is not there"):
        imcl._kernel_similarity(imcl._kernel_weights(EVERY_WAY), EVERY_WAY)


def test_training_without_a_target_is_told_of_once():
    imcl = build(FlatCNN(), X)
    with pytest.warns(UserWarning, match="IMCL: called in training mode without a target") as told:
        for _ in range(2):
            imcl(X)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = build(FlatCNN(), X)
        quiet.eval()(X)
        quiet.train()
        with torch.no_grad():
            quiet(X)
        with quiet.watch():
            quiet(X)
        build(FlatCNN(), X, **dict.fromkeys(WEIGHTS, 0.0))(X)


# Transforms of torch.func, and tensors without values

FEATURES = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HEADS = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOSSES = {
    "representation": (lambda x, **o: F.representation_similarity(x, center=True, **o), FEATURES),
    "kernel": (F.kernel_similarity, FEATURES),
    "consistency": (lambda z, **o: F.collaborative_consistency(z, Y.clamp(max=4), **o), HEADS),
    "dependence": (
        lambda x, **o: F.dependence(x, HEADS.double().movedim(0, 1).flatten(1), **o),
        torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    ),
    "consistency alone": (lambda z, **o: F.collaborative_consistency(z, None, **o), HEADS),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_transforms_of_torch_func(loss):
    function, x = LOSSES[loss]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf, impl="reference"), leaf)
    torch.testing.assert_close(torch.func.grad(function)(x), gradient)
    _, slope = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, gradient.sum())
    both = torch.func.vmap(function)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both, torch.stack([function(x), function(2 * x)]))
    for impl in ("torch", "cpp"):
        with pytest.raises(RuntimeError, match=f'impl="{impl}".* torch.func .*impl="auto"'):
            torch.func.grad(lambda x, impl=impl: function(x, impl=impl))(x)
    torch.compiler.reset()  # and where what is compiled is the transform
    compiled = torch.compile(torch.func.grad(function), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gradient)
    compiled = torch.compile(torch.func.vmap(function), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.stack([x, 2 * x])), both)


def of_labels(z, y, **options):
    return F.collaborative_consistency([z, z.sin()], y, **options)


def of_a_mixture(z, y, **options):
    return F.jensen_shannon([z, z.sin()], y, **options)


@pytest.mark.parametrize("function", [of_labels, of_a_mixture])
def test_gradients_of_each_sample_with_labels_of_its_own(function):
    """As of differential privacy; the labels are among what is mapped over."""
    weights = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([[0, 1, 2], [3, 4, 0], [1, -100, 1], [2, 2, 2], [4, 3, -100], [0, 0, 4]])

    def loss(w, x, y):
        return function(x @ w, y)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    for gradient, *sample in zip(each, x, y, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(weights, *sample))
        leaf = weights.clone().requires_grad_()
        function(sample[0] @ leaf, sample[1], impl="cpp").backward()
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("function", [of_labels, of_a_mixture])
@pytest.mark.parametrize("label", [-1, 5, 255])
def test_what_is_no_class_is_no_quiet_number_where_nobody_can_check(function, label):
    z, y = HEADS[0], torch.tensor([0, label, 2, 3, 4, -100])
    with pytest.raises(ValueError, match=f"target: .* got {label}"):
        function(z, y)
    losses = torch.func.vmap(partial(function, reduction="none"))(z[None], y[None])[0]
    assert losses.isnan().tolist() == [False, True, False, False, False, False]
    assert torch.func.vmap(function)(z[None], y[None]).isnan().all()
    assert torch.func.grad(function)(z, y)[1].isnan().all()


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_several_losses_at_once(impl, reduction):
    """By PyTorch's older vmap, that of jacobian(vectorize=True) and is_grads_batched."""
    other = HEADS[1]

    def loss(z):
        return F.collaborative_consistency(
            [z, other], Y.clamp(max=4), reduction=reduction, impl=impl
        )

    found = [torch.autograd.functional.jacobian(loss, HEADS[0], vectorize=v) for v in (False, True)]
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("impl", ["torch", "cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_several_similarities_and_dependences_at_once(dtype, impl):
    losses = [
        lambda x: F.representation_similarity([x, x[:, :3]], center=True, impl=impl),
        lambda x: F.kernel_similarity(x, impl=impl),
        lambda x: F.dependence(x, x.detach().flip(1) ** 2, bandwidth=2.0, impl=impl),
    ]
    plain = torch.randn(6, 4, 3, 2).to(dtype)
    for x in (plain, plain.to(memory_format=torch.channels_last), plain.transpose(0, 1)):
        for loss in losses:
            found = [
                torch.autograd.functional.jacobian(
                    lambda x, loss=loss: torch.stack([loss(x), -2 * loss(x)]), x, vectorize=v
                )
                for v in (False, True)
            ]
            assert found[0].any() and found[1].dtype == dtype
            torch.testing.assert_close(found[1], found[0])


class Backward(TorchDispatchMode):
    """How many tensors each call of a backward operator has gradients to make of."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "imcl_fast" in str(function) and "_backward" in str(function):
            self.counts.append(len(args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", ["torch", "cpp", "reference"])
@pytest.mark.parametrize("learning", [(1,), (0, 2)])
def test_what_is_frozen_has_no_gradient_made_of_it(learning, impl):
    """Neither frozen layers, as LoRA leaves them, nor a teacher's features."""
    xs = [torch.randn(6, 4, 3), torch.randn(6, 2, 5, dtype=torch.float64), torch.randn(6, 9, 2)]
    losses = {
        "kernel": lambda xs: F.kernel_similarity(xs, impl=impl),
        "features": lambda xs: F.representation_similarity(xs, center=True, impl=impl),
        "dependence": lambda xs: F.view_dependence(
            [[xs[0]], [xs[1].float()], [xs[2]]], kernel="linear", impl=impl
        ),
    }
    for loss in losses.values():
        whole = [x.clone().requires_grad_() for x in xs]
        expected = loss(whole)
        truth = torch.autograd.grad(expected, whole)
        some = [x.clone().requires_grad_(i in learning) for i, x in enumerate(xs)]
        got = loss(some)
        with Backward() as backward:
            found = torch.autograd.grad(got, [some[i] for i in learning])
        torch.testing.assert_close(got, expected)
        for i, gradient in zip(learning, found, strict=True):
            torch.testing.assert_close(gradient, truth[i])
        assert sum(backward.counts) == (len(learning) if impl == "cpp" else 0)
        with torch.no_grad():
            torch.testing.assert_close(loss(some), expected)


def test_forward_mode_takes_the_reference():
    x, tangent = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for loss in (F.kernel_similarity, lambda x: F.dependence(x, x**2),
                 lambda x: F.collaborative_consistency([x, x**2], Y.clamp(max=3))):  # fmt: skip
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            found = forward_ad.unpack_dual(loss(dual)).tangent
            with pytest.raises(RuntimeError, match=r"forward_ad; pass impl=.auto"):
                F.kernel_similarity(dual, impl="cpp")
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(found, (gradient * tangent).sum())


@pytest.mark.parametrize("impl", ["torch", "cpp", "reference"])
@pytest.mark.parametrize("loss", [F.collaborative_consistency, F.jensen_shannon])
def test_losses_of_samples_can_be_changed_in_place(loss, impl):
    z = torch.randn(2, 6, 5, requires_grad=True)
    found = loss(z, Y.clamp(max=4), reduction="none", impl=impl)
    found *= torch.arange(6.0)
    found.sum().backward()
    assert not z.grad[:, 0].any() and z.grad[:, 1:].any()


@pytest.mark.parametrize("impl", ["torch", "cpp", "reference"])
def test_another_default_device_changes_nothing(impl):
    z, y = torch.randn(3, 6, 5), Y.clamp(max=4)
    for loss in (F.collaborative_consistency, F.jensen_shannon):
        expected = loss(z, y, impl=impl)
        with torch.device("meta"):
            assert torch.equal(loss(z, y, impl=impl), expected)


class Adapter(nn.Module):
    """As LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.weight = base, base.weight
        self.more = nn.Parameter(torch.randn_like(base.weight))

    def forward(self, x):
        return self.base_layer(x) + nn.functional.linear(x, self.more)


class Wrapper(nn.Module):
    """Of gradient checkpointing, by its name."""

    def __init__(self, module):
        super().__init__()
        self._checkpoint_wrapped_module = module

    def forward(self, x):
        return self._checkpoint_wrapped_module(x)


@pytest.mark.parametrize("around", [Adapter, Wrapper])
def test_an_adapter_around_the_classifier_is_part_of_it(around):
    imcl = build(FlatCNN(), X, dropout=0.0, multilayer_weight=0)
    hooks = len(imcl._handles)
    path = imcl.classifier
    for _ in range(2):  # one around another
        imcl.model.set_submodule(path, around(imcl.model.get_submodule(path)))
        for _ in range(2):
            out = imcl(X, Y)
            alike = out.terms["cross_entropy"], out.terms["output_consistency"]
            torch.testing.assert_close(*alike)
    out = copy.deepcopy(imcl)(X, Y)
    torch.testing.assert_close(out.terms["output_consistency"], alike[0])
    assert len(imcl._handles) == hooks
    imcl.remove_hooks()
    assert not any(module._forward_hooks for module in imcl.model.modules())


def test_a_classifier_that_was_taken_out_is_told_of_by_what_ran():
    imcl = build(FlatCNN(), X, multilayer_weight=0)
    forward = imcl.model.get_submodule(imcl.classifier).forward
    parent, _, name = imcl.classifier.rpartition(".")
    owner = imcl.model.get_submodule(parent)
    delattr(owner, name)
    object.__setattr__(owner, name, forward)
    with pytest.raises(RuntimeError, match="model: expected the layers"):
        imcl(X, Y)


def test_backward_of_tensors_without_values():
    """Memory estimators run a step so."""
    with FakeTensorMode():
        z = torch.randn(6, 5, requires_grad=True)
        for target in (torch.rand(6, 5), torch.randint(5, (6,))):
            z.grad = None
            F.collaborative_consistency([z, 2 * z], target).backward()
            assert z.grad.shape == z.shape


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_saved_may_come_back_in_another_order(impl, pinned):
    """save_on_cpu with pinned memory unpacks contiguous copies."""
    w = torch.nn.Conv2d(3, 64, 3).to(memory_format=torch.channels_last).weight  # the dual form
    x = torch.randn(2, 12, 3, 2).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients(name):
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
            loss = F.kernel_similarity([w], impl=name) + sum(
                F.representation_similarity(x, penalty=penalty, impl=name)
                for penalty in calls.PENALTIES
            )
        return torch.autograd.grad(loss, [w, x])

    torch.testing.assert_close(gradients(impl), gradients("reference"))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_samples_may_come_back_in_another_order(impl):
    """The means of features that lie far from 0 are in the order these lay in."""
    generator = torch.Generator().manual_seed(0)
    level = 1e4 * torch.rand(1, 8, 1, 1, generator=generator)
    x = torch.randn(16, 8, 5, 5, generator=generator) + level
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = x.detach() + torch.randn(x.shape, generator=generator)
    truth = x.detach().double().requires_grad_()
    F.dependence(truth, y.double(), kernel="linear", impl="reference").backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        F.dependence(x, y, kernel="linear", impl=impl).backward()
    assert (x.grad - truth.grad).norm() / truth.grad.norm() < 5e-6


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_losses_of_meta_tensors(impl):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function, x in (LOSSES[name] for name in ("representation", "kernel")):
            x = x.float().to("meta").requires_grad_()
            function(x, impl=impl).backward()
            assert x.grad.shape == x.shape and x.grad.is_meta
        z = HEADS.float().to("meta").requires_grad_()
        loss = F.collaborative_consistency(z, Y.to("meta"), impl=impl)
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and z.grad.shape == z.shape


# The meta device, and torch.func in half precision


def test_on_the_meta_device_the_classifier_is_the_same():
    def network():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 5),
        )  # fmt: skip

    def dense():
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))

    assert IMCL(network(), X).classifier == "8"
    with torch.device("meta"):
        assert IMCL(network(), torch.empty(2, 1, 16, 16)).classifier == "8"
        with pytest.raises(ValueError, match="example_input: expected a device that computes"):
            IMCL(dense(), torch.empty(2, 1, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_average_under_torch_func(dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype)
    gradient = torch.func.grad(lambda x: average(x).float().sum())(x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 16))


def test_vmap_over_targets_too():
    from imcl_fast import functional
    z, y = torch.randn(3, 2, 5, 4), torch.randint(4, (3, 5))
    got = torch.vmap(functional.collaborative_consistency)(z, y)
    each = [functional.collaborative_consistency(*one) for one in zip(z, y, strict=True)]
    torch.testing.assert_close(got, torch.stack(each))
