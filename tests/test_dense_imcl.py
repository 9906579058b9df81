"""IMCL around networks of dense and token outputs, against the objective written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Impl, usable
from test_imcl import TERMS, WAYS_ON, WEIGHTS, only
from torch import nn

from imcl_fast import IMCL, dense_outputs, functional, reference
from imcl_fast.heads import AuxiliaryHead, MapHead, TokenHead
from imcl_fast.layers import trace
from imcl_fast.models import import_torchvision

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_STEP = {"representation_interval": 1, "kernel_interval": 1}
CLASSES = 4


class Segmenter(nn.Module):
    """Like FCN: a backbone of three resolutions, a 1x1 convolution, interpolation."""

    def __init__(self, align_corners=False, head=1, classes=CLASSES):
        super().__init__()
        widths = ((2, 6), (6, 8), (8, 10))
        self.stages = nn.Sequential(
            *[
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in widths
            ]
        )
        self.classifier = nn.Conv2d(10, classes, head, padding=head // 2)
        self.align_corners = align_corners

    def forward(self, x):
        maps = self.classifier(self.stages(x))
        return F.interpolate(
            maps, x.shape[2:], mode="bilinear", align_corners=self.align_corners
        )


class Tagger(nn.Module):
    """A transformer of two layers and a class for each token."""

    def __init__(self, classes=CLASSES, first=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.fc = nn.Linear(8, classes)
        self.first = first

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        padding = None if attention_mask is None else attention_mask == 0
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        logits = self.fc(x)
        return logits.movedim(-1, 1) if self.first else logits


def pixels(dtype=torch.float64, batch=4, size=16):
    """Images of noise in four squares, whose two brightnesses tell the class of their pixels."""
    generator = torch.Generator().manual_seed(0)
    bright = torch.randint(0, 2, (batch, 2, 2, 2), generator=generator)
    x = F.interpolate(2.0 * bright, (size, size), mode="nearest")
    x = x + torch.rand(x.shape, generator=generator)
    y = F.interpolate((bright[:, :1] + 2 * bright[:, 1:]).float(), (size, size), mode="nearest")
    return x.to(dtype), y[:, 0].long()


def tokens(batch=6, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (batch, length), generator=generator)
    return ids, ids % CLASSES


KINDS = {
    "pixels": (Segmenter, pixels, ["stages.0", "stages.1", "stages.2"], "classifier", 1),
    "tokens": (Tagger, tokens, ["blocks.0", "blocks.1"], "fc", -1),
}


def build(kind, dtype=torch.float64, **options):
    make, batch, *_ = KINDS[kind]
    torch.manual_seed(0)
    x, y = batch()
    x = x.to(dtype) if x.is_floating_point() else x
    imcl = IMCL(make().to(dtype), x, **{**WAYS_ON, **EVERY_STEP, "impl": "torch", **options})
    return imcl, x, y


def by_hand(imcl, kind, x, y, ignored=None, seed=3):
    """The objective of a step, from what the network's modules gave, one head after another."""
    *_, layers, classifier, class_dim = KINDS[kind]
    seen, handles = {}, []
    for name in (*layers, classifier):
        handles.append(
            imcl.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: (args[0], output)})
            )
        )
    torch.manual_seed(seed)
    logits = imcl.model(x)
    for handle in handles:
        handle.remove()

    def flat(z):  # (B, K, *samples) -> (samples, K), of those that count
        z = z.movedim(1, -1).reshape(-1, z.shape[1])
        return z if ignored is None else z[(y != ignored).flatten()]

    target = y.flatten() if ignored is None else y[y != ignored]

    def large(maps):
        if kind == "tokens":
            return flat(maps.movedim(-1, 1))
        return flat(F.interpolate(maps, x.shape[2:], mode="bilinear"))

    heads = []
    for name, head in zip(layers[:-1], imcl.heads, strict=True):
        features = seen[name][1]
        if kind == "tokens":
            heads.append(large(features @ head.linear.weight.T + head.linear.bias))
        else:
            weight, bias = head.convolution.weight, head.convolution.bias
            heads.append(large(F.conv2d(features, weight, bias)))
    heads.append(flat(logits.movedim(class_dim, 1)))
    torch.manual_seed(seed)  # nothing else in these networks is random
    last = seen[classifier][0]
    dropped = torch.dropout(last.expand(2, *last.shape), imcl.dropout, True)
    views = [large(imcl.model.get_submodule(classifier)(view)) for view in dropped]

    t = imcl.multilayer_temperature
    teach = 0.0
    for h, z in enumerate(heads):
        others = torch.stack([z for j, z in enumerate(heads) if j != h]).mean(0).detach()
        teach = teach + t**2 * F.kl_div(
            F.log_softmax(z / t, 1), F.softmax(others / t, 1), reduction="batchmean"
        )
    agree = sum(
        F.kl_div(F.log_softmax(a, 1), F.softmax(b.detach(), 1), reduction="batchmean") / 2
        for a, b in (views, views[::-1])
    )
    own = F.cross_entropy(heads[-1], target)
    terms = {
        "cross_entropy": own,
        TERMS["output_weight"]: sum(F.cross_entropy(z, target) for z in views) / 2 + agree,
        TERMS["multilayer_weight"]: sum(F.cross_entropy(z, target) for z in heads[:-1])
        / (len(heads) - 1)
        + teach / len(heads),
        TERMS["representation_weight"]: sum(
            reference.pairwise_penalty(
                [f.movedim(-1, 1) if kind == "tokens" else f],
                penalty="square", center=True, eps=1e-12, batched=True,
            )
            for f in (seen[name][1] for name in layers)
        )
        / len(layers),
        TERMS["kernel_weight"]: reference.pairwise_penalty(
            [
                part
                for path in imcl.kernels
                for part in _rows(imcl.model, path)
            ],
            penalty="square", center=False, eps=1e-12, batched=False,
        ),
    }  # fmt: skip
    return own + sum(getattr(imcl, way) * terms[TERMS[way]] for way in WEIGHTS), terms


def _rows(model, path):
    if path.endswith("in_proj_weight"):  # queries, keys and values
        return model.get_parameter(path).chunk(3)
    return [model.get_submodule(path).weight]


@pytest.mark.parametrize("ignored", [None, 255, -100])
@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_its_definition(kind, impl, ignored):
    usable(Impl(impl, "cpu"))
    imcl, x, y = build(kind, impl=impl, **({} if ignored is None else {"ignore_index": ignored}))
    assert imcl.layers == KINDS[kind][2] and imcl.classifier == KINDS[kind][3]
    assert all(isinstance(h, MapHead if kind == "pixels" else TokenHead) for h in imcl.heads)
    if ignored is not None:
        y = y.masked_fill(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.3,
                          ignored)  # fmt: skip
    twin = copy.deepcopy(imcl)
    torch.manual_seed(3)
    out = imcl(x, y)
    out.loss.backward()
    loss, terms = by_hand(twin, kind, x, y, ignored)
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.terms, terms, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(imcl.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11, msg=name)
    assert torch.equal(out.logits, out.output) and out.logits.shape[KINDS[kind][4]] == CLASSES


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_with_all_four_ways(kind):
    imcl, x, y = build(kind, torch.float32, impl="auto", representation_weight=0.1,
                       kernel_weight=0.1)  # fmt: skip
    optimizer = torch.optim.Adam(imcl.parameters(), lr=0.02)
    losses, own = [], []
    for _ in range(60):
        out = imcl(x, y)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
        own.append(out.terms["cross_entropy"].item())
        assert set(out.terms) == {"cross_entropy", *TERMS.values()}
    assert losses[-1] < 0.7 * losses[0] and own[-1] < 0.7 * own[0]
    assert imcl.eval()(x).shape == imcl.model(x).shape


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_is_as_if_it_were_not_there_and_soft_labels_are_torchs(kind):
    imcl, x, y = build(kind, ignore_index=255)
    y = y.masked_fill(y == 0, 255)
    torch.manual_seed(3)
    loss = imcl(x, y.to(torch.uint8)).loss
    torch.manual_seed(3)
    assert torch.equal(imcl(x, y).loss, loss)
    # Probabilities of all samples: ignore_index is no class of theirs.
    y = y.masked_fill(y == 255, 0)
    torch.manual_seed(3)
    loss = imcl(x, y).loss
    soft = F.one_hot(y, CLASSES).movedim(-1, KINDS[kind][4]).double()
    torch.manual_seed(3)
    torch.testing.assert_close(imcl(x, soft).loss, loss)


@pytest.mark.parametrize("kind", KINDS)
def test_of_labels_the_loss_in_eval_mode_is_the_cross_entropy(kind):
    imcl, x, y = build(kind, ignore_index=2)
    imcl.eval()
    out = imcl(x, labels=y)
    logits = out.logits.movedim(KINDS[kind][4], 1)
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, y, ignore_index=2))
    assert list(out.terms) == ["cross_entropy"]


@pytest.mark.parametrize("kind", KINDS)
def test_watched_it_is_all_but_the_cross_entropy(kind):
    imcl, x, y = build(kind)
    torch.manual_seed(3)
    expected = imcl(x, y)
    torch.manual_seed(3)
    with imcl.watch() as ways:
        logits = imcl.model(x)
    own = F.cross_entropy(logits.movedim(KINDS[kind][4], 1), y)
    torch.testing.assert_close(own + ways.loss(y), expected.loss)
    assert ways.loss().isfinite()  # no target: without cross entropies
    assert TERMS["multilayer_weight"] in ways.terms


@pytest.mark.parametrize("kind", ["pixels", pytest.param("tokens", marks=pytest.mark.slow)])
def test_torch_compile_takes_it_whole(kind):
    torch._dynamo.reset()
    imcl, x, y = build(kind, dropout=0.0)
    compiled = torch.compile(imcl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y).loss, imcl(x, y).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_step(kind):
    imcl, x, y = build(kind, torch.float32)
    torch.manual_seed(3)
    exact = imcl(x, y)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        out = imcl(x, y)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in imcl.parameters() if p.grad is not None)


# Padding


@pytest.mark.parametrize("how", ["attention_mask", "token_mask", "watch"])
def test_token_heads_do_not_see_the_padding(how):
    found = []
    for padded in (8, 20):
        torch.manual_seed(0)
        ids, y = tokens(length=8)
        keep = torch.arange(8) < torch.tensor([8, 6, 4, 3, 2, 1])[:, None]
        ids, y, keep = (F.pad(t * keep, (0, padded - 8)) for t in (ids, y, keep.long()))
        imcl = IMCL(Tagger().double(), {"ids": ids}, **WAYS_ON, **EVERY_STEP, dropout=0.0)
        if how == "attention_mask":
            out = imcl(ids, y, attention_mask=keep)
            loss, terms = out.loss, out.terms
        elif how == "token_mask":
            model = imcl.model
            model.forward = lambda ids, keep=keep, call=model.forward: call(ids, keep)
            out = imcl(ids, y, token_mask=keep.bool())
            loss, terms = out.loss, out.terms
        else:
            with imcl.watch() as ways:
                logits = imcl.model(ids, attention_mask=keep)
            own = F.cross_entropy(logits[keep == 1], y[keep == 1])
            loss, terms = own + ways.loss(y), {"cross_entropy": own.detach(), **ways.terms}
        loss.backward()
        found.append([loss, terms, [p.grad for p in imcl.parameters()]])
        own = F.cross_entropy(imcl.model(ids, keep)[keep == 1], y[keep == 1])
        torch.testing.assert_close(terms["cross_entropy"], own.detach())
    torch.testing.assert_close(found[1], found[0])
    # Evaluation, too, counts what is no padding.
    imcl.eval()
    given = {"token_mask": keep} if how == "token_mask" else {"attention_mask": keep}
    torch.testing.assert_close(imcl(ids, labels=y, **given).loss.detach(),
                               terms["cross_entropy"])  # fmt: skip


class Translator(nn.Module):
    """An encoder-decoder: as many target tokens get classes as the decoder is given."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(
        self, ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None
    ):
        x, y = self.embed(ids), self.embed(decoder_input_ids)
        of_x, of_y = (
            None if mask is None else mask == 0
            for mask in (attention_mask, decoder_attention_mask)
        )
        for block in self.encoder:
            x = block(x, src_key_padding_mask=of_x)
        for block in self.decoder:
            y = block(y, x, tgt_key_padding_mask=of_y, memory_key_padding_mask=of_x)
        return self.fc(y)


LAYERS_OF_BOTH = ["encoder.0", "encoder.1", "decoder.0", "decoder.2"]


def translation(source, target):
    """Of so many tokens, but for padding the same: 8 in the source and 6 in the target."""
    torch.manual_seed(0)
    ids, _ = tokens(length=8)
    given, y = tokens(length=6)
    of_x = torch.arange(8) < torch.tensor([8, 6, 4, 3, 2, 1])[:, None]
    of_y = torch.arange(6) < torch.tensor([1, 2, 6, 3, 2, 5])[:, None]
    batch = {"ids": ids, "attention_mask": of_x.long()}
    batch |= {"decoder_input_ids": given, "decoder_attention_mask": of_y.long()}
    sizes = {"ids": source - 8, "attention_mask": source - 8}
    batch = {name: F.pad(x, (0, sizes.get(name, target - 6))) for name, x in batch.items()}
    return batch, F.pad(y, (0, target - 6))


@pytest.mark.parametrize("watched", [False, True])
def test_the_halves_of_an_encoder_decoder_have_masks_of_their_own(watched):
    found = []
    for source, target in ((8, 6), (12, 6), (8, 20), (20, 20)):
        batch, y = translation(source, target)
        keep = batch["decoder_attention_mask"] == 1
        imcl = IMCL(Translator().double(), batch, LAYERS_OF_BOTH, **WAYS_ON, **EVERY_STEP,
                    dropout=0.0)  # fmt: skip
        assert list(imcl._head_of) == [2]  # the source has no classes
        if watched:
            with imcl.watch() as ways:
                logits = imcl.model(**batch)
            own = F.cross_entropy(logits[keep], y[keep])
            loss, terms = own + ways.loss(y), ways.terms
        else:
            out = imcl(batch, y)
            loss, terms = out.loss, dict(out.terms)
            own = terms.pop("cross_entropy")
        loss.backward()
        expected = F.cross_entropy(imcl.model(**batch)[keep], y[keep])
        torch.testing.assert_close(own.detach(), expected.detach())
        imcl.eval()
        torch.testing.assert_close(imcl(batch, labels=y).loss, expected)
        found.append([loss, terms, [p.grad for p in imcl.parameters()]])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_the_mask_of_a_source_is_none_of_a_target_as_long():
    batch, y = translation(8, 8)
    del batch["decoder_attention_mask"]
    imcl = IMCL(Translator().double(), batch, **WAYS_ON, **EVERY_STEP)
    assert imcl.layers[-1].startswith("decoder")
    own = F.cross_entropy(imcl.model(**batch).movedim(-1, 1), y)
    torch.testing.assert_close(imcl(batch, y).terms["cross_entropy"], own.detach())
    imcl.eval()
    torch.testing.assert_close(imcl(batch, labels=y).loss, own)


@pytest.mark.parametrize("training", [False, True])
def test_a_token_mask_of_another_shape_is_named(training):
    ids, y = tokens()
    imcl = IMCL(Tagger(), {"ids": ids}, **only("output_weight")).train(training)
    imcl(ids, labels=y, token_mask=torch.ones(6, 7))
    for wrong in (torch.ones(6, 6), torch.ones(5, 7), torch.ones(6), torch.ones(6, 7, 1)):
        with pytest.raises(ValueError, match=r"^token_mask: expected shape \(6, 7\), .*logits"):
            imcl(ids, labels=y, token_mask=wrong)
    imcl = IMCL(Tagger(), {"ids": ids}, **WAYS_ON).train(training)
    for wrong in (torch.ones(5, 7), torch.ones(6)):
        with pytest.raises(ValueError, match=r"^token_mask: expected shape \(6, 7\)"):
            imcl(ids, labels=y, token_mask=wrong)


@pytest.mark.parametrize("value", [50.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "head", [AuxiliaryHead(5, 3), TokenHead(5, 3), MapHead(5, 3, 1)], ids=lambda h: type(h).__name__
)
def test_whatever_is_at_a_padded_position(head, value):
    keep = torch.arange(7) < torch.tensor([7, 4, 0])[:, None, None]  # [B, 1, T]
    clean = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = head(clean, keep)
    features = torch.where(keep, clean, value).requires_grad_()
    logits = head(features, keep)
    assert logits.shape == ((3, 3) if isinstance(head, AuxiliaryHead) else (3, 3, 7))
    counts = keep if logits.dim() == 3 else torch.ones(())
    torch.testing.assert_close(logits * counts, expected * counts)
    head.zero_grad()
    logits.sum().backward()
    assert features.grad.isfinite().all() and not features.grad[~keep.expand(3, 5, 7)].any()
    assert all(p.grad.isfinite().all() for p in head.parameters())


# What is found


def interpolated(mode):
    class Other(Segmenter):
        def forward(self, x):
            return F.interpolate(self.classifier(self.stages(x)), x.shape[2:], mode=mode)

    return Other()


class Upsampler(Segmenter):
    """A transposed convolution makes the logits."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.ConvTranspose2d(10, CLASSES, 8, 8)

    def forward(self, x):
        return self.classifier(self.stages(x))


class Scaled(Segmenter):
    """No module's output is the logits, or becomes them."""

    def forward(self, x):
        return {"logits": 2 * super().forward(x)}


class TwoHeads(Segmenter):
    """torchvision's order: an auxiliary classifier that runs after the classifier."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        middle = self.stages[1](self.stages[0](x))
        out = {"out": self.classifier(self.stages[2](middle)), "aux": self.auxiliary(middle)}
        return {name: F.interpolate(z, x.shape[2:], mode="bilinear") for name, z in out.items()}


@pytest.mark.parametrize(
    ("make", "options", "classifier"),
    [
        (Segmenter, {}, "classifier"),
        (lambda: Segmenter(align_corners=True), {}, "classifier"),
        (lambda: interpolated("nearest"), {}, "classifier"),
        (TwoHeads, {"logits": lambda output: output["out"]}, "classifier"),
        (lambda: interpolated("bicubic"), {}, "classifier"),
        (lambda: nn.Sequential(*Segmenter().stages, nn.Conv2d(10, 4, 1)), {}, "3"),
        (lambda: Segmenter(head=3), {}, "classifier"),
        (Upsampler, {}, "classifier"),
        (Scaled, {}, None),
    ],
    ids=["FCN", "corners", "nearest", "two heads", "bicubic", "flat", "3x3", "transposed", "none"],
)
def test_the_classifier_of_maps(make, options, classifier):
    torch.manual_seed(0)
    x, y = pixels(torch.float32)
    network = make().eval()
    if classifier is None:
        with pytest.warns(UserWarning, match="switched off.* output_weight .*a convolution") as t:
            imcl = IMCL(network, x, **WAYS_ON, **options)
        assert len(t) == 1 and imcl.output_weight == 0
    else:
        # A view without dropout is the network's own output, however that was resized.
        alone = IMCL(network, x, **only("output_weight"), dropout=0.0, **options)
        step = 8 if classifier == "3" else 1
        terms = alone(x, y[:, ::step, ::step]).terms
        torch.testing.assert_close(terms["output_consistency"], terms["cross_entropy"])
        imcl = IMCL(network, x, **WAYS_ON, **options)
        assert not {"classifier", "3"} & {*imcl.kernels}  # its rows stand for classes
    assert imcl.classifier == classifier
    assert not {"classifier", "3"} & {*imcl.layers}  # and what it makes is no features


class Segmented(nn.Module):
    """The classes of patches by a linear layer, laid out and interpolated afterwards."""

    def __init__(self):
        super().__init__()
        self.patches = Patches()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = self.patches.blocks(self.patches.patch(x).flatten(2).mT)
        maps = self.fc(tokens).mT.unflatten(2, (x.shape[2] // 4, x.shape[3] // 4))
        return F.interpolate(maps, x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("kind", ["moved", "laid out"])
def test_the_classifier_of_tokens_whose_classes_are_moved(kind):
    torch.manual_seed(0)
    x, y = tokens() if kind == "moved" else pixels(torch.float32)
    imcl = IMCL(Tagger(first=True) if kind == "moved" else Segmented(), x, **WAYS_ON, **EVERY_STEP,
                dropout=0.0)  # fmt: skip
    assert imcl.class_dim == 1 and imcl.classifier == "fc"
    out = imcl(x, y)
    assert set(out.terms) == {"cross_entropy", *TERMS.values()}
    torch.testing.assert_close(out.terms["output_consistency"], out.terms["cross_entropy"])
    torch.testing.assert_close(out.terms["cross_entropy"], F.cross_entropy(imcl.model(x), y))
    if kind == "moved":
        torch.manual_seed(0)
        same = IMCL(Tagger(), x, **WAYS_ON, **EVERY_STEP, dropout=0.0)(x, y)
        torch.testing.assert_close(out.terms, same.terms)


IDS = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(0))


class Permuted(nn.Module):
    """(B, C, T) -> (B, K, T), by a convolution over time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(5, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().movedim(1, -1)).movedim(-1, 1) + 0


@pytest.mark.parametrize(
    ("make", "example", "expected"),
    [
        (Segmenter, pixels(torch.float32)[0], 1),
        (Tagger, IDS, -1),
        (lambda: Tagger(first=True), IDS, 1),  # by the positions of the input
        (lambda: Tagger(classes=7), IDS, -1),  # as many classes as tokens: by the linear layer
        (lambda: Tagger(classes=7, first=True), {"ids": IDS, "labels": IDS}, -1),
        (Permuted, torch.rand(2, 5, 9), 1),
        (lambda: nn.Sequential(nn.Conv1d(5, 4, 3)), torch.rand(2, 5, 9), 1),
        (lambda: nn.Sequential(nn.Linear(5, 4)), torch.rand(2, 9, 5), -1),
        (lambda: nn.Sequential(nn.Linear(5, 9)), torch.rand(2, 9, 5), -1),
        (lambda: nn.Sequential(nn.Linear(5, 4)), torch.rand(2, 5, 5), -1),
        (lambda: nn.Sequential(nn.Linear(5, 4)), torch.rand(2, 3, 3, 5), -1),
    ],
)
def test_where_the_classes_are(make, example, expected):
    network = make()
    assert trace(network, example).class_dim == expected
    assert trace(network, example, class_dim=-expected).class_dim == -expected


def test_labels_in_the_example_tell_where_the_classes_are():
    network = Tagger(first=True)
    labels = IDS % CLASSES
    assert trace(network, {"ids": IDS, "labels": labels}).class_dim == 1
    summed = Tagger(first=True)
    summed.register_forward_hook(lambda module, args, output: output[..., :5] + 0)
    assert trace(summed, {"ids": IDS}).logits is None  # nothing tells
    assert trace(summed, {"ids": IDS, "labels": labels[:, :5]}).class_dim == 1


def autoencoder():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()),
        nn.Conv2d(8, 2, 1),
    )


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (autoencoder, {}, r"\(1, 2, 16, 16\).*as many channels as an input.*class_dim=1"),
        (lambda: nn.Sequential(*autoencoder()[:2], nn.Conv2d(8, 2, 2, 2)), {},
         r"\(1, 2, 8, 8\).*as many channels as an input"),  # an image of another size
        (lambda: nn.Sequential(*autoencoder()[:2], nn.Conv2d(8, 3, 1), nn.Tanh()), {},
         r"\(1, 3, 16, 16\).*no linear layer or convolution computes it.*class_dim=1"),
        (Segmenter, {"criterion": lambda z, y: z.mean()}, "a criterion.*class_dim=1"),
        (lambda: Segmenter(classes=1), {}, "at least 2 classes"),
    ],
)
def test_what_may_be_no_logits_is_taken_for_none_and_said(make, options, why):
    x, y = pixels(torch.float32)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"output_weight and multilayer_weight .*{why}") as told:
        imcl = IMCL(make(), x, **WAYS_ON, **options)
    assert len(told) == 1 and len(imcl.heads) == 0
    if not options:
        for _ in ("train", "eval"):  # with why, and not with what is wrong with the target
            with pytest.raises(ValueError, match=rf"^model: .*{why}.* criterion="):
                imcl(x, labels=y.clamp(max=1))
            imcl.eval()
    if "class_dim" in why:
        on = {**WAYS_ON, "output_weight": 0.0 if "no linear" in why else 1.0}
        imcl = IMCL(make(), x, **on, class_dim=1, **options)
        assert len(imcl.heads)
        assert imcl(x, y.clamp(max=1)).loss.isfinite()
    given = {"input": x, "labels": y.clamp(max=1)}  # labels of pixels tell as well
    if not options and "least" not in why and imcl.model(x).shape[2:] == y.shape[1:]:
        imcl = IMCL(make(), given, **only("multilayer_weight"))
        assert len(imcl.heads)


@pytest.mark.parametrize("channels", [1, 2])
def test_one_label_of_each_pixel(channels):
    """Of grey images, too, which have as many channels."""
    torch.manual_seed(0)
    x, y = pixels()
    network = Segmenter(classes=1).double()
    if channels == 1:
        network.stages[0][0] = nn.Conv2d(1, 6, 3, 2, 1).double()
    x, y = x[:, :channels], (y > 1).double().unsqueeze(1)
    imcl = IMCL(network, x, **WAYS_ON, **EVERY_STEP, activation="sigmoid")
    assert imcl.class_dim == 1 and imcl.classifier == "classifier" and len(imcl.heads) == 2
    out = imcl(x, y)
    own = F.binary_cross_entropy_with_logits(imcl.model(x), y)
    torch.testing.assert_close(out.terms["cross_entropy"], own.detach())
    assert set(out.terms) == {"cross_entropy", *TERMS.values()}
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in imcl.heads.parameters())


class Patches(nn.Module):
    """A transformer on patches whose tokens become a map, perhaps with one more for the class."""

    def __init__(self, patch=4, more=0):
        super().__init__()
        self.patch = nn.Conv2d(2, 8, patch, patch)
        self.token = nn.Parameter(torch.rand(1, more, 8))
        self.blocks = nn.Sequential(
            *[nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(4)]
        )
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        maps = self.patch(x)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), maps.flatten(2).mT], 1)
        seen = self.blocks(tokens)[:, self.token.shape[1] :].mT.unflatten(2, maps.shape[2:])
        return F.interpolate(self.classifier(seen), x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("patch", [1, 4])
def test_tokens_lie_row_by_row(patch):
    torch.manual_seed(0)
    x, y = pixels(torch.float64)
    x, y = x[:, :, :8], y[:, :8]  # no square
    imcl = IMCL(Patches(patch).double(), x, **WAYS_ON, **EVERY_STEP)
    assert imcl.layers == [f"blocks.{i}" for i in range(4)] and imcl.classifier == "classifier"
    seen = []
    for block in imcl.model.blocks[:-1]:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    terms = imcl(x, y).terms
    heads = [
        F.interpolate(head.linear(tokens).mT.unflatten(2, (8 // patch, 16 // patch)),
                      (8, 16), mode="bilinear")
        for head, tokens in zip(imcl.heads, seen, strict=True)
    ]  # fmt: skip
    heads.append(imcl.model(x))
    _, expected = functional.collaborative_consistency(
        heads, y, temperature=imcl.multilayer_temperature, return_terms=True, impl="reference"
    )
    ce, kl = expected["cross_entropy"], expected["kl"]
    torch.testing.assert_close(
        terms["multilayer_consistency"], (ce[:-1].mean() + kl.mean()).detach()
    )
    with pytest.raises(ValueError, match="layers: expected tokens that lie row by row"):
        imcl.model.patch.stride = (8, 4)
        imcl(x, y)


def test_beside_a_class_token_they_get_no_head():
    torch.manual_seed(0)
    x, y = pixels(torch.float32)
    with pytest.warns(UserWarning, match="multilayer_weight .layers: expected one whose positions"):
        imcl = IMCL(Patches(more=1), x, **WAYS_ON, **EVERY_STEP)
    out = imcl(x, y)
    assert out.loss.isfinite()
    assert set(out.terms) == {"cross_entropy", *TERMS.values()} - {TERMS["multilayer_weight"]}


@pytest.mark.parametrize(
    ("count", "size", "cells"),
    [(16, (16, 16), (4, 4)), (8, (8, 16), (2, 4)), (128, (8, 16), (8, 16)), (8, (64,), (8,)),
     (17, (16, 16), None), (9, (16, 16), None), (0, (16, 16), None), (512, (16, 16), None),
     (8, (4, 4, 4), (2, 2, 2)), (4, (16, 4), (4, 1)),
     (2, (16, 4), None)],
)  # fmt: skip
def test_a_grid_has_square_cells(count, size, cells):
    assert dense_outputs.grid(count, size) == cells


def test_an_auxiliary_classifier_is_neither_layer_nor_kernels():
    torch.manual_seed(0)
    x, y = pixels(torch.float32)

    class Residual(TwoHeads):
        def __init__(self):
            super().__init__()
            self.stages[1] = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
            self.auxiliary = nn.Sequential(nn.Conv2d(8, 9, 3, padding=1), nn.ReLU(),
                                           nn.Conv2d(9, CLASSES, 1))  # fmt: skip

    imcl = IMCL(Residual(), x, **WAYS_ON, logits=lambda output: output["out"])
    assert imcl.layers == ["stages.1", "stages.2"] and imcl.classifier == "classifier"
    assert "auxiliary.2" not in imcl.kernels
    assert imcl(x, y).loss.isfinite()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(class_dim=2), ValueError, "class_dim: expected 1, -1 or None, got 2"),
        (dict(class_dim=True), ValueError, "class_dim: expected 1, -1 or None, got True"),
        (dict(ignore_index=0.5), TypeError, "ignore_index: expected an int"),
        (dict(classifier="stages.0.0"), ValueError, "classifier: .*a convolution.*'stages.0.0'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        IMCL(Segmenter(), pixels(torch.float32)[0], **change)


def test_targets_that_do_not_fit_are_named():
    imcl, x, y = build("pixels")
    with pytest.raises(ValueError, match=r"target: expected class indices \(4, 16, 16\), or prob.*"
                       r"\(4, 4, 16, 16\).* dimension 1, got shape \(4, 16\)"):  # fmt: skip
        imcl(x, y[:, 0])
    imcl, x, y = build("tokens", class_dim=1)
    with pytest.raises(ValueError, match="target: .*pass class_dim=-1"):
        imcl(x, y)


def test_the_labels_of_a_causal_language_model_are_refused():
    import_torchvision()  # which transformers looks for
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    imcl = IMCL(transformers.GPT2LMHeadModel(config), {"input_ids": IDS}, dropout=0.0)
    with pytest.raises(ValueError, match="labels: a causal language model .*target="):
        imcl(input_ids=IDS, labels=IDS)
    shifted = F.pad(IDS[:, 1:], (0, 1), value=-100)
    imcl.model.eval()
    out = imcl(input_ids=IDS, target=shifted)
    own = imcl.model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(out.terms["cross_entropy"], own.detach())


@pytest.mark.parametrize("training", [True, False])
def test_a_token_mask_goes_before_the_network_s_own(training):
    ids, y = tokens()
    keep = torch.arange(7) < torch.tensor([7, 6, 4, 3, 2, 1])[:, None]
    imcl = IMCL(
        Tagger().double(), {"ids": ids}, ["blocks.0"], 0, 0, 10, 0, center=False, **EVERY_STEP
    ).train(training)
    seen = []
    imcl.model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    every = torch.ones_like(ids)
    terms = imcl(ids, y, token_mask=keep, attention_mask=every).terms
    logits = imcl.model(ids, every)
    torch.testing.assert_close(
        terms["cross_entropy"], F.cross_entropy(logits[keep], y[keep]).detach()
    )
    if training:
        expected = functional.representation_similarity(seen[0].movedim(-1, 1), mask=keep)
        torch.testing.assert_close(terms["representation_similarity"], expected.detach())


def test_other_parts_of_one_memory_are_not_the_same():
    x = torch.rand(4, 4)
    assert (
        dense_outputs.is_same(x[:, :2], x[:, :2])
        and not dense_outputs.is_same(x[:, :2], x[:, 2:])
        and not dense_outputs.is_same(x, x.T)
    )


def test_classes_are_where_convolutions_of_as_many_dimensions_have_them():
    for shape, ranks, expected in (
        ((2, 5, 3), {2}, -1),
        ((2, 5, 3), {1}, 1),
        ((2, 5, 3, 4), {1}, -1),
        ((2, 5, 3, 4), {2}, 1),
        ((2, 5, 3), set(), -1),
    ):
        assert dense_outputs.class_dim(torch.empty(shape), [], [], None, ranks) == expected


def test_a_layer_of_as_many_channels_as_classes_that_goes_on_is_no_rival():
    x, inner, logits, aside = (torch.rand(2, 3, 4, 4) for _ in range(4))
    outputs = {"inner": inner, "fc": logits, "aside": aside}
    assert dense_outputs.rivals(logits, outputs, ["inner", "aside"], [x, inner], 1) == {"aside"}


def test_under_a_criterion_labels_that_hold_or_not_do_not_make_logits_of_maps():
    options = dict(criterion=lambda output, y: output.mean(), activation="sigmoid")
    with pytest.warns(UserWarning, match="is taken for no logits, for there is a criterion"):
        imcl = IMCL(Segmenter(), torch.rand(2, 2, 16, 16), **options)
    assert imcl.classifier is None and imcl.class_dim is None


def test_under_a_criterion_logits_that_are_named_are_logits():
    options = dict(criterion=lambda output, y: output.mean(), logits=lambda output: output)
    imcl = IMCL(Segmenter(), torch.rand(2, 2, 16, 16), **options)
    assert imcl.classifier == "classifier" and imcl.class_dim == 1 and len(imcl.heads)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_maps_are_resized_as_the_network_resizes_them(mode, align_corners):
    net = Segmenter()
    net.forward = lambda x: F.interpolate(
        net.classifier(net.stages(x)), x.shape[2:], mode=mode, align_corners=align_corners
    )
    imcl = IMCL(net, torch.rand(2, 2, 24, 24))
    assert imcl.classifier == "classifier"
    assert imcl._resize.align_corners is align_corners


def test_half_maps_that_are_interpolated_in_float32():
    net = Segmenter().bfloat16()
    net.forward = lambda x: F.interpolate(
        net.classifier(net.stages(x)).float(), x.shape[2:], mode="bilinear"
    )
    imcl = IMCL(net, torch.rand(2, 2, 16, 16).bfloat16())
    assert imcl.classifier == "classifier"


def test_heads_of_volumes_are_interpolated_along_all_three():
    class Volumes(nn.Sequential):
        def forward(self, x):
            return F.interpolate(super().forward(x), x.shape[2:], mode="trilinear")

    layers = [nn.Sequential(nn.Conv3d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((1, 5), (5, 6))]
    x, y = torch.rand(2, 1, 8, 8, 8), torch.zeros(2, 8, 8, 8, dtype=torch.int64)
    imcl = IMCL(Volumes(*layers, nn.Conv3d(6, CLASSES, 1)), x)
    assert imcl.layers == ["0", "1"] and imcl.classifier == "2"
    assert imcl(x, y).loss.isfinite()


def test_logits_have_the_positions_of_tokens_that_are_numbers():
    logits, tokens = torch.rand(2, 9, 4), torch.rand(2, 9, 5)
    assert dense_outputs.class_dim(logits, [], [tokens], None, {1}) == -1
    assert dense_outputs.class_dim(logits.mT, [], [tokens], None, set()) == 1


def test_what_is_sparse_shares_no_memory():
    dense, sparse = torch.eye(3), torch.eye(3).to_sparse()
    assert not dense_outputs.share_memory(sparse, dense)
    assert not dense_outputs.share_memory(dense, sparse)
    assert dense_outputs.share_memory(dense, dense[1:])


def test_any_number_but_0_marks_a_token_that_counts():
    ids, y = torch.randint(20, (3, 6)), torch.randint(CLASSES, (3, 6))
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    imcl = IMCL(Tagger(), ids, dropout=0.0, **EVERY_STEP)
    expected = imcl(ids, y, token_mask=mask)
    numbers = mask.long() * torch.tensor([[1], [2], [7]])
    torch.testing.assert_close(imcl(ids, y, token_mask=numbers).loss, expected.loss)


@pytest.mark.parametrize("class_dim", [None, -1])
def test_labels_of_a_causal_model_under_a_criterion(class_dim):
    ids, model = torch.randint(20, (3, 6)), Tagger()
    model.loss_type = "ForCausalLM"
    imcl = IMCL(
        model, ids, output_weight=0, multilayer_weight=0, class_dim=class_dim,
        criterion=lambda output, y: F.cross_entropy(output.mT, y),
    )  # fmt: skip
    if class_dim is None:
        assert imcl(ids, labels=ids % CLASSES).loss.isfinite()
    else:
        with pytest.raises(ValueError, match="^labels: a causal language model"):
            imcl(ids, labels=ids % CLASSES)
