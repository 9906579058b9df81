"""``TrainConfig``: every setting of a training run, their ranges, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import data, models, validation
from ..functional import PENALTIES, TEACHERS
from ..implementations import IMPLEMENTATIONS
from ..objectives import METHODS, WAYS

# What config.json holds besides the settings.
PROVENANCE = ("versions", "machine")


@dataclass(frozen=True)
class Setting:
    """What is known of a field of ``TrainConfig`` beside its type and default.

    Attributes:
        help: one sentence for the command line.
        group: heading it stands under there.
        choices: the values allowed; for a tuple, of each element.
        low, high: inclusive bounds of a number.
        open_low, open_high: whether the bound itself is excluded.
        fixed: whether a resumed run must have the same value to end where an
            uninterrupted one does.
        option: the keyword argument of ``objectives.build`` it is passed on as, if it is
            set; its default is the objective's own.
        metavar: how the command line names the value.
    """

    help: str
    group: str
    choices: tuple[str, ...] | None = None
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    fixed: bool = True
    option: str | None = None
    metavar: str | None = None


def _set(default: Any, help: str, group: str, **options: Any) -> Any:
    metadata = {"setting": Setting(help, group, **options)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


DATA, NETWORK, OBJECTIVE = "data", "network", "objective"
OPTIMIZATION, HARDWARE, RUN = "optimization", "hardware and precision", "run folder"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; those of ``imcl-train``, whose ``--help`` describes each.

    Raises:
        TypeError, ValueError: a setting has the wrong type or is outside its range; the
            message names it.
    """

    dataset: str = _set("digits", "data set to train on", DATA, choices=data.NAMES)
    data_root: Path | None = _set(
        None, "folder the data set lies in", DATA, fixed=False, metavar="DIR"
    )
    download: bool = _set(
        False, "fetch the data set into the data root if it isn't there", DATA, fixed=False
    )
    image_size: int | None = _set(
        None, "height and width in pixels, the data set's own by default", DATA, low=8
    )
    train_images: int | None = _set(
        None, "train on a stratified subset of so many images, on all by default", DATA, low=2
    )
    validation_images: int = _set(
        0,
        "hold out so many training images with clean labels and measure on them INSTEAD of on "
        "the test set: for choosing settings",
        DATA,
        low=0,
    )
    split_seed: int = _set(
        0, "of the choice of training and validation images, apart from the run's seed", DATA, low=0
    )
    label_noise: float = _set(
        0.0, "probability that a training label is replaced by a wrong one", DATA, low=0, high=1
    )
    noise_type: str = _set(
        "symmetric",
        "wrong labels are uniformly random others, or the class's likeliest confusion",
        DATA,
        choices=("symmetric", "asymmetric"),
    )
    augment: bool = _set(True, "random augmentation, the data set's own", DATA)
    workers: int = _set(
        0, "processes that load images, for data that isn't in memory", DATA, low=0, fixed=False
    )

    model: str = _set("resnet18", "network to train", NETWORK, choices=models.NAMES)
    width: int = _set(64, "channels of the network's first stage", NETWORK, low=1)
    stem_stride: int = _set(
        1,
        "of the first convolution; 2 halves the resolution at once, for a quarter of the work",
        NETWORK,
        low=1,
        high=2,
    )
    channels_last: bool = _set(
        False, "keep images and weights in channels_last memory format", NETWORK
    )
    compile: bool = _set(False, "train through torch.compile", NETWORK)

    method: str = _set("imcl", "what to train with", OBJECTIVE, choices=METHODS)
    ways: tuple[str, ...] = _set(
        WAYS,
        "comma-separated ways of --method imcl, or all or none (plain cross entropy)",
        OBJECTIVE,
        choices=WAYS,
        metavar="WAYS",
    )
    weights: dict[str, float] = _set(
        {},
        "weight of each way, such as output=1,kernel=100; the others keep the method's own",
        OBJECTIVE,
        choices=WAYS,
        low=0,
        metavar="WAY=W,...",
    )
    ways_warmup_epochs: float = _set(
        0.0, "epochs in which the ways' weights rise linearly to their values", OBJECTIVE, low=0
    )
    label_smoothing: float = _set(
        0.0, "of every cross entropy", OBJECTIVE, low=0, high=1, open_high=True
    )
    layers: tuple[str, ...] | None = _set(
        None,
        "comma-separated module paths whose features take part",
        OBJECTIVE,
        option="layers",
        metavar="PATHS",
    )
    kernels: tuple[str, ...] | None = _set(
        None,
        "comma-separated module paths whose weights take part in kernel similarity",
        OBJECTIVE,
        option="kernels",
        metavar="PATHS",
    )
    views: int | None = _set(None, "dropout views", OBJECTIVE, low=2, option="views")
    dropout: float | None = _set(
        None, "of the views", OBJECTIVE, low=0, high=1, open_high=True, option="dropout"
    )
    output_temperature: float | None = _set(
        None, "of the views", OBJECTIVE, low=0, open_low=True, option="output_temperature"
    )
    multilayer_temperature: float | None = _set(
        None, "of the heads", OBJECTIVE, low=0, open_low=True, option="multilayer_temperature"
    )
    teacher: str | None = _set(
        None, "of the heads", OBJECTIVE, choices=TEACHERS, option="multilayer_teacher"
    )
    representation_penalty: str | None = _set(
        None, "of the features", OBJECTIVE, choices=PENALTIES, option="representation_penalty"
    )
    center: bool | None = _set(
        None, "compare features by correlation, not cosine", OBJECTIVE, option="center"
    )
    kernel_penalty: str | None = _set(
        None, "of the kernels", OBJECTIVE, choices=PENALTIES, option="kernel_penalty"
    )
    representation_interval: int | None = _set(
        None,
        "compute way 3 in every N-th batch only, with N times its weight",
        OBJECTIVE,
        low=1,
        option="representation_interval",
    )
    kernel_interval: int | None = _set(
        None,
        "compute way 4 in every N-th batch only, with N times its weight",
        OBJECTIVE,
        low=1,
        option="kernel_interval",
    )
    beta: float | None = _set(
        None, "weight of the labels in a song-chai method", OBJECTIVE, low=0, high=1, option="beta"
    )
    impl: str = _set(
        "auto", "implementation of the fused losses", OBJECTIVE, choices=IMPLEMENTATIONS
    )

    epochs: int = _set(10, "passes over the training images", OPTIMIZATION, low=1)
    batch_size: int = _set(
        128, "images of a batch, those of all processes together", OPTIMIZATION, low=1
    )
    accumulate: int = _set(1, "batches of each optimizer step", OPTIMIZATION, low=1)
    optimizer: str = _set(
        "sgd", "sgd is that with Nesterov momentum", OPTIMIZATION, choices=("sgd", "adamw")
    )
    lr: float = _set(0.1, "highest learning rate", OPTIMIZATION, low=0, open_low=True)
    momentum: float = _set(
        0.9, "of sgd, beta1 of adamw", OPTIMIZATION, low=0, high=1, open_high=True
    )
    weight_decay: float = _set(
        5e-4, "of all but normalisation parameters and biases", OPTIMIZATION, low=0
    )
    clip_norm: float | None = _set(
        None,
        "highest L2 norm of an optimizer step's whole gradient, unbounded by default",
        OPTIMIZATION,
        low=0,
        open_low=True,
        metavar="NORM",
    )
    schedule: str = _set(
        "cosine",
        "of the learning rate; step divides it by 10 after 1/2 and 3/4 of the steps",
        OPTIMIZATION,
        choices=("cosine", "step", "onecycle", "constant"),
    )
    warmup_epochs: float = _set(
        0.0,
        "epochs in which the learning rate rises linearly; of onecycle, 0 means its usual 30 %%",
        OPTIMIZATION,
        low=0,
    )
    ema: float | None = _set(
        None,
        "decay of an exponential moving average of the weights, which is then what is measured",
        OPTIMIZATION,
        low=0,
        high=1,
        open_high=True,
        metavar="DECAY",
    )
    seed: int = _set(
        0, "of weights, wrong labels, order, augmentation and dropout", OPTIMIZATION, low=0
    )

    device: str = _set(
        "auto", "such as cpu or cuda; auto takes an accelerator if there is one", HARDWARE,
        fixed=False,
    )  # fmt: skip
    threads: int | None = _set(
        None, "CPU threads, PyTorch's choice by default", HARDWARE, low=1, high=4096, fixed=False
    )
    amp: str = _set("off", "autocast to half precision", HARDWARE, choices=("off", "bf16", "fp16"))
    deterministic: bool = _set(
        False, "bitwise repeatable on a GPU too, at some cost; on CPUs it always is", HARDWARE
    )

    run_dir: Path | None = _set(
        None,
        "folder of everything the run writes, by default runs/DATASET-MODEL-METHOD-sSEED",
        RUN,
        fixed=False,
        metavar="DIR",
    )
    resume: str = _set(
        "never",
        "auto goes on from the newest good checkpoint of the run folder, if there is one",
        RUN,
        choices=("never", "auto"),
        fixed=False,
    )
    checkpoint_every: str = _set(
        "10m",
        "besides each epoch's end, save after so many optimizer steps (500) or minutes (10m)",
        RUN,
        fixed=False,
        metavar="N|Nm",
    )
    evaluate_every: int = _set(
        1, "epochs between measurements of accuracy; after the last there is one anyway", RUN,
        low=1, metavar="EPOCHS",
    )  # fmt: skip
    keep: int = _set(3, "newest checkpoints to keep, beside the best", RUN, low=1, fixed=False)
    log_every: int = _set(
        20, "steps between rows of steps.csv", RUN, low=1, fixed=False, metavar="STEPS"
    )
    tensorboard: bool = _set(
        True, "write TensorBoard's files too, if it is installed", RUN, fixed=False
    )
    report: bool = _set(
        True, "write report.html, with how redundant the layers are before and after", RUN,
        fixed=False,
    )  # fmt: skip
    measure_ways: bool = _set(
        True, "measure after training what each way costs per step", RUN, fixed=False
    )

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(TrainConfig).items():
            value = _typed(name, getattr(self, name), kind)
            _check_range(name, value, SETTINGS[name])
            object.__setattr__(self, name, value)
        if len(set(self.ways)) != len(self.ways):
            raise ValueError(f"ways: expected every way once, got {','.join(self.ways)}")
        if self.method != "imcl" and self.ways != WAYS:
            raise ValueError(
                f"ways: they belong to method imcl, {self.method} has none; leave ways out"
            )
        for way in self.weights:
            if self.method == "imcl" and way not in self.ways:
                raise ValueError(
                    f"weights: {way} is not among the ways {','.join(self.ways) or 'none'}"
                )
        if self.ways_warmup_epochs > 0 and not self.has_ways:
            raise ValueError(
                f"ways_warmup_epochs: expected 0 for {self.label}, which has no ways, got "
                f"{self.ways_warmup_epochs:g}"
            )
        if self.ways_warmup_epochs > 0 and self.compile:
            # torch.compile takes the weights for constants, and gives up after 8 of them.
            raise ValueError(
                "ways_warmup_epochs: expected 0 with compile, which would compile anew for every "
                f"step's weights, got {self.ways_warmup_epochs:g}"
            )
        if self.ways_warmup_epochs > self.epochs:
            raise ValueError(
                f"ways_warmup_epochs: expected at most epochs ({self.epochs}), got "
                f"{self.ways_warmup_epochs:g}"
            )
        if not re.fullmatch(r"[1-9]\d*|\d+(\.\d+)?m", self.checkpoint_every):
            raise ValueError(
                "checkpoint_every: expected a number of steps (500) or of minutes (10m), got "
                f"{self.checkpoint_every!r}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: expected less than epochs ({self.epochs}), got "
                f"{self.warmup_epochs:g}"
            )

    @property
    def has_ways(self) -> bool:
        """Whether the objective is an ``IMCL``, whose ways have weights."""
        return self.method == "mutual-exits" or (self.method == "imcl" and bool(self.ways))

    @property
    def label(self) -> str:
        """The method and its ways in a word, for names and tables."""
        return label_of(self.method, self.ways)

    @property
    def objective_options(self) -> dict[str, Any]:
        """Those keyword arguments of ``objectives.build`` that were set, beside the usual."""
        return {
            setting.option: getattr(self, name)
            for name, setting in SETTINGS.items()
            if setting.option is not None and getattr(self, name) is not None
        }

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON knows them: paths are strings, tuples lists."""
        values = dataclasses.asdict(self)
        return {
            name: str(value) if isinstance(value, Path)
            else list(value) if isinstance(value, tuple)
            else value
            for name, value in values.items()
        }  # fmt: skip

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
        if isinstance(content, dict):
            content = {name: value for name, value in content.items() if name not in PROVENANCE}
        return cls.from_json(content)

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the settings that differ among those a resumed run must keep."""
        return [
            name
            for name, setting in SETTINGS.items()
            if setting.fixed and getattr(self, name) != getattr(other, name)
        ]


SETTINGS: dict[str, Setting] = {
    entry.name: entry.metadata["setting"] for entry in dataclasses.fields(TrainConfig)
}


def label_of(method: str, ways: Sequence[str]) -> str:
    """A method and its ways in a word: ``ce``, ``imcl``, ``output+kernel``, another method."""
    if method != "imcl":
        return method
    if not ways:
        return "ce"
    return "imcl" if set(ways) == set(WAYS) else "+".join(ways)


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
    numbers = value.values() if isinstance(value, dict) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        low, high = setting.low, setting.high
        inside = (low < number if setting.open_low else low <= number) and (
            number < high if setting.open_high else number <= high
        )
        if not inside or not math.isfinite(number):
            raise ValueError(f"{name}: expected {_range(setting)}, got {number}")


def _range(setting: Setting) -> str:
    low, high = f"{setting.low:g}", f"{setting.high:g}"
    if math.isinf(setting.low):
        return "a finite number"
    if math.isinf(setting.high):
        return f"more than {low}" if setting.open_low else f"at least {low}"
    left, right = "(" if setting.open_low else "[", ")" if setting.open_high else "]"
    return f"a number in {left}{low}, {high}{right}"
