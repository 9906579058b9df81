"""``python -m bench.mutants.build LEVEL`` in a copy of the tree: compile again what has changed,
the kernels at one ISA level only, and link it to the objects that were copied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import setup


def main(level: str) -> int:
    package = setup.ROOT / "imcl_fast"
    operators = package / "_operators.so"
    ninja = [setup.ninja_program(), "-C", str(setup.OBJECTS)]
    setup.OBJECTS.mkdir(parents=True, exist_ok=True)
    rules = setup.ninja_file(operators, package / "_build_info.so")
    file = setup.OBJECTS / "build.ninja"
    if not file.exists() or file.read_text() != rules:
        file.write_text(rules)
    unused = tuple(f"_{isa}.o" for isa in setup.ISA_FLAGS if isa != level)
    objects = [
        line.split()[1].rstrip(":") for line in rules.splitlines() if ": compile " in line
    ]
    wanted = [
        name for name in objects
        if not (name.endswith(unused) and Path(setup.OBJECTS, name).exists())
    ]  # fmt: skip
    if code := subprocess.run([*ninja, "--quiet", f"-j{setup.jobs()}", *wanted]).returncode:
        return code
    # By hand: ninja would first bring the other levels up to date.
    link = [*ninja, "-t", "commands", "-s", str(operators)]
    said = subprocess.run(link, capture_output=True, text=True, check=True).stdout
    return subprocess.run(said.splitlines()[-1], shell=True, cwd=setup.OBJECTS).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
