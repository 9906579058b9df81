"""The Triton kernels compiled for GPUs that aren't there: registers, spills, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# What differs in code: dtypes with their products, both layouts, centring, every penalty.
CASES = (
    "representation bf16 NCHW centred$",
    "representation bf16 NHWC centred$",
    "representation fp32 NHWC centred$",
    "representation fp32 high NCHW$",
    "kernel bf16 square",
    "kernel fp16 abs",
    "kernel fp32 signed",
    "kernel fp32 square",
    "consistency bf16 5 x 128 x 10 teacher 0",
    "consistency fp32 5 x 128 x 1000 teacher 0",
    "consistency bf16 5 x 1024 x 1000 teacher 0",
    "consistency fp32 5 x 256 x 50257 teacher 0",
    "consistency bf16 7 x 4096 x 10 teacher 0",
    "consistency fp32 7 x 128 x 1000 teacher 3",
    "consistency fp32 3 x 16 x 50257 teacher 0",
    "consistency bf16 8 x 4096 x 128256 teacher 0",
    "consistency bf16 5 x 128 x 1000 probabilities",
    "consistency fp32 5 x 128 x 1000 weights",
    "consistency fp32 5 x 128 x 1000 JSD",
    "dependence bf16 64",
    "dependence fp32 64",
    "dependence bf16 128",
    "dependence fp32 128",
)

OLDEST = "3.6.0"  # which torch 2.11 comes with
SPILLED = {  # bytes
    ("3.7.1", "representation bf16 NHWC centred", "forward_kernel", "sm_80"): 72,
    (OLDEST, "representation bf16 NHWC centred", "forward_kernel", "sm_80"): 80,
    # Outside of the loops over classes: of three blocks on a processor, where two spill nothing.
    ("3.7.1", "consistency bf16 8 x 4096 x 128256 teacher 0", "consistency_kernel", "sm_90"): 112,
    ("3.7.1", "consistency bf16 8 x 4096 x 128256 teacher 0", "consistency_kernel", "sm_100"): 16,
    (OLDEST, "consistency bf16 8 x 4096 x 128256 teacher 0", "consistency_kernel", "sm_80"): 144,
    (OLDEST, "consistency bf16 8 x 4096 x 128256 teacher 0", "consistency_kernel", "sm_90"): 232,
    (OLDEST, "consistency bf16 8 x 4096 x 128256 teacher 0", "consistency_kernel", "sm_100"): 36,
    (OLDEST, "consistency fp32 5 x 128 x 1000 teacher 0", "consistency_kernel", "sm_90"): 8,
    (OLDEST, "consistency fp32 5 x 128 x 1000 teacher 0", "consistency_kernel", "sm_100"): 8,
}


def oldest() -> Path:
    """Where Triton's oldest release lies, fetched into build/ once."""
    folder = ROOT / "build" / f"triton-{OLDEST}"
    if not (folder / "triton").exists():
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder,
                 f"triton=={OLDEST}"]  # fmt: skip
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Triton {OLDEST} can't be fetched: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module", params=["installed", OLDEST])
def compiled(request: pytest.FixtureRequest) -> list[dict]:
    """What becomes of every case on every target, compiled two at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    older = [str(oldest())] if request.param == OLDEST else []
    path = [*older, str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    runs = [
        subprocess.Popen(
            [sys.executable, HERE / "offline_compile.py", ",".join(TARGETS), "|".join(half)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for half in (CASES[0::2], CASES[1::2])
    ]  # fmt: skip
    rows = []
    for run in runs:
        said, _ = run.communicate()
        assert run.returncode == 0
        rows += [json.loads(line) for line in said.splitlines()]
    return rows


def test_every_kernel_compiles_for_every_target_without_spilling(
    compiled: list[dict], request: pytest.FixtureRequest
) -> None:
    print(f"\n{'case':40s}{'kernel':20s}{'target':8s}{'registers':>10s}{'spills':>8s}{'shared':>8s}")
    for row in sorted(compiled, key=lambda r: (r["case"], r["kernel"])):
        print(
            f"{row['case']:40s}{row['kernel']:20s}{row['target']:8s}"
            f"{row.get('registers', '')!s:>10s}{row.get('spills', '')!s:>8s}{row['shared']:>8d}"
        )
    kernels = {
        "forward_kernel", "backward_kernel", "consistency_kernel", "gram_kernel", "product_kernel",
    }  # fmt: skip
    assert {row["triton"] == OLDEST for row in compiled} == {request.node.callspec.id == OLDEST}
    assert {(row["kernel"], row["target"]) for row in compiled} == {
        (kernel, target) for kernel in kernels for target in TARGETS
    }
    assert len({row["case"] for row in compiled}) == len(CASES)
    spilled = {
        tuple(row[key] for key in ("triton", "case", "kernel", "target")): row["spills"]
        for row in compiled if row.get("spills")
    }  # fmt: skip
    version = compiled[0]["triton"]
    assert spilled == {key: size for key, size in SPILLED.items() if key[0] == version}
    # What every GPU from sm_80 on gives a block without being asked for more.
    assert all(row["shared"] <= 99 * 1024 for row in compiled)


def test_products_of_halves_use_the_tensor_cores(compiled: list[dict]) -> None:
    rows = [r for r in compiled if "tensor_cores" in r]
    halves = [r for r in rows if "bf16 NCHW" in r["case"] or r["case"].startswith("kernel bf16")]
    assert len(halves) == 12  # 2 cases, forward and backward, on 3 targets
    assert all(r["tensor_cores"] for r in halves)
    # TensorFloat-32 where torch's precision switch allows it, full float32 where not.
    assert all(r["tensor_cores"] for r in rows if "fp32 high" in r["case"])
    full = [r for r in rows if r["case"] == "kernel fp32 square"]
    assert len(full) == 6 and not any(r["tensor_cores"] for r in full)


def test_tensor_cores_read_nothing_that_is_overwritten(compiled: list[dict]) -> None:
    rows = [r for r in compiled if "races" in r]
    assert {r["target"] for r in rows} == {"sm_80", "sm_90", "sm_100"}
    assert not {(r["case"], r["kernel"], r["target"]): r["races"] for r in rows if r["races"]}
