"""``IMCL`` of K labels that each hold or not: ``activation="sigmoid"``."""

import pytest
import torch
from test_imcl import FlatCNN, build
from torch.nn import functional as F

from imcl_fast import IMCL

X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = (torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) > 0.7).double()
SOFT = torch.rand(6, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def multi_label(**options):
    torch.manual_seed(0)
    return build(FlatCNN().double(), X, activation="sigmoid", **options)


def bce(logits, y):
    """Summed over the labels."""
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(logits)


def binary_kl(teacher, logits):
    """KL((q, 1 - q) || (p, 1 - p)) of logits, summed over labels, averaged over samples."""
    q, gap = torch.sigmoid(teacher), F.logsigmoid(teacher) - F.logsigmoid(logits)
    other = F.logsigmoid(-teacher) - F.logsigmoid(-logits)
    return (q * gap + (1 - q) * other).sum() / len(logits)


@pytest.mark.parametrize("y", [LABELS, SOFT], ids=["labels", "probabilities"])
def test_the_objective_is_its_definition(y):
    imcl = multi_label(dropout=0.0, representation_weight=0.0, kernel_weight=0.0,
                       output_weight=0.7, multilayer_weight=1.3)  # fmt: skip
    seen = {}
    for path in imcl.layers[:-1]:
        imcl.model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.update({path: output})
        )
    out = imcl(X, y)
    z = [head(seen[path]) for head, path in zip(imcl.heads, imcl.layers, strict=False)]
    z.append(out.logits)
    assert len(z) == len(imcl.layers) > 2
    t = imcl.multilayer_temperature
    kl = torch.stack([
        t * t * binary_kl(
            torch.stack([b for b in z if b is not a]).mean(0).detach() / t, a / t
        )
        for a in z
    ]).mean()  # fmt: skip
    multilayer = torch.stack([bce(a, y) for a in z[:-1]]).mean() + kl
    own = bce(out.logits, y)
    expected = own + 0.7 * own + 1.3 * multilayer  # the views are equal without dropout
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.terms["cross_entropy"], own.detach())
    torch.testing.assert_close(out.terms["multilayer_consistency"], multilayer.detach())
    parameters = list(imcl.parameters())
    got = torch.autograd.grad(out.loss, parameters, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_views_that_differ_are_drawn_together():
    """Their KL is that of two sigmoids, which no softmax over the labels has."""
    torch.manual_seed(0)
    imcl = multi_label(dropout=0.4)
    term = imcl(X, LABELS).terms["output_consistency"]
    torch.manual_seed(0)
    softmax = build(FlatCNN().double(), X, dropout=0.4)
    assert term > 0 and abs(term - softmax(X, LABELS).terms["output_consistency"]) > 1e-3


def test_of_labels_the_loss_in_eval_mode_is_the_cross_entropy():
    imcl = multi_label().eval()
    out = imcl(X, labels=LABELS)
    torch.testing.assert_close(out.loss, bce(out.logits, LABELS))
    assert list(out.terms) == ["cross_entropy"]


def test_it_learns_with_all_four_ways():
    imcl = multi_label()
    imcl.float()
    x, y = X.float(), LABELS.float()
    optimizer = torch.optim.Adam(imcl.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        out = imcl(x, y)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.terms["cross_entropy"]))
    assert len(out.terms) == 5
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_torch_compile_takes_it_whole():
    imcl = multi_label(dropout=0.0)
    expected = imcl(X, LABELS).loss
    compiled = torch.compile(imcl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, LABELS).loss, expected)


def test_what_can_be_wrong_is_named():
    with pytest.raises(TypeError, match=r"target: .*sigmoid, got torch.int64; .*\.float\(\)"):
        multi_label()(X, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="activation: expected one of softmax, sigmoid, got 'tan"):
        IMCL(FlatCNN().double(), X, activation="tanh")
