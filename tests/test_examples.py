"""The examples run as a user would run them, and learn."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EPOCHS = "2"  # of 21 batches: one period of the schedule is 16, and a way's own batch is a jolt
# Lightning and transformers bring in torchvision, which doesn't import where its build isn't
# torch's own.
RUN = """
import runpy, sys
from imcl_fast.models import import_torchvision
import_torchvision()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "name, needs",
    [
        ("bare_pytorch", "torch"),
        ("lightning_module", "lightning"),
        ("accelerate_loop", "accelerate"),
        ("hugging_face_trainer", "transformers"),
    ],
)
def test_it_learns(name, needs, tmp_path):
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs}, which the example shows, isn't installed")
    start = ["-c", RUN] if needs in ("lightning", "transformers") else []
    result = subprocess.run(
        [sys.executable, *start, str(EXAMPLES / f"{name}.py"), "--epochs", EPOCHS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    accuracies = re.findall(r"test accuracy (\d+\.\d)%", result.stdout)
    assert float(accuracies[-1]) > 40  # chance is 10
    # Nothing is left lying about, but for a library's own caches.
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "bare_pytorch",
        "lightning_module",
        "accelerate_loop",
        "hugging_face_trainer",
    }
