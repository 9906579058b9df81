"""What the two penalties (ways 3 and 4) find in a network, and what they do to it while it is
trained: ``python -m bench.accuracy.penalties``.

Runs of the CPU study (ResNet-18, seed 1) once more, looked at from time to time: the value of
each penalty, whether it is trained with or not; how large its gradient is beside that of the
cross entropy; and how alike the kernels of each layer are before and after.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imcl_fast.imcl import IMCL
from imcl_fast.layers import find_kernels
from imcl_fast.redundancy import profile
from imcl_fast.runs import files
from imcl_fast.runs.config import TrainConfig
from imcl_fast.runs.network import build_network
from imcl_fast.training.distributed import Processes
from imcl_fast.training.preparation import prepare_data
from imcl_fast.training.progress import Observer
from imcl_fast.training.trainer import Trainer

from ..facts import facts
from ..render import table
from . import results, study_file
from .tables import NOT_RUN

FILE = "penalties.json"
STUDY, NETWORK, SEED = "cpu", "resnet18", 1
METHODS = ("ce", "representation", "kernel")
PENALTIES = ("representation", "kernel")
IMAGES = 512  # with the labels that are trained on; all of them in one batch
EVERY = 10  # epochs


class Probe(Observer):
    """Looks at a network before the first step and after every tenth epoch.

    Attributes:
        seen: a dict for each look: the epoch and, by penalty, its value and its gradient's
            share.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self._network, self._images, self._labels = network, images, labels
        self.seen: list[dict[str, Any]] = []

    def started(self, step: int, steps: int) -> None:
        self._look(0)

    def epoch_finished(self, row: Mapping[str, float], epochs: int) -> None:
        if row["epoch"] % EVERY == 0:
            self._look(int(row["epoch"]))

    def _look(self, epoch: int) -> None:
        looks = {p: penalty(self._network, self._images, self._labels, p) for p in PENALTIES}
        self.seen.append({"epoch": epoch, **looks})


def penalty(network: nn.Module, images: Tensor, labels: Tensor, way: str) -> dict[str, float]:
    """The value of a penalty with ``IMCL``'s defaults, and its gradient's share.

    Args:
        network: is left as it is.
        images, labels: a batch.
        way: ``representation`` or ``kernel``.

    Returns:
        ``value``, the penalty without its weight; ``share``, the norm of its gradient, with its
        weight, over that of the gradient of the cross entropy. Both are of the weights of all
        convolutions that way 4 looks at.
    """
    others = {f"{w}_weight": 0.0 for w in ("output", "multilayer", *PENALTIES) if w != way}
    objective = IMCL(copy.deepcopy(network), images[:2], **others).train()
    weights = [objective.model.get_submodule(name).weight for name in find_kernels(network)]
    output = objective(images, labels)
    both = torch.autograd.grad(output.loss, weights)
    plain = torch.autograd.grad(
        nn.functional.cross_entropy(objective.model(images), labels), weights
    )
    own = [a - b for a, b in zip(both, plain, strict=True)]
    return {
        "value": float(output.terms[f"{way}_similarity"]),
        "share": float(_norm(own) / _norm(plain)),
    }


def kernels(network: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """What ``profile`` says of the layers that way 4 looks at."""
    names = find_kernels(network)
    return [
        {key: layer[key] for key in ("name", "rows", "columns", "mean_square_cos", "welch_bound")}
        for layer in profile(network, images[:2])
        if layer["kind"] == "kernel" and layer["name"] in names
    ]


def measure(config: TrainConfig) -> dict[str, Any]:
    """Train as ``config`` says, and look."""
    material = prepare_data(config)
    alone = Processes(0, 1, torch.device("cpu"))
    few = material.test_loader(material.train, replace(config, batch_size=IMAGES), alone)
    images, labels = next(iter(few))
    torch.manual_seed(config.seed)  # the weights that Trainer would begin with
    network = build_network(config, material.data_set)
    before = kernels(network, images)
    probe = Probe(network, images, labels)
    summary = Trainer(config, network=network, observer=probe).fit()
    return {
        "accuracy": summary["last_test_accuracy"],
        "seen": probe.seen,
        "before": before,
        "after": kernels(network, images),
    }


def values(found: Mapping[str, Any]) -> str:
    """Values and shares of the gradient: a row for each run, a column for each look."""
    return _over_epochs(found, "value", lambda x: f"{x:.4f}")


def shares(found: Mapping[str, Any]) -> str:
    """As ``values``, of the gradient's shares."""
    return _over_epochs(found, "share", lambda x: f"{100 * x:.1f} %")


def layers(found: Mapping[str, Any]) -> str:
    """Mean squared cosine of each layer's kernels in the condition with wrong labels."""
    runs = {run["method"]: run for run in found["runs"] if run["condition"] == "noise"}
    head = ["layer", "N x D", "no less than", "at first", *(f"after {_title(m)}" for m in runs)]
    first = next(iter(runs.values()))
    lines = []
    for i, layer in enumerate(first["before"]):
        after = [run["after"][i]["mean_square_cos"] for run in runs.values()]
        lines.append([
            layer["name"], f"{layer['rows']} x {layer['columns']}",
            *(f"{x:.4f}" for x in (layer["welch_bound"], layer["mean_square_cos"], *after)),
        ])  # fmt: skip
    return table(head, lines)


def source(found: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    made = found["facts"]
    commit = "commit not recorded" if made["commit"] == "unknown" else f"commit {made['commit']}"
    return (
        f"ResNet-18 of the study above, seed {found['seed']}, {found['images']} training images; "
        f"{made['cpu']}, torch {made['torch']}, {commit}, {made['date']}.\n"
    )


TABLES = {"facts": source, "values": values, "shares": shares, "layers": layers}


def places(folder: Path) -> dict[str, Callable[[], str]]:
    """By the name of its place in docs/accuracy.md, what makes each table of what is in
    ``folder``."""
    path = folder / FILE
    if not path.exists():
        return {f"penalties:{name}": lambda: NOT_RUN for name in TABLES}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {f"penalties:{name}": partial(maker, found) for name, maker in TABLES.items()}


def _over_epochs(found: Mapping[str, Any], what: str, text: Callable[[float], str]) -> str:
    conditions = study_file.load(STUDY).conditions
    epochs = [look["epoch"] for look in found["runs"][0]["seen"]]
    lines = [
        [f"{way}, {conditions[run['condition']].title}, trained with {_title(run['method'])}",
         *(text(look[way][what]) for look in run["seen"])]
        for way in PENALTIES
        for run in found["runs"]
    ]  # fmt: skip
    return table(["after epoch", *map(str, epochs)], lines)


def _title(method: str) -> str:
    return study_file.load(STUDY).methods[method].title


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.penalties", description=__doc__)
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="of the data set")
    args = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "facts": facts(torch.device("cpu")), "seed": SEED, "images": IMAGES, "runs": [],
    }  # fmt: skip
    for run in study_file.load(STUDY).runs:
        if (run.network, run.seed) == (NETWORK, SEED) and run.method in METHODS:
            one = {"condition": run.condition, "method": run.method,
                   **measure(replace(run.config, data_root=args.data_root))}  # fmt: skip
            found["runs"].append(one)
            print(f"{run.name}: {100 * one['accuracy']:.2f} %, {one['seen'][-1]}")
    files.write_json(results.FOLDER / FILE, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
