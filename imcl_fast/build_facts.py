"""How the compiled extension was built, and what it chose at run time: what the pybind11 module
``_build_info`` tells, asked of the operators' library itself. That module is of one Python version,
so a wheel for all of them comes without."""

from __future__ import annotations

import ctypes
from pathlib import Path

# Those of the facts that the build decided.
BUILT = ("compiler", "isa_compiled", "cuda_architectures", "cuda_ptx", "nvcc")


class BuildFacts:
    """The functions of ``_build_info``, of the library at ``path``, which is loaded already."""

    def __init__(self, path: Path):
        self._fact = ctypes.CDLL(str(path)).imcl_fast_fact
        self._fact.restype = ctypes.c_char_p

    def _text(self, name: str) -> str:
        text = self._fact(name.encode()).decode()
        if text.startswith("!"):
            raise RuntimeError(text[1:])
        return text

    def compiler(self) -> str:
        """Version of the C++ compiler."""
        return self._text("compiler")

    def isa_compiled(self) -> list[str]:
        """ISA levels compiled in, best first."""
        return self._text("isa_compiled").split(",")

    def isa_levels(self) -> list[str]:
        """Those of them this CPU can run."""
        return self._text("isa_levels").split(",")

    def isa_chosen(self) -> str:
        """The level in use: the best, or the one ``IMCL_FAST_ISA`` names; else RuntimeError."""
        return self._text("isa_chosen")

    def hardware_threads(self) -> int:
        """Hardware threads of this machine."""
        return int(self._text("hardware_threads"))

    def cuda_architectures(self) -> str:
        """CUDA architectures compiled in, separated by semicolons (80;90a); empty if none."""
        return self._text("cuda_architectures")

    def cuda_ptx(self) -> str:
        """Those of them that are there as PTX too, which later GPUs run as well."""
        return self._text("cuda_ptx")

    def nvcc(self) -> str:
        """Version of nvcc; empty if none."""
        return self._text("nvcc")
