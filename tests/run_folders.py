"""Makes run folders like those of ``imcl-train``, without the training."""

import csv
import functools
import json
import math
from pathlib import Path

import torch
from torch import nn

from imcl_fast.redundancy import profile

WAYS = ["output", "multilayer", "representation", "kernel"]
TERMS = {
    "output": "output_consistency",
    "multilayer": "multilayer_consistency",
    "representation": "representation_similarity",
    "kernel": "kernel_similarity",
}


@functools.cache
def profiles(width=12, channels=1):
    """Of one small network with different weights."""
    images = torch.randn(4, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 80, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80 * 16, 10),
        )
        made.append(profile(network, images))
    return made


def cka(between):
    """Of a layer and the output."""
    names = ["features.0", "output"]
    return {"rows": names, "columns": names, "cka": [[1.0, between], [between, 1.0]]}


def write_run(
    folder,
    *,
    ways=WAYS,
    method="imcl",
    seed=0,
    label_noise=0.5,
    epochs=4,
    accuracy=0.8,
    best=None,
    seconds_per_step=0.05,
    running=False,
    used=None,
    **config,
):
    """A run whose last test accuracy is ``accuracy``; running: it has no end yet; used: what its
    used.json holds, which runs of older versions don't have."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    settings = {
        "dataset": "digits",
        "data_root": None,
        "label_noise": label_noise,
        "noise_type": "symmetric",
        "validation_images": 0,
        "augment": True,
        "workers": 0,
        "model": "resnet18",
        "width": 16,
        "method": method,
        "ways": ways,
        "weights": {},
        "label_smoothing": 0.0,
        "layers": None,
        "epochs": epochs,
        "batch_size": 128,
        "lr": 0.1,
        "seed": seed,
        "device": "auto",
        "run_dir": str(folder),
        "resume": "auto",
        **config,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "imcl_fast": "0.1.0", "commit": None},
        "machine": {"system": "Linux", "processor": "a processor", "cores": 2, "accelerator": None},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    if used is not None:
        (folder / "used.json").write_text(json.dumps(used))
    done = epochs - 1 if running else epochs
    rows = []
    for epoch in range(1, done + 1):
        left = math.exp(-3 * epoch / epochs)
        row = {
            "epoch": epoch,
            "train_loss": 2.3 * left + 0.2,
            "test_loss": 2.3 * left + 0.3,
            "test_accuracy": accuracy - (0.3 * left if epoch < epochs else 0),
            "train_accuracy": accuracy - 0.2 * left,
            "seconds": 1.5,
            "images_per_second": 900.0,
            "data_seconds": 0.1,
            "lr": 0.1 * left,
            "cross_entropy": 2.3 * left,
        }
        trained = ways if method == "imcl" else []
        row |= {TERMS[way]: (i + 1) * left / 4 for i, way in enumerate(trained)}
        if label_noise:
            row["fit_noisy"] = 0.1 * (1 - left)
        rows.append(row)
    if best is not None:
        rows[-2]["test_accuracy"] = best
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    before, after = profiles()
    (folder / "redundancy_before.json").write_text(json.dumps(before))
    (folder / "cka_before.json").write_text(json.dumps(cka(0.25)))
    if not running:
        summary = {
            "method": method,
            "ways": ways,
            "dataset": "digits",
            "seed": seed,
            "label_noise": label_noise,
            "last_test_accuracy": accuracy,
            "best_test_accuracy": max(row["test_accuracy"] for row in rows),
            "epochs": epochs,
            "steps": 10 * epochs,
            "seconds": 1.5 * epochs,
            "images_per_second": 900.0,
            "seconds_per_step": seconds_per_step,
            "peak_memory_bytes": 300 * 2**20,
            "way_seconds": {way: 0.002 * (i + 1) for i, way in enumerate(ways)},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "redundancy_after.json").write_text(json.dumps(after))
        (folder / "cka_after.json").write_text(json.dumps(cka(0.5)))
    return folder


def add_columns(folder, values):
    """Columns of metrics.csv, one value for all epochs."""
    path = Path(folder) / "metrics.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *values], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **values} for row in rows)
