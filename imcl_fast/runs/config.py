"""``TrainConfig``: every setting of a training run, their ranges, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .. import data, models, validation
from ..calls import PENALTIES, TEACHERS
from ..data import noise
from ..data.quality import Quality
from ..dependence import KERNELS
from ..implementations import IMPLEMENTATIONS
from ..objectives import METHODS, OF_QUALITIES, WAYS, WITH_WAYS
from ..quality_agnostic import REDUCTIONS

# What config.json holds besides the settings.
PROVENANCE = ("versions", "machine")


# Of a qad method that names none.
QUALITIES = ("raw", "jpeg20")
OBJECTIVE = "objective"
# The first setting of each group, and the heading that the group has in the help.
GROUPS = {
    "dataset": "data",
    "model": "network",
    "method": OBJECTIVE,
    "epochs": "optimization",
    "device": "hardware and precision",
    "run_dir": "run folder",
}


# What an optimizer multiplies float32 weights by must be one itself.
LARGEST = 3.4028234663852886e38


class Range(NamedTuple):
    """Numbers from ``low`` to ``high`` that float32 can hold; open: without the bound itself."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def has(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        below = number < self.high if self.open_high else number <= self.high
        return above and below and abs(number) <= LARGEST

    def expected(self, number: float) -> str:
        """What was expected in place of a number that isn't in it."""
        if math.isfinite(number) and abs(number) > LARGEST:
            return f"a number that float32 can hold, up to {LARGEST:.2g}"
        return str(self)

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isinf(self.low):
            return "a finite number"
        if math.isinf(self.high):
            return f"more than {low}" if self.open_low else f"at least {low}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"a number in {left}{low}, {high}{right}"


POSITIVE, NOT_NEGATIVE, ABOVE_ZERO = Range(1), Range(0), Range(0, open_low=True)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)


@dataclass(frozen=True)
class Setting:
    """What is known of a field of ``TrainConfig`` beside its type and default.

    Attributes:
        help: one sentence for the command line.
        choices: the values allowed; for a tuple, of each element.
        within: the numbers allowed.
        fixed: whether a resumed run must have the same value to end where an
            uninterrupted one does.
        option: the keyword argument of ``objectives.build`` it is passed on as, if it is
            set, True for its own name; its default is the objective's own.
        metavar: how the command line names the value.
        group: heading it stands under there.
    """

    help: str
    choices: tuple[str, ...] | None = None
    within: Range = Range()
    fixed: bool = True
    option: str | bool = False
    metavar: str | None = None
    group: str = ""


def _set(default: Any, help: str, **known: Any) -> Any:
    metadata = {"setting": Setting(help, **known)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _option(help: str, **known: Any) -> Any:
    """Of the objective, whose own default it has if it is left out."""
    return _set(None, help, **{"option": True, **known})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; those of ``imcl-train``, whose ``--help`` describes each.

    Raises:
        TypeError, ValueError: a setting has the wrong type or is outside its range; the
            message names it.
    """

    dataset: str = _set("digits", "data set to train on", choices=data.NAMES)
    data_root: Path | None = _set(None, "folder the data set lies in", fixed=False, metavar="DIR")
    download: bool = _set(
        False, "fetch the data set into the data root if it isn't there", fixed=False
    )
    image_size: int | None = _set(
        None, "height and width in pixels, the data set's own by default", within=Range(8)
    )
    train_images: int | None = _set(
        None, "train on a stratified subset of so many images, on all by default", within=Range(2)
    )
    validation_images: int = _set(
        0,
        "hold out so many training images with clean labels and measure on them INSTEAD of on "
        "the test set: for choosing settings",
        within=NOT_NEGATIVE,
    )
    split_seed: int = _set(
        0,
        "of the choice of training and validation images, apart from the run's seed",
        within=NOT_NEGATIVE,
    )
    label_noise: float = _set(
        0.0, "probability that a training label is replaced by a wrong one", within=SHARE
    )
    noise_type: str = _set(
        "symmetric",
        "wrong labels are uniformly random others, or the class's likeliest confusion",
        choices=noise.KINDS,
    )
    augment: bool = _set(True, "random augmentation, the data set's own")
    mixup: float | None = _set(
        None,
        "mix images and labels of two by shares of Beta(ALPHA, ALPHA) (arXiv 1710.09412)",
        metavar="ALPHA",
        within=ABOVE_ZERO,
    )
    cutmix: float | None = _set(
        None,
        "paste a part of an image and its label's share into another (arXiv 1905.04899); with "
        "mixup each batch has one of the two",
        metavar="ALPHA",
        within=ABOVE_ZERO,
    )
    qualities: tuple[str, ...] | None = _set(
        None,
        "comma-separated raw, jpegQ, downN, blurS, noiseS: accuracy is measured at each, and a qad "
        f"method trains on all, by default on {','.join(QUALITIES)}",
        metavar="QUALITIES",
    )
    workers: int = _set(
        0,
        "processes that load images, for data that isn't in memory",
        fixed=False,
        within=NOT_NEGATIVE,
    )

    model: str = _set(
        "resnet18",
        f"network to train: {', '.join(models.NAMES)}, timm:NAME, or package.module:factory, which "
        "is called without arguments, or with the number of classes if it takes num_classes",
        metavar="MODEL",
    )
    width: int = _set(64, "channels of the network's first stage", within=POSITIVE)
    stem_stride: int = _set(
        1,
        "of the first convolution; 2 halves the resolution at once, for a quarter of the work",
        within=Range(1, 2),
    )
    channels_last: bool = _set(False, "keep images and weights in channels_last memory format")
    compile: bool = _set(False, "train through torch.compile")

    method: str = _set("imcl", "what to train with", choices=METHODS)
    ways: tuple[str, ...] = _set(
        WAYS,
        "comma-separated ways of --method imcl or qad-imcl, or all or none (plain cross entropy)",
        choices=WAYS,
        metavar="WAYS",
    )
    weights: dict[str, float] = _set(
        {},
        "weight of each way, such as output=1,kernel=100; the others keep the method's own",
        choices=WAYS,
        metavar="WAY=W,...",
        within=NOT_NEGATIVE,
    )
    ways_warmup_epochs: float = _set(
        0.0, "epochs in which the ways' weights rise linearly to their values", within=NOT_NEGATIVE
    )
    label_smoothing: float = _set(0.0, "of every cross entropy", within=BELOW_ONE)
    layers: tuple[str, ...] | None = _option(
        "comma-separated module paths whose features take part", metavar="PATHS"
    )
    kernels: tuple[str, ...] | None = _option(
        "comma-separated module paths whose weights take part in kernel similarity",
        metavar="PATHS",
    )
    views: int | None = _option("dropout views", within=Range(2))
    dropout: float | None = _option("of the views", within=BELOW_ONE)
    output_temperature: float | None = _option("of the views", within=ABOVE_ZERO)
    multilayer_temperature: float | None = _option("of the heads", within=ABOVE_ZERO)
    teacher: str | None = _option("of the heads", choices=TEACHERS, option="multilayer_teacher")
    representation_penalty: str | None = _option("of the features", choices=PENALTIES)
    center: bool | None = _option("compare features by correlation, not cosine")
    kernel_penalty: str | None = _option("of the kernels", choices=PENALTIES)
    representation_interval: int | None = _option(
        "compute way 3 in every N-th batch only, with N times its weight", within=POSITIVE
    )
    kernel_interval: int | None = _option(
        "compute way 4 in every N-th batch only, with N times its weight", within=POSITIVE
    )
    beta: float | None = _option("weight of the labels in a song-chai method", within=SHARE)
    alpha: float | None = _option(
        "weight of the dependence between qualities in a qad method", within=NOT_NEGATIVE
    )
    quality_reduction: str | None = _option(
        "of the cross entropies of a qad method's qualities, and of their pairs' dependences",
        choices=REDUCTIONS,
        option="reduction",
    )
    dependence_kernel: str | None = _option("of the dependence", choices=KERNELS, option="kernel")
    cka: bool | None = _option("measure the dependence by CKA, not by HSIC", option="normalize")
    awp: float | None = _set(
        None,
        "take a qad method's gradients at adversarially perturbed weights (arXiv 2004.05884), so "
        "far away in units of each weight's norm; not by default",
        metavar="GAMMA",
        within=ABOVE_ZERO,
    )
    impl: str = _set("auto", "implementation of the fused losses", choices=IMPLEMENTATIONS)

    epochs: int = _set(10, "passes over the training images", within=POSITIVE)
    batch_size: int = _set(
        128, "images of a batch, those of all processes together", within=POSITIVE
    )
    accumulate: int = _set(1, "batches of each optimizer step", within=POSITIVE)
    optimizer: str = _set("sgd", "sgd is that with Nesterov momentum", choices=("sgd", "adamw"))
    lr: float = _set(0.1, "highest learning rate", within=ABOVE_ZERO)
    momentum: float = _set(
        0.9, "of sgd, beta1 of adamw; onecycle moves it by 0.05 both ways", within=BELOW_ONE
    )
    weight_decay: float = _set(
        5e-4, "of all but normalisation parameters and biases", within=NOT_NEGATIVE
    )
    clip_norm: float | None = _set(
        None,
        "highest L2 norm of an optimizer step's whole gradient, unbounded by default",
        metavar="NORM",
        within=ABOVE_ZERO,
    )
    schedule: str = _set(
        "cosine",
        "of the learning rate; step divides it by 10 after 1/2 and 3/4 of the steps",
        choices=("cosine", "step", "onecycle", "constant"),
    )
    warmup_epochs: float = _set(
        0.0,
        "epochs in which the learning rate rises linearly; of onecycle, 0 means its usual 30 %%",
        within=NOT_NEGATIVE,
    )
    ema: float | None = _set(
        None,
        "decay of an exponential moving average of the weights, which is then what is measured",
        metavar="DECAY",
        within=BELOW_ONE,
    )
    seed: int = _set(
        0, "of weights, wrong labels, order, augmentation and dropout", within=NOT_NEGATIVE
    )

    device: str = _set(
        "auto", "such as cpu or cuda; auto takes an accelerator if there is one", fixed=False
    )
    threads: int | None = _set(
        None, "CPU threads, PyTorch's choice by default", fixed=False, within=Range(1, 4096)
    )
    amp: str = _set("off", "autocast to half precision", choices=("off", "bf16", "fp16"))
    deterministic: bool = _set(
        False, "bitwise repeatable on a GPU too, at some cost; on CPUs it always is"
    )

    run_dir: Path | None = _set(
        None,
        "folder of everything the run writes, by default runs/DATASET-MODEL-METHOD-sSEED",
        fixed=False,
        metavar="DIR",
    )
    resume: str = _set(
        "never",
        "auto goes on from the newest good checkpoint of the run folder, if there is one",
        choices=("never", "auto"),
        fixed=False,
    )
    checkpoint_every: str = _set(
        "10m",
        "besides each epoch's end, save after so many optimizer steps (500) or minutes (10m)",
        fixed=False,
        metavar="N|Nm",
    )
    evaluate_every: int = _set(
        1,
        "epochs between measurements of accuracy; after the last there is one anyway",
        metavar="EPOCHS",
        within=POSITIVE,
    )
    keep: int = _set(3, "newest checkpoints to keep, beside the best", fixed=False, within=POSITIVE)
    log_every: int = _set(
        20, "steps between rows of steps.csv", fixed=False, metavar="STEPS", within=POSITIVE
    )
    tensorboard: bool = _set(True, "write TensorBoard's files too, if it is installed", fixed=False)
    report: bool = _set(
        True, "write report.html, with how redundant the layers are before and after", fixed=False
    )
    measure_ways: bool = _set(
        True, "measure after training what each way costs per step", fixed=False
    )

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = _typed(name, getattr(self, name), kind)
            _check_range(name, value, SETTINGS[name])
            object.__setattr__(self, name, value)
        for name, broken, message in self._rules():
            if broken:
                raise ValueError(f"{name}: {message}")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """Of settings that depend on others or have a form of their own: whether one is wrong, and
        what is then said of it."""
        qad, ways = self.method in OF_QUALITIES, ",".join(self.ways)
        yield "model", self.model not in models.NAMES and not all(self.model.partition(":")), (
            f"expected one of {', '.join(models.NAMES)}, timm:NAME or package.module:factory, "
            f"got {self.model!r}"
        )
        yield "ways", len(set(self.ways)) != len(self.ways), f"expected every way once, got {ways}"
        yield "ways", self.method not in WITH_WAYS and self.ways != WAYS, (
            f"they belong to methods {' and '.join(WITH_WAYS)}, {self.method} has none to choose; "
            "leave ways out"
        )
        measured_on, qualities = self.measured_on, ",".join(self.qualities or ())
        yield "qualities", len({quality.name for quality in measured_on}) < len(measured_on), (
            f"expected each once, got {qualities}"
        )
        yield "awp", self.awp is not None and not qad, (
            f"it belongs to methods {' and '.join(OF_QUALITIES)}, got method {self.method}; qad "
            "with alpha 0 on raw alone is plain cross entropy"
        )
        yield "qualities", qad and len(measured_on) < 2 and self.alpha != 0, (
            f"expected at least 2 with method {self.method}, unless alpha is 0, got "
            f"{qualities or 'none'}"
        )
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            yield name, qad and alpha is not None, (
                f"expected none with method {self.method}, whose images are one at several "
                f"qualities, got {alpha or 0:g}"
            )
        for way in self.weights:
            yield "weights", self.method in WITH_WAYS and way not in self.ways, (
                f"{way} is not among the ways {ways or 'none'}"
            )
        warmup = self.ways_warmup_epochs
        yield "ways_warmup_epochs", warmup > 0 and not self.has_ways, (
            f"expected 0 for {self.label}, which has no ways, got {warmup:g}"
        )
        # torch.compile takes the weights for constants, and gives up after 8 of them.
        yield "ways_warmup_epochs", warmup > 0 and self.compile, (
            "expected 0 with compile, which would compile anew for every step's weights, got "
            f"{warmup:g}"
        )
        yield "ways_warmup_epochs", warmup > self.epochs, (
            f"expected at most epochs ({self.epochs}), got {warmup:g}"
        )
        form = re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?m", self.checkpoint_every)
        yield "checkpoint_every", form is None, (
            f"expected a number of steps (500) or of minutes (10m), got {self.checkpoint_every!r}"
        )
        yield "warmup_epochs", self.warmup_epochs >= self.epochs, (
            f"expected less than epochs ({self.epochs}), got {self.warmup_epochs:g}"
        )

    @property
    def has_ways(self) -> bool:
        """Whether the objective is an ``IMCL``, whose ways have weights."""
        return self.method == "mutual-exits" or (self.method in WITH_WAYS and bool(self.ways))

    @property
    def trained_on(self) -> tuple[Quality, ...]:
        """The qualities that images are trained on, none for a batch of the images alone."""
        return self.measured_on if self.method in OF_QUALITIES else ()

    @property
    def measured_on(self) -> tuple[Quality, ...]:
        """The qualities that accuracy is measured at, none for the images as they are."""
        default = QUALITIES if self.method in OF_QUALITIES else ()
        names = default if self.qualities is None else self.qualities
        return tuple(Quality.named(name) for name in names)

    @property
    def label(self) -> str:
        """The method and its ways in a word, for names and tables."""
        return label_of(self.method, self.ways)

    @property
    def objective_options(self) -> dict[str, Any]:
        """Those keyword arguments of ``objectives.build`` that were set, beside the usual."""
        return {
            argument: getattr(self, name)
            for name in SETTINGS
            if (argument := argument_of(name)) and getattr(self, name) is not None
        }

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON knows them: paths are strings, tuples lists."""
        return json.loads(json.dumps(vars(self), default=str))

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """The inverse of ``as_json``. A setting that a run of an older version didn't have yet
        is at its default.

        Raises:
            TypeError, ValueError: there are none, or one is unknown, of the wrong type or
                outside its range.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"config: expected an object, got {type(settings).__name__}")
        if not settings:  # which is no older version's
            raise ValueError("config: expected the settings of a run, got none")
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise ValueError(f"config: unknown settings {', '.join(unknown)}")
        return cls(**settings)

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """The settings in a run folder's ``config.json``.

        Raises:
            OSError: it can't be read.
            TypeError, ValueError: it isn't the configuration of a run.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict):
            return cls.from_json(content)
        versions = content.get("versions")
        written_by = versions.get("imcl_fast") if isinstance(versions, dict) else None
        config = cls.from_json(
            {name: value for name, value in content.items() if name not in PROVENANCE}
        )
        if not str(written_by).startswith("0.1.") or not config.has_ways:
            return config
        return dataclasses.replace(  # what was left to the objective, whose default was another
            config,
            representation_interval=config.representation_interval or 1,
            kernel_interval=config.kernel_interval or 1,
        )

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings that differ among those a resumed run must keep."""
        return [
            name
            for name, setting in SETTINGS.items()
            if setting.fixed and getattr(self, name) != getattr(other, name)
        ]


SETTINGS: dict[str, Setting] = {}
_group = ""
for _field in dataclasses.fields(TrainConfig):
    _group = GROUPS.get(_field.name, _group)
    SETTINGS[_field.name] = dataclasses.replace(_field.metadata["setting"], group=_group)


def argument_of(name: str) -> str | None:
    """The keyword argument of ``objectives.build`` that a setting is passed on as, if it is."""
    option = SETTINGS[name].option
    return name if option is True else option or None


def label_of(method: str, ways: Sequence[str]) -> str:
    """A method and its ways in a word: ``ce``, ``imcl``, ``output+kernel``, another method."""
    if method == "qad-imcl":
        return f"qad+{label_of('imcl', ways)}" if ways else "qad"
    if method != "imcl":
        return method
    if not ways:
        return "ce"
    return "imcl" if set(ways) == set(WAYS) else "+".join(ways)


@cache
def _kinds() -> dict[str, Any]:
    """What each setting is annotated as; a study asks for thousands of configurations."""
    return typing.get_type_hints(TrainConfig)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the annotation says, JSON's lists and strings made tuples and paths."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(name, element, str) for element in value)
    if typing.get_origin(kind) is dict and isinstance(value, Mapping):
        return {_typed(name, k, str): _typed(name, v, float) for k, v in value.items()}
    if kind is float and validation.is_real(value):
        return validation.as_float(value)
    if kind is int and validation.is_integer(value):
        return validation.integer(name, value)
    if (kind is bool and validation.is_bool(value)) or (kind is str and isinstance(value, str)):
        return kind(value)
    named = kind.__name__ if isinstance(kind, type) else str(kind)
    raise TypeError(f"{name}: expected {named}, got {value!r} ({type(value).__name__})")


def _check_range(name: str, value: Any, setting: Setting) -> None:
    if value is None:
        return
    if setting.choices is not None:
        for element in value if isinstance(value, (tuple, dict)) else (value,):
            if element not in setting.choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(setting.choices)}, got {element!r}"
                )
    for number in value.values() if isinstance(value, dict) else [value]:
        counts = isinstance(number, (int, float)) and not isinstance(number, bool)
        if counts and not setting.within.has(number):
            raise ValueError(f"{name}: expected {setting.within.expected(number)}, got {number}")
