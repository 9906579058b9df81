"""``import imcl_fast`` brings nothing along that a training loop of one's own has no use for."""

from __future__ import annotations

import subprocess
import sys

SLOW = ("torch._dynamo", "triton", "torchvision", "sklearn", "matplotlib", "PIL", "sympy")


def imported_by(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_losses_import_neither_the_compiler_nor_the_trainer() -> None:
    own = imported_by("import imcl_fast") - imported_by("import torch")
    assert "imcl_fast.functional" in own
    assert not [name for name in SLOW if name in own]
    assert not [name for name in own if name.startswith(("imcl_fast.training", "imcl_fast.data"))]


def test_the_first_loss_imports_no_compiler_either() -> None:
    call = "import torch; from imcl_fast import functional as F; " \
        "F.kernel_similarity(torch.ones(2, 3))"
    assert "torch._dynamo" not in imported_by(call)
