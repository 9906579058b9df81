"""``python -m imcl_fast.env``: what can run here, and why the rest can't."""

from __future__ import annotations

import platform

import torch

from . import __version__, operators
from .implementations import IMPLEMENTATIONS, choose, why_not
from .machine import processor


def report() -> str:
    """Versions, the extension's build facts, and a line per implementation and device."""
    facts = [
        ("imcl_fast", __version__),
        ("processor", processor()),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("matmul precision", torch.get_float32_matmul_precision()),
    ]
    info = operators.build_info
    if info is None:
        facts.append(("extension", operators.LOAD_ERROR))
    else:
        facts += [
            ("extension", f"compiled by {info.compiler()}"),
            ("ISA compiled", ", ".join(info.isa_compiled())),
            ("ISA chosen", _isa()),
            ("CUDA architectures", info.cuda_architectures() or "none"),
        ]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] + ([accelerator.type] if accelerator else [])
    lines = [f"{name:20s}{value}" for name, value in facts]
    for device in devices:
        best = choose("auto", "pairwise", torch.device(device))
        lines.append(f'\nOn {device} tensors, impl="auto" takes {best}:')
        for impl in IMPLEMENTATIONS[1:]:
            reason = why_not(impl, device)
            lines.append(f"  {impl:12s}{'can run' if reason is None else f'can not: {reason}'}")
    return "\n".join(lines)


def _isa() -> str:
    info = operators.build_info
    assert info is not None
    try:
        return f"{info.isa_chosen()} of {', '.join(info.isa_levels())}"
    except RuntimeError as error:  # the environment variable names none
        return str(error)


if __name__ == "__main__":
    print(report())
