"""timm's networks, optimizer, moving average and checkpointing around an IMCL."""

import copy

import pytest
import torch

from imcl_fast import IMCL
from imcl_fast.models import import_torchvision

import_torchvision()
timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

Y = torch.tensor([0, 2])


def vit(**options):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=4, num_heads=2, num_classes=3, **options
    )


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_layer_decay_finds_its_layers_and_the_heads_learn():
    model = vit()
    imcl = IMCL(model, images())
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.5**i for i in range(6)}  # the stem, four blocks and the classifier
    optimizer.add_param_group({"params": imcl.heads.parameters()})
    before = [p.detach().clone() for p in imcl.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        imcl(images(), Y).loss.backward()
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(imcl.parameters(), before, strict=True))


def test_an_optimizer_of_the_whole():
    imcl = IMCL(vit(), images())
    optimizer = create_optimizer_v2(imcl, opt="sgd", lr=0.1, weight_decay=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in imcl.parameters()}


def test_a_moving_average_of_the_whole_and_of_the_network():
    imcl = IMCL(vit(), images(), dropout=0.0)
    whole, alone = ModelEmaV3(imcl, decay=0.5), ModelEmaV3(imcl.model, decay=0.5)
    with torch.no_grad():
        for p in imcl.parameters():
            p.add_(0.1)
    whole.update(imcl)
    alone.update(imcl.model)
    torch.testing.assert_close(whole.module.model.state_dict(), alone.module.state_dict())
    assert whole.module(images(), Y).loss.isfinite()


def test_gradient_checkpointing_changes_nothing():
    found = []
    for on in (False, True):
        model = vit()
        model.set_grad_checkpointing(on)
        torch.manual_seed(1)
        imcl = IMCL(model, images(), dropout=0.0)
        out = imcl(images(), Y)
        out.loss.backward()
        found.append([out.terms, [p.grad for p in imcl.parameters()]])
    torch.testing.assert_close(found[1], found[0])


def test_a_distilled_network_in_training():
    torch.manual_seed(0)
    model = timm.models.deit.VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=12, depth=4, num_heads=2, num_classes=3
    )
    imcl = IMCL(copy.deepcopy(model), images())
    assert imcl.classifier in (None, "head")
    assert imcl.layers == [f"blocks.{i}" for i in range(4)]
    assert not {"head", "head_dist"} & set(imcl.kernels)
    imcl.model.set_distilled_training(True)  # logits of two classifiers, of which the first counts
    out = imcl(images(), Y)
    assert out.logits is out.output[0] and len(out.output) == 2
    out.loss.backward()
