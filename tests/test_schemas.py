"""What C++ says of the operators, their arguments and their enumerations is what Python says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from imcl_fast import functional, operators
from imcl_fast.algebra import consistency, divergences, pairwise
from imcl_fast.schemas import SCHEMAS

CSRC = Path(__file__).parents[1] / "csrc"
ENUMERATIONS = {
    "Penalty": functional.PENALTIES,
    "Precision": functional.PRECISIONS,
    "Teacher": functional.TEACHERS,
    "Divergence": (*functional.DIVERGENCES, "mixture"),
    "Reduction": functional.REDUCTIONS,
}


def source(name: str) -> str:
    path = CSRC / name
    if not path.exists():
        pytest.skip(f"csrc/{name} is not beside the tests")
    return path.read_text()


def test_the_registration_has_these_schemas() -> None:
    text = re.sub(r'"\s+"', "", source("registration.cpp"))  # C++ joins adjacent strings
    assert re.findall(r'm\.def\(\s*"(.*?)"\)', text) == [
        name + schema for name, schema in SCHEMAS.items()
    ]


@pytest.mark.skipif(operators.build_info is None, reason=operators.LOAD_ERROR or "it is loaded")
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_was_compiled_has_them_too(name: str) -> None:
    ours = torch._C.parse_schema(f"imcl_fast::{name}{SCHEMAS[name]}")
    assert str(getattr(torch.ops.imcl_fast, name).default._schema) == str(ours)


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_enumerators_stand_in_the_order_of_the_names(name: str) -> None:
    (inside,) = re.findall(rf"enum class {name} {{(.*?)}}", source("problem.h"))
    names = [each.strip().removeprefix("k") for each in inside.split(",")]
    snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", each).lower() for each in names]
    assert snake == list(ENUMERATIONS[name])


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (pairwise, [f"{each}" for each in functional.PENALTIES]),
        (consistency, functional.TEACHERS),
        (consistency, [f"reduce_{each}" for each in functional.REDUCTIONS]),
        (divergences, ENUMERATIONS["Divergence"]),
    ],
)
def test_constants_of_the_algebra_are_positions_of_the_names(module, names) -> None:
    assert [getattr(module, name.upper()) for name in names] == list(range(len(names)))
