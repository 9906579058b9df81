"""``imcl-inspect``: how redundant the layers of a network are."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import data
from ..alignment import alignment
from ..data.loader import TestLoader
from ..data.split import take
from ..imcl import IMCL
from ..redundancy import profile
from ..runs import files
from ..runs.config import POSITIVE, Range
from ..runs.errors import DiskFullError, one_line
from ..runs.extra import needed_by
from ..runs.flags import Parser, in_range
from . import charts
from .networks import Found, UnknownNetwork, find

with needed_by("imcl-inspect"):
    from .table import number, show, text_table

BATCH = 64  # images that CKA is estimated on at once
HEAD = ["layer", "kind", "N x D", "mean |cos|", "mean cos^2", "Welch", "dead %", "eff. rank"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 where there is no such network."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plan and (options.json is not None or options.plot is not None):
        parser.error("--plan: it is text only; expected neither --json nor --plot beside it")
    try:
        return _inspect(options)
    except (
        UnknownNetwork, charts.MissingMatplotlib, DiskFullError, ImportError, OSError, ValueError
    ) as error:  # fmt: skip
        print(f"imcl-inspect: {one_line(error)}", file=sys.stderr)
        return 2


def _inspect(options: argparse.Namespace) -> int:
    if options.plot is not None:
        charts.check_matplotlib()
    torch.manual_seed(options.seed)
    if options.images is None:
        options.images = 16 if options.against is None and not options.cka else 512
    found = find(options.name, options.model, options.classes)
    images = _images(found, options)
    if options.plan:
        with warnings.catch_warnings(), _runs_on(images, options.name):
            warnings.simplefilter("ignore")  # the plan says it
            plan = IMCL(found.network, images).plan()
        show(plan)
        return 0
    if options.cka or options.against is not None:
        return _align(found, images, options)
    with _runs_on(images, options.name):
        layers = profile(found.network, images, center=options.center)
    show(text_table(HEAD, [_line(layer) for layer in layers], left=2))
    if options.json is not None:
        files.deliver(options.json, files.as_json(layers))
    if options.plot is not None:
        names = [f"{layer['name']} ({layer['kind'][0]})" for layer in layers]
        series = {
            "mean |cos|": [layer["mean_abs_cos"] for layer in layers],
            "effective rank / full rank": [_share_of_rank(layer) for layer in layers],
            "share of dead rows": [layer["dead_share"] for layer in layers],
        }
        files.deliver(options.plot, charts.save(names, series, options.plot.suffix[1:].lower()))
    return 0


@contextlib.contextmanager
def _runs_on(images: Tensor, name: str, other: str | None = None) -> Iterator[None]:
    """Have what a network says of images that it can't be run on end in one line."""
    try:
        yield
    except Exception as error:  # whatever the network's own code raises
        raise UnknownNetwork(
            f"{name}: can't run on images {tuple(images.shape[1:])}"
            + ("" if other is None else f", or {other} can't")
            + f"; try another --image-size ({type(error).__name__}: {one_line(error)})"
        ) from error


def _align(found: Found, images: Tensor, options: argparse.Namespace) -> int:
    """How alike layers are in what they make of images, within a network or of two."""
    other = None
    if options.against is not None:
        other = find(options.against, options.model, options.classes).network
    with _runs_on(images, options.name, options.against):
        known = alignment(found.network, images.split(BATCH), other)
    lines = []
    for i, (name, cells) in enumerate(zip(known.rows, known.cka, strict=True)):
        # Of itself each is most like itself.
        rest = [j for j in range(len(cells)) if other is not None or j != i]
        most = max(rest, key=cells.__getitem__, default=None)
        alike = ["-", "-"] if most is None else [known.columns[most], number(cells[most])]
        before = number(cells[i - 1]) if other is None and i else "-"
        lines.append([name, *alike, *([before] if other is None else []), number(cells[-1])])
    of = "" if other is None else f" of {options.against}"
    head = ["layer", f"most alike{of}", "CKA"]
    head += ["CKA with the one before"] if other is None else []
    show(text_table([*head, f"CKA with the output{of}"], lines, left=2))
    print(charts.READ_CKA)
    if options.json is not None:
        files.deliver(options.json, files.as_json(known._asdict()))
    if options.plot is not None:
        titles = (options.name, options.name if other is None else options.against)
        kind = options.plot.suffix[1:].lower()
        files.deliver(options.plot, charts.alignment(*known, titles, charts.READ_CKA, kind))
    return 0


def _share_of_rank(layer: dict[str, Any]) -> float | None:
    rank = layer["effective_rank"]
    return None if rank is None else rank / min(layer["rows"], layer["columns"])


def _line(layer: dict[str, Any]) -> list[str]:
    return [
        layer["name"],
        layer["kind"],
        f"{layer['rows']} x {layer['columns']}",
        number(layer["mean_abs_cos"]),
        number(layer["mean_square_cos"]),
        number(layer["welch_bound"]),
        number(layer["dead_share"], ".1f", 100),
        number(layer["effective_rank"], ".1f"),
    ]


def _images(found: Found, options: argparse.Namespace) -> Tensor:
    """A batch for the network: (N, C, H, W) float32."""
    data_set = found.data_set
    if data_set is not None and options.data is None and options.image_size is None:
        return _of(data_set, options.images)
    channels = _channels(found.network)
    size = options.image_size
    if options.data == "digits":
        digits = _of(data.load("digits", None, image_size=size), options.images)
        return digits.expand(-1, channels, -1, -1)
    if size is None:
        size = 224 if data_set is None else data_set.shape[-1]
    return torch.randn(options.images, channels, size, size)


def _of(data_set: data.DataSet, count: int) -> Tensor:
    some = take(data_set.test, torch.arange(min(count, len(data_set.test))))
    loader = TestLoader(some, data_set, batch_size=count, device=torch.device("cpu"))
    return torch.cat([images for images, _ in loader])


def _channels(network: nn.Module) -> int:
    """Of the images that the network's first convolution takes."""
    for module in network.modules():
        if isinstance(module, _ConvNd):
            return module.in_channels
    return 3


def _parser() -> Parser:
    count, size = in_range(int, POSITIVE), in_range(int, Range(8))
    parser = Parser(
        prog="imcl-inspect",
        description="How alike the kernels and the channels of a network's layers are. Welch is "
        "what the mean cos^2 of as many live rows can't be below.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name",
        metavar="MODEL|CHECKPOINT",
        help="a network of torchvision's, timm:NAME or package.module:factory, with random "
        "weights; or a run folder of imcl-train, a checkpoint of one, or a file with a state_dict",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="the network of a state_dict that lies in no run folder"
    )
    parser.add_argument(
        "--classes", type=count, metavar="N", help="outputs of a network with random weights"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="instead print what each of the four ways would act on in this network",
    )
    parser.add_argument(
        "--cka",
        action="store_true",
        help="instead compare its layers with one another: linear CKA, which --plot draws as a "
        "heat map",
    )
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="the same with the layers of another network, named as the first, on its images",
    )
    parser.add_argument(
        "--data",
        choices=("digits", "random"),
        help="images to run it on (the run's own test images, or else random)",
    )
    parser.add_argument(
        "--image-size", type=size, metavar="PIXELS", help="height and width (224)"
    )
    parser.add_argument(
        "--images", type=count, metavar="N", help="how many (16, of --cka 512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and images (0)")
    parser.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare channels by correlation, not cosine (yes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers")
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE", help="also draw them: FILE.svg or FILE.png"
    )
    return parser


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"expected FILE.svg or FILE.png, got {text}")
    return path


if __name__ == "__main__":
    sys.exit(main())
