"""Padded positions count for nothing: in the functional, and in the ways of an IMCL."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from bounds import unit
from conftest import Impl, leaf, usable
from test_imcl import TERMS, WAYS_ON, only
from torch import nn

import imcl_fast
from imcl_fast import IMCL, calls, functional, padding, reference
from imcl_fast.models import import_torchvision

LENGTHS = (10, 7, 5, 0)  # of the samples; the last is padding only
CHANNELS = 6


def features(dtype=torch.float64, length=10, padded=None, seed=0):
    """(B, C, T) as tokens lie, (B, T, C); where there is padding, something large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(LENGTHS), length, CHANNELS, generator=generator, dtype=torch.float64)
    x[:, :, 2] = 0  # a dead channel
    x[:, :, 3] = 4.0  # and a constant one
    x[:, :, 1] = 3 * x[:, :, 0] + 0.1 * x[:, :, 1]
    if padded is not None:
        rest = 50 + 9 * torch.randn(len(LENGTHS), padded - length, CHANNELS, dtype=torch.float64)
        x = torch.cat([x, rest], 1)
    return x.to(dtype).movedim(-1, 1)


def mask(length, dtype=torch.bool):
    return (torch.arange(length) < torch.tensor(LENGTHS)[:, None]).to(dtype)


def by_hand(x, center, penalty):
    """Each sample alone, its padding cut off."""
    total = x.new_zeros(())
    for sample, length in zip(x, LENGTHS, strict=True):
        if length:
            total = total + reference.pairwise_penalty(
                [sample[None, :, :length]], penalty=penalty, center=center, eps=1e-12, batched=True
            )
    return total / len(x)


@pytest.mark.parametrize("penalty", calls.PENALTIES)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("name", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("padded", [10, 40, 160])
def test_a_mask_cuts_the_padding_off(name, center, penalty, padded):
    usable(Impl(name, "cpu"))
    x = leaf(features(padded=padded))
    before = x.detach().clone()
    options = dict(center=center, penalty=penalty, impl=name)
    for kind in (torch.bool, torch.int64, torch.uint8):
        loss = functional.representation_similarity(x, mask=mask(padded, kind), **options)
        truth = by_hand(x, center, penalty)
        torch.testing.assert_close(loss, truth, rtol=1e-11, atol=1e-13)
    (gradient,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(truth, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)
    assert not gradient.movedim(1, -1)[~mask(padded)].any()  # exactly 0
    assert torch.equal(x, before)
    unmasked = functional.representation_similarity(x, **options)
    assert (unmasked - loss).abs() > 1e-3


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_a_gradient_beside_a_mask_lies_as_the_features_do(impl, center):
    mask = torch.rand(2, 7, 8) > 0.3
    masks = [mask, mask.mT.contiguous().mT, mask.long().mT.contiguous().mT]
    for layout, mask in itertools.product((torch.contiguous_format, torch.channels_last), masks):
        x = torch.randn(2, 16, 7, 8).to(memory_format=layout).requires_grad_()
        loss = functional.representation_similarity(x, mask=mask, center=center, impl=impl)
        (g,) = torch.autograd.grad(loss, x)
        assert g.stride() == x.stride()



@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center", [True, False])
def test_masks_in_lower_precision(dtype, center):
    x = leaf(features(dtype, padded=40))
    loss = functional.representation_similarity(x, mask=mask(40), center=center)
    loss.backward()
    wide = leaf(x.detach().double())
    truth = by_hand(wide, center, "square")
    (expected,) = torch.autograd.grad(truth, wide)
    assert loss.dtype == torch.float32 and x.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), truth, rtol=64 * unit(dtype), atol=0)
    assert (x.grad.double() - expected).norm() <= 64 * unit(dtype) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("level", "spread"), [(1, 0.008), (10, 0.1), (30, 0.5)])
def test_a_mask_is_exact_about_a_large_mean(dtype, level, spread):
    """What is filled in must have the mean of the others, not that rounded to their dtype."""
    generator = torch.Generator().manual_seed(0)
    x = (level + spread * torch.randn(4, 8, 64, generator=generator)).to(dtype)
    keep = torch.zeros(4, 64, dtype=torch.bool)
    keep[:, :16] = True
    masked, cut = leaf(x), leaf(x[:, :, :16].double())
    functional.representation_similarity(masked, mask=keep, center=True).backward()
    functional.representation_similarity(cut, center=True, impl="reference").backward()
    error = masked.grad[:, :, :16].double() - cut.grad
    assert error.norm() <= (2 * unit(dtype) + 2e-3) * cut.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["reference", "torch", "cpp"])
def test_padding_makes_no_channel_dead(name, dtype):
    """However much of it there is; a constant channel is dead with it too."""
    usable(Impl(name, "cpu"))
    generator = torch.Generator().manual_seed(0)
    x = (1 + 1e-4 * torch.randn(2, 6, 4096, generator=generator)).to(dtype)
    x[:, 2], x[:, 3] = 0.3, 0.0
    keep = torch.zeros(2, 4096, dtype=torch.bool)
    keep[:, :8] = True
    masked, cut = leaf(x), leaf(x[:, :, :8].double())
    loss = functional.representation_similarity(masked, mask=keep, center=True, impl=name)
    truth = functional.representation_similarity(cut, center=True, impl="reference")
    assert truth > 0.05
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)
    (g,), (expected,) = torch.autograd.grad(loss, masked), torch.autograd.grad(truth, cut)
    assert not g[:, 2:4].any() and not g[..., 8:].any()
    assert (g[..., :8].double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("mask_value", [float("nan"), float("inf")])
def test_whatever_is_at_a_padded_position(mask_value):
    x = features(padded=12)
    expected = functional.representation_similarity(x, mask=mask(12), center=True)
    x = leaf(x.masked_fill(~mask(12)[:, None], mask_value))
    loss = functional.representation_similarity(x, mask=mask(12), center=True)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert x.grad.isfinite().all()


def test_a_mask_per_layer_and_one_for_all():
    a, b = features(), torch.rand(4, 3, 5, 5)
    of_pixels = torch.rand(4, 5, 5) > 0.5
    loss = imcl_fast.RepresentationSimilarityLoss(center=True)
    expected = (loss(a, mask=mask(10)) + loss(b, mask=of_pixels)) / 2
    torch.testing.assert_close(loss([a, b], mask=[mask(10), of_pixels]).float(), expected.float())
    expected = (loss(a) + loss(b, mask=of_pixels)) / 2
    torch.testing.assert_close(loss([a, b], mask=[None, of_pixels]).float(), expected.float())
    torch.testing.assert_close(loss([a, a], mask=mask(10)), loss(a, mask=mask(10)))
    empty = features()[:0]
    for name in ("torch", "reference"):
        none = functional.representation_similarity(empty, mask=mask(10)[:0], impl=name)
        assert none == 0


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (mask(10).double(), TypeError, "mask: expected bools or integers.*float64"),
        (mask(10)[:2], ValueError, r"mask: expected shape \(4, 10\), .*got \(2, 10\)"),
        ([mask(10), mask(10)], ValueError, "mask: expected one Tensor or 1, one per layer, got 2"),
        ([[1]], TypeError, r"mask\[0\]: expected a Tensor or None, got list"),
        (3, TypeError, "mask: expected a Tensor or a sequence"),
        (mask(10).to("meta"), ValueError, "mask: expected a Tensor on cpu"),
    ],
)
def test_wrong_masks_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        functional.representation_similarity(features(), mask=wrong)


# In IMCL


class Reader(nn.Module):
    """A token classifier in which padding is visible in the features, but not in the logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        keep = torch.ones_like(ids) if attention_mask is None else attention_mask
        keep = keep.to(x.dtype).unsqueeze(-1)
        return self.fc((x * keep).sum(1) / keep.sum(1))


def batch(padded):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (3, 10), generator=generator)
    keep = torch.arange(10) < torch.tensor([10, 6, 4])[:, None]
    ids = F.pad(ids * keep, (0, padded - 10))
    return ids, F.pad(keep.long(), (0, padded - 10)), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("how", ["attention_mask", "token_mask", "watch", "watch token_mask"])
@pytest.mark.parametrize("center", [True, False])
def test_the_ways_do_not_see_the_padding(how, center):
    found = []
    for padded in (10, 40, 160):
        torch.manual_seed(0)
        ids, keep, y = batch(padded)
        imcl = IMCL(Reader().double(), {"ids": ids}, **WAYS_ON, dropout=0.0, center=center,
                    kernels=["blocks.0.0"])  # fmt: skip
        assert len(imcl.layers) == 4
        if how == "attention_mask":
            out = imcl(ids, y, attention_mask=keep)
            loss, terms = out.loss, out.terms
        elif how == "token_mask":
            imcl.model.forward = lambda ids, keep=keep, call=imcl.model.forward: call(ids, keep)
            out = imcl(ids, y, token_mask=keep.bool())
            loss, terms = out.loss, out.terms
        else:
            given = {"attention_mask": keep}
            with imcl.watch(token_mask=keep if "token" in how else None) as ways:
                logits = imcl.model(ids, **given) if how == "watch" else imcl.model(ids, keep)
            loss, terms = F.cross_entropy(logits, y) + ways.loss(y), ways.terms
        loss.backward()
        found.append([loss, terms, [p.grad for p in imcl.parameters()]])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    ids, keep, y = batch(160)
    counted = imcl.model.blocks[0](imcl.model.embed(ids)).movedim(-1, 1)
    assert counted.isfinite().all()
    without = IMCL(Reader().double(), {"ids": ids}, **only("representation_weight"), center=center)
    without.model.load_state_dict(imcl.model.state_dict())
    term = TERMS["representation_weight"]
    assert abs(without(ids, y).terms[term] - found[2][1][term]) > 1e-3


def test_a_mask_that_fits_no_layer():
    class Pooled(Reader):
        def forward(self, ids, attention_mask=None):
            x = self.embed(ids)[:, ::2]
            for block in self.blocks:
                x = x + block(x)
            return self.fc(x.mean(1))

    ids, keep, y = batch(10)
    imcl = IMCL(Pooled(), {"ids": ids}, **only("representation_weight"))
    with pytest.raises(ValueError, match=r"token_mask: expected shape \(3, 5\), .*got \(3, 10\)"):
        imcl(ids, y, token_mask=keep)
    expected = imcl(ids, y).loss
    with pytest.warns(UserWarning, match="attention_mask: .*'blocks.0'.*its padding") as told:
        for _ in range(2):
            assert torch.equal(imcl(ids, y, attention_mask=keep).loss, expected)
    assert len(told) == 1
    assert torch.equal(imcl(ids, y, token_mask=keep[:, ::2]).loss,
                       imcl(ids, y, token_mask=keep[:, ::2].bool()).loss)  # fmt: skip


def test_a_bert_batch_is_the_same_at_any_padding():
    import_torchvision()  # which transformers looks for
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    terms = []
    for padded in (10, 40, 160):
        ids, keep, y = batch(padded)
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        imcl = IMCL(model, {"input_ids": ids, "attention_mask": keep}, dropout=0.0)
        terms.append(imcl(input_ids=ids, attention_mask=keep, labels=y).terms)
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms[2], terms[0], rtol=1e-4, atol=1e-6)


def test_the_mean_of_no_positions_is_0():
    mask = torch.zeros(2, 1, 3, dtype=torch.bool)
    assert torch.equal(padding.mean(torch.zeros(2, 4, 3), mask), torch.zeros(2, 4))


def test_a_norm_that_overflows_makes_no_channel_dead():
    features = 1e20 + 1e18 * torch.randn(1, 2, 4)  # whose squares are no float32
    mask = torch.tensor([[[True, True, True, False]]])
    assert padding.neutral(features, mask, True)[0, :, :3].all()


@pytest.mark.parametrize("center", [True, False])
def test_eps_draws_the_line_beside_a_mask_too(center):
    x = features(padded=40)
    expected = functional.representation_similarity(x, mask=mask(40), center=center)
    dead = functional.representation_similarity(x, mask=mask(40), center=center, eps=1e3)
    assert expected > 0 and dead == 0


def test_the_module_hands_the_mask_on():
    x = features(padded=40)
    got = imcl_fast.RepresentationSimilarityLoss(center=True)(x, mask=mask(40))
    expected = functional.representation_similarity(x, mask=mask(40), center=True)
    assert got == expected != functional.representation_similarity(x, center=True)
