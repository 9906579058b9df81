"""IMCL around models that take more than a Tensor, and return more than logits."""

import copy
import inspect
import io
from collections import OrderedDict, UserDict, namedtuple
from types import MethodType, SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from test_imcl import WAYS_ON, FlatCNN, build, step
from torch import nn

from imcl_fast import IMCL, outputs

Named = namedtuple("Named", ("features", "logits"))
X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 5])


class Returning(FlatCNN):
    """Its logits in what ``pack`` makes of them."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        return self.pack(super().forward(x))


class TakingTwo(FlatCNN):
    """Of two inputs, the second under the first's name or not at all."""

    def forward(self, pixels, scale=None, *, shift=0.0):
        x = pixels if scale is None else pixels * scale
        return super().forward(x + shift)


def network(pack):
    torch.manual_seed(0)
    return Returning(pack).train()


PACKED = {
    "an attribute": (lambda z: SimpleNamespace(logits=z, loss=None), None),
    "a key": (lambda z: {"logits": z}, None),
    "a model output": (lambda z: OrderedDict(loss=z.sum(), logits=z), None),
    "a tuple's first": (lambda z: (z, z + 1), None),
    "a list's first": (lambda z: [z], None),
    "a named tuple": (lambda z: Named(z + 1, z), None),
    "a callable": (lambda z: {"out": z, "aux": z + 1}, lambda output: output["out"]),
}


@pytest.mark.parametrize("kind", PACKED)
def test_logits_are_found_in(kind):
    pack, logits = PACKED[kind]
    expected, gradients = step(build(network(lambda z: z), X), X, Y)
    imcl = build(network(pack), X, logits=logits)
    assert imcl.classifier == "fc"
    out, found = step(imcl, X, Y)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)
    assert list(out.terms) == list(expected.terms)
    torch.testing.assert_close(found, gradients, rtol=0, atol=0)
    # Without a target it is the model's own output, whatever that is.
    assert type(imcl(X)) is type(imcl.model(X)) is type(out.output)


def test_an_output_without_logits_is_named_with_what_to_do():
    imcl = build(network(lambda z: {"logits": z}), X, **dict.fromkeys(WAYS_ON, 0.0))
    imcl.model.pack = lambda z: {"out": z, "aux": z}
    with pytest.raises(TypeError, match=r"logits: .*got dict of 'out', 'aux'; .*logits=lambda"):
        imcl(X, Y)
    with pytest.raises(TypeError, match="logits: expected the callable to return a Tensor, got"):
        IMCL(network(lambda z: z), X, logits=lambda output: None)
    for name in ("logits", "criterion"):
        with pytest.raises(TypeError, match=f"{name}: expected a callable or None, got str"):
            IMCL(network(lambda z: z), X, **{name: "out"})


@pytest.mark.parametrize(
    ("example", "given", "kwargs"),
    [
        (X, X, {"scale": torch.tensor(2.0), "shift": 0.5}),
        ((X, torch.tensor(2.0)), (X, torch.tensor(2.0)), {"shift": 0.5}),
        (
            {"pixels": X, "scale": torch.tensor(2.0)},
            {"pixels": X, "scale": torch.tensor(2.0), "shift": 0.5},
            {},
        ),
        ({"pixels": X}, UserDict(pixels=X, scale=torch.tensor(2.0)), {"shift": 0.5}),
        ({"pixels": X}, None, {"pixels": X, "scale": torch.tensor(2.0), "shift": 0.5}),
    ],
    ids=["keywords", "a tuple", "a dict", "another mapping", "keywords alone"],
)
def test_a_model_is_called_with(example, given, kwargs):
    torch.manual_seed(0)
    model = TakingTwo()
    plain = copy.deepcopy(model)
    imcl = build(model, example)
    args = () if given is None else (given,)
    expected = plain(X, torch.tensor(2.0), shift=0.5)
    assert torch.equal(imcl(*args, **kwargs), expected)
    assert torch.equal(imcl(*args, target=Y, **kwargs).logits, expected)
    if given is not None:
        assert torch.equal(imcl(given, Y, **kwargs).logits, expected)


def test_labels_are_the_target_by_another_name_and_no_input():
    torch.manual_seed(0)
    model = TakingTwo()
    batch = {"pixels": X, "labels": Y}
    imcl = build(model, batch)  # a batch as it comes from the loader
    expected, gradients = step(imcl, X, Y)
    for call in (
        lambda: imcl(**batch),
        lambda: imcl(batch),
        lambda: imcl(X, labels=Y),
        lambda: imcl(**{**batch, "labels": Y.flip(0)}, target=Y),
    ):
        imcl.zero_grad()
        torch.manual_seed(3)
        out = call()
        out.loss.backward()
        assert torch.equal(out.loss, expected.loss)
        torch.testing.assert_close(
            {name: p.grad for name, p in imcl.named_parameters()}, gradients, rtol=0, atol=0
        )
    assert "labels" in batch


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_of_labels_the_loss_in_eval_mode_is_the_cross_entropy(smoothing):
    imcl = build(network(lambda z: z), X, label_smoothing=smoothing).eval()
    out = imcl(X, labels=Y)
    expected = F.cross_entropy(out.logits, Y, label_smoothing=smoothing)
    torch.testing.assert_close(out.loss, expected)
    assert list(out.terms) == ["cross_entropy"]
    torch.testing.assert_close(out.terms["cross_entropy"], expected.detach())
    # As before, a target gives the objective in every mode.
    assert imcl(X, Y).loss > out.loss
    out.loss.backward()
    assert imcl.model.fc.weight.grad.abs().sum() > 0


def test_an_output_is_also_the_tuple_of_loss_and_logits():
    out = build(network(lambda z: z), X)(X, Y)
    assert out[0] is out.loss and out[1] is out.logits and out[1:] == (out.logits,)
    with pytest.raises(IndexError):
        out[2]


def test_layers_may_return_tuples():
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), "attention"

    torch.manual_seed(0)
    model = FlatCNN()
    expected, gradients = step(build(copy.deepcopy(model), X), X, Y)
    stages = [Pair(*model.features[i : i + 3]) for i in (0, 4, 8)]

    class Paired(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages, self.fc, self.pool = nn.ModuleList(stages), model.fc, nn.MaxPool2d(2)

        def forward(self, x):
            for stage in self.stages:
                x = self.pool(stage(x)[0])
            return self.fc(x.mean((2, 3)))

    imcl = build(Paired(), X)
    assert imcl.layers == ["stages.0", "stages.1", "stages.2"]
    out, found = step(imcl, X, Y)
    assert torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(list(found.values()), list(gradients.values()), rtol=0, atol=0)


def test_the_signature_shows_what_the_model_takes():
    imcl = build(TakingTwo(), {"pixels": X})
    names = list(inspect.signature(imcl.forward).parameters)
    assert names == [
        "x", "target", "labels", "token_mask", "pixels", "scale", "shift", "kwargs",
    ]  # fmt: skip
    twin = copy.deepcopy(imcl)
    assert twin.forward.__self__ is twin and imcl.forward.__self__ is imcl
    with torch.no_grad():
        twin.model.fc.bias.add_(1)
    torch.testing.assert_close(twin(X), imcl(X) + 1)
    file = io.BytesIO()
    torch.save(imcl, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X), imcl(X)) and loaded.forward.__self__ is loaded
    assert list(inspect.signature(loaded.forward).parameters) == names
    with pytest.raises(RuntimeError, match="nn.DataParallel"):
        imcl._replicate_for_data_parallel()(X, Y)
    torch._dynamo.reset()
    compiled = torch.compile(imcl.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels=X, target=Y).loss, imcl(X, Y).loss)
    assert list(inspect.signature(build(TakingTwo(), X).forward).parameters) == [
        "x", "target", "labels", "token_mask", "kwargs",
    ]  # fmt: skip


def test_a_forward_of_the_users_own_is_copied():
    for example in (X, {"pixels": X}):
        imcl, calls = build(TakingTwo(), example), []

        def forward(self, *args, calls=calls, **kwargs):
            calls.append(self)
            return type(self).forward(self, *args, **kwargs)

        imcl.forward = MethodType(forward, imcl)
        twin = copy.deepcopy(imcl)
        twin.eval()(X)
        assert calls == [twin]


def test_a_subclass_shows_what_the_model_takes_too():
    class Own(IMCL):
        def forward(self, x=None, target=None, **kwargs):
            return super().forward(x, target, **kwargs)

    imcl = Own(TakingTwo(), {"pixels": X})
    assert list(inspect.signature(imcl.forward).parameters)[:3] == ["x", "target", "pixels"]
    assert torch.equal(imcl.eval()(X), imcl.model(X))


def test_arguments_copy_no_dict_of_the_users():
    batch = {"a": 1}
    _, kwargs = outputs.arguments(batch, {})
    kwargs.pop("a")
    assert batch == {"a": 1}


@pytest.mark.parametrize(
    ("name", "encoder", "refused"),
    [
        ("LlavaForConditionalGeneration", None, True),
        ("LlavaForConditionalGeneration", False, True),
        ("T5ForConditionalGeneration", True, False),
        ("SomeForCausalLM", None, True),
        ("BertForTokenClassification", False, False),
    ],
)
def test_labels_that_a_model_would_shift_are_refused(name, encoder, refused):
    model = type(name, (nn.Module,), {})()
    if encoder is not None:
        model.config = SimpleNamespace(is_encoder_decoder=encoder)
    decoder = {"decoder_input_ids": 1} if encoder else {}
    if refused:
        with pytest.raises(ValueError, match="labels: a causal language model"):
            outputs.check_labels(model, decoder, True)
    else:
        outputs.check_labels(model, decoder, True)


def test_labels_that_the_decoders_input_is_made_of_are_refused():
    model = nn.Identity()
    model.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="labels: .*prepare_decoder_input_ids_from_labels"):
        outputs.check_labels(model, {"input_ids": 1, "decoder_input_ids": None}, True)
    outputs.check_labels(model, {"input_ids": 1, "decoder_inputs_embeds": 2}, True)
    outputs.check_labels(model, {"input_ids": 1}, False)  # of whole texts, with a class each


@pytest.mark.parametrize(
    ("path", "mask", "half"),
    [
        ("encoder.block.0", "source", "encoder"),
        ("model.decoder.layers.3", "target", "decoder"),
        ("decoder.bert.encoder.layer.1", "target", "decoder"),
        ("encoder.encoder.layer.1", "source", "encoder"),
        ("text_decoder.layers.2", "target", "decoder"),
        ("text_encoder.layers.2", "source", "encoder"),
        ("bottleneck.1", "source", ""),
        ("vision_model.encoder.layers.3", None, "encoder"),
        ("model.visual.blocks.0", None, ""),
    ],
)
def test_which_mask_a_layer_has(path, mask, half):
    padding = outputs.Padding.of(
        {"attention_mask": "source", "decoder_attention_mask": "target"}
    )
    assert padding.decodes and padding.of_logits == "target"
    assert padding.of_layer(path)[0] == mask and outputs.half(path) == half
    alone = outputs.Padding.of({"attention_mask": "source", "decoder_input_ids": None})
    assert not alone.decodes and alone.of_logits == "source"
    assert alone.of_layer(path)[0] == (mask and "source")


@pytest.mark.parametrize("mask", [[1, 0], numpy.ones((6, 16))])
def test_a_mask_is_a_tensor(mask):
    imcl = build(FlatCNN(), X)
    for call in (
        lambda: imcl(X, Y, token_mask=mask),
        lambda: imcl.eval()(X, labels=Y, token_mask=mask),
        lambda: imcl.watch(mask).__enter__(),
    ):
        with pytest.raises(TypeError, match="token_mask: expected a Tensor or None, got"):
            call()


def test_an_argument_without_dimensions_has_no_samples():
    class Scaled(FlatCNN):
        def forward(self, scale, x):
            return super().forward(scale * x)

    imcl = IMCL(Scaled(), {"scale": torch.tensor(2.0), "x": X})
    assert len(imcl.layers) == 3


def test_what_is_named_in_the_call_goes_before_what_is_in_the_batch():
    assert outputs.arguments({"a": 1, "b": 2}, {"b": 3}) == ((), {"a": 1, "b": 3})
    model = TakingTwo()
    imcl = IMCL(model, {"pixels": X})
    given = {"pixels": X, "shift": 9.0}
    torch.testing.assert_close(imcl(given, shift=1.0), model(X, shift=1.0))


def test_the_mask_of_a_decoder_has_its_own_name():
    padding = outputs.Padding(mask="of the source", decoder_mask="of the target", decodes=True)
    assert padding.of_layer("decoder.block.0") == ("of the target", "decoder_attention_mask")
    assert padding.of_layer("encoder.block.0") == ("of the source", "attention_mask")


def test_a_model_may_have_arguments_of_the_names_that_imcl_has():
    class Model(FlatCNN):
        def forward(self, x, target=None, labels=None, extra=None):
            return super().forward(x)

    imcl = IMCL(Model(), {"x": X})
    shown = inspect.signature(imcl.forward).parameters
    assert [*shown] == ["x", "target", "labels", "token_mask", "extra", "kwargs"]


def test_a_causal_model_of_a_name_of_its_own_says_so_by_its_loss():
    model = nn.Linear(1, 1)
    outputs.check_labels(model, {}, True)
    model.loss_type = "ForCausalLM"
    with pytest.raises(ValueError, match="^labels: a causal language model predicts the next"):
        outputs.check_labels(model, {}, True)


def test_labels_that_are_named_go_before_those_of_the_batch():
    imcl = IMCL(FlatCNN(), {"x": X}, representation_weight=0, kernel_weight=0, output_weight=0,
                multilayer_weight=0)
    batch = {"x": X, "labels": (Y + 1) % 6}
    torch.testing.assert_close(imcl(batch, labels=Y).loss, F.cross_entropy(imcl.model(X), Y))
    torch.testing.assert_close(imcl(batch, Y).loss, F.cross_entropy(imcl.model(X), Y))
