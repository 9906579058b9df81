"""What C++ says of the operators, their arguments and their enumerations is what Python says, and
their names are those of the layout of what they return."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree

from imcl_fast import calls, functional, operators
from imcl_fast.algebra import consistency, divergences, pairwise
from imcl_fast.dependence import dependence
from imcl_fast.schemas import LAYOUT, SCHEMAS, ConsistencyOptions, PairwiseOptions

LOADED = pytest.mark.skipif(
    operators.build_info is None, reason=operators.LOAD_ERROR or "it is loaded"
)
CSRC = Path(__file__).parents[1] / "csrc"
ENUMERATIONS = {
    "Penalty": calls.PENALTIES,
    "Precision": calls.PRECISIONS,
    "Teacher": calls.TEACHERS,
    "Divergence": (*calls.DIVERGENCES, "mixture"),
    "Reduction": calls.REDUCTIONS,
}


def source(name: str) -> str:
    path = CSRC / name
    if not path.exists():
        pytest.skip(f"csrc/{name} is not beside the tests")
    return path.read_text()


def test_the_registration_has_these_schemas() -> None:
    text = source("registration.cpp")
    (layout,) = re.findall(r"#define IMCL_LAYOUT (.*)", text)
    text = re.sub(r'"\s+"', "", text.replace("IMCL_LAYOUT", layout))  # C++ joins adjacent strings
    assert re.findall(r'm\.def\(\s*"(.*?)"\)', text) == [
        f"{name}.{LAYOUT}{schema}" for name, schema in SCHEMAS.items()
    ]


@LOADED
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_was_compiled_has_them_too(name: str) -> None:
    ours = torch._C.parse_schema(f"imcl_fast::{name}.{LAYOUT}{SCHEMAS[name]}")
    assert str(operators.overload(name)._schema) == str(ours)


def results(fake: Callable, *args) -> list[str]:
    return [f"{list(t.shape)} {t.stride()} {t.dtype}" for t in pytree.tree_leaves(fake(*args))]


def what_compiled_code_is_told() -> Iterator[list[str]]:
    """What fake kernels return of many problems, on the CPU and ("meta") on GPUs."""
    devices = ("cpu", "meta")
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    shapes = ((3, 5), (5, 3), (64, 64, 3, 3), (4, 70, 90), (4, 90, 7), (300, 17))
    for device, dtype, shape in itertools.product(devices, dtypes, shapes):
        xs = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
        xs.append(torch.empty((2, *shape[1:]), dtype=torch.float32, device=device))
        for penalty, center, batched in itertools.product(range(3), *2 * [(False, True)]):
            if batched and len(shape) == 2:
                continue
            options = PairwiseOptions(penalty, center, 1e-6, batched, 0)
            yield results(operators._pairwise_forward, xs, *options, True)
            yield results(operators._pairwise_forward, xs, *options, False)
        turned = [x.transpose(0, -1) for x in xs]  # gradients lie as the inputs do
        yield results(operators._pairwise_backward, None, turned, [], *options)
        yield results(operators._gram_backward, None, turned, [])
        same = [torch.empty((4, *shape), dtype=each.dtype, device=device) for each in xs]
        yield results(operators._gram_forward, same, [0.5])
        for logits, reduction, keep in itertools.product(
            ([same[0].flatten(2)], [same[0].flatten(2).mT], list(same[0].flatten(2))),
            range(3),
            (False, True),
        ):
            heads = sum(len(each) if each.dim() == 3 else 1 for each in logits)
            options = dict.fromkeys(ConsistencyOptions._fields, 0) | {"reduction": reduction}
            args = (logits, None, None, None, heads * [1.0], *list(options.values())[1:], keep)
            yield results(operators._consistency, *args)


def test_what_compiled_code_is_told_goes_with_the_layout() -> None:
    """Code that ``torch.compile`` keeps on disk believes what an earlier release told it."""
    told = "\n".join(itertools.chain.from_iterable(what_compiled_code_is_told()))
    assert (LAYOUT, zlib.crc32(told.encode())) == ("v4", 3047805272), (
        "a fake kernel returns other sizes, strides or dtypes than when the layout got its name: "
        "give LAYOUT of imcl_fast/schemas.py, and csrc/registration.cpp, the next one, and this "
        "test the new sum"
    )


@LOADED
def test_a_compiled_graph_names_the_layout() -> None:
    """Or else the name would be none of what the caches of ``torch.compile`` go by."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    w = torch.randn(4, 8, requires_grad=True)
    z = torch.randn(2, 6, 8, requires_grad=True)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)

    @torch.compile(backend=backend, fullgraph=True)
    def losses(w, z):
        return (
            functional.kernel_similarity([w])
            + functional.collaborative_consistency(z, None, teacher="mean")
            + dependence(z[0], z[1])
        )

    losses(w, z).backward()
    called = re.findall(r"torch\.ops\.imcl_fast\.(\w+)\.(\w+)\(", "".join(graphs))
    assert set(called) == {(name, LAYOUT) for name in SCHEMAS}


@LOADED
def test_an_extension_of_another_layout_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "LAYOUT", "v0")
    info, error = operators._load()
    assert info is None and "another version" in error and "build it again" in error


@pytest.mark.parametrize("name", ENUMERATIONS)
def test_enumerators_stand_in_the_order_of_the_names(name: str) -> None:
    (inside,) = re.findall(rf"enum class {name} {{(.*?)}}", source("problem.h"))
    names = [each.strip().removeprefix("k") for each in inside.split(",")]
    snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", each).lower() for each in names]
    assert snake == list(ENUMERATIONS[name])


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (pairwise, [f"{each}" for each in calls.PENALTIES]),
        (consistency, calls.TEACHERS),
        (consistency, [f"reduce_{each}" for each in calls.REDUCTIONS]),
        (divergences, ENUMERATIONS["Divergence"]),
    ],
)
def test_constants_of_the_algebra_are_positions_of_the_names(module, names) -> None:
    assert [getattr(module, name.upper()) for name in names] == list(range(len(names)))
