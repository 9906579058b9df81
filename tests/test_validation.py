"""Bad input: the type of the error, and that it names the argument and what came."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import Impl

import imcl_fast
from imcl_fast import functional as F
from imcl_fast import implementations

NAN, INF = float("nan"), float("inf")
X = torch.randn(2, 3, 4, 4)
W = torch.randn(5, 4, 3, 3)
Z = torch.randn(3, 5, 7)
Y = torch.tensor([0, 1, 6, -100, 2])


class Bad(NamedTuple):
    """One bad argument: the error it raises, and what else the message must hold."""

    argument: str
    value: object
    error: type[Exception] | tuple[type[Exception], ...]
    got: str = ""

    def __str__(self) -> str:
        # By no random number: every process of pytest-xdist must find the same names.
        text = str(self.value)
        return f"{self.argument}-{type(self.value).__name__ if 'tensor(' in text else text[:24]}"


def sparse(x: torch.Tensor) -> torch.Tensor:
    return x.to_sparse()


def tensors(name: str, good: torch.Tensor, low: torch.Tensor) -> list[Bad]:
    """What is wrong with a tensor, or a sequence of them, of floating point numbers."""
    return [
        Bad(name, None, TypeError, "NoneType"),
        Bad(name, "abc", TypeError, "str"),
        Bad(name, b"abc", TypeError, "bytes"),
        Bad(name, 1.0, TypeError, "float"),
        Bad(name, {0: good}, TypeError, "dict"),
        Bad(name, (x for x in [good]), TypeError, "generator"),
        Bad(name, [], ValueError, "empty"),
        Bad(name, (), ValueError, "empty"),
        Bad(name, [good, None], TypeError, f"{name}[1]: "),
        Bad(name, [good, [good]], TypeError, f"{name}[1]: "),
        Bad(name, good.long(), TypeError, "torch.int64"),
        Bad(name, good > 0, TypeError, "torch.bool"),
        Bad(name, good.to(torch.complex64), TypeError, "torch.complex64"),
        Bad(name, [good, good.int()], TypeError, f"{name}[1]: "),
        Bad(name, sparse(good), TypeError, "torch.sparse_coo"),
        Bad(name, low, ValueError, str(tuple(low.shape))),
        Bad(name, [good, low], ValueError, f"{name}[1]: "),
        Bad(name, torch.tensor(1.0), ValueError, "()"),
        Bad(name, [good, good.to("meta")], ValueError, "meta"),
    ]


NUMBERS = [(NAN, ValueError), (INF, ValueError), ("1", TypeError), (None, TypeError),
           (True, TypeError), (torch.tensor(1.0), TypeError), (np.array(1.0), TypeError),
           (np.bool_(True), TypeError), (1j, TypeError), (10**400, ValueError),
           (np.float32("inf"), ValueError), (np.float64("nan"), ValueError)]
CHOICES = [("cubic", ValueError), ("", ValueError), (None, TypeError), (2, TypeError)]
IMPLS = [Bad("impl", "fast", ValueError, "'fast'"), Bad("impl", "", ValueError),
         Bad("impl", None, (TypeError, ValueError)), Bad("impl", 1, (TypeError, ValueError))]

PAIRWISE = [
    *(Bad("penalty", value, error, str(value) if error is ValueError else type(value).__name__)
      for value, error in CHOICES),
    *(Bad("eps", value, error) for value, error in NUMBERS),
    Bad("eps", -1.0, ValueError, "-1"),
    *IMPLS,
]
REPRESENTATION = [
    *tensors("features", X, torch.randn(3, 4)),
    Bad("features", X[:, :1], ValueError, "(2, 1, 4, 4)"),
    Bad("features", [X, X[:, :0]], ValueError, "features[1]: "),
    Bad("center", 1, TypeError, "int"),
    Bad("center", None, TypeError, "NoneType"),
    Bad("center", "yes", TypeError, "str"),
    *PAIRWISE,
]
KERNEL = [
    *tensors("weights", W, torch.randn(4)),
    Bad("weights", W[:1], ValueError, "(1, 4, 3, 3)"),
    Bad("weights", [W, W[:0]], ValueError, "weights[1]: "),
    *PAIRWISE,
]
CONSISTENCY = [
    *tensors("logits", Z, torch.randn(7)),
    Bad("logits", torch.randn(1, 3, 5, 7), ValueError, "(1, 3, 5, 7)"),
    Bad("logits", [Z[0], Z[1, :, :6]], ValueError, "logits[1]: expected (5, 7)"),
    Bad("logits", [Z[0], Z[1, :4]], ValueError, "logits[1]: expected (5, 7)"),
    Bad("logits", [Z, Z[:, :4]], ValueError, "(3, 4, 7)"),
    Bad("logits", torch.randn(3, 5, 0), ValueError, "(3, 5, 0)"),
    Bad("logits", torch.randn(0, 5, 7), ValueError, "head"),
    Bad("target", [0, 1, 2, 3, 4], TypeError, "list"),
    Bad("target", 3, TypeError, "int"),
    Bad("target", Y > 0, TypeError, "torch.bool; convert indices with .long()"),
    Bad("target", Y.float(), ValueError, "torch.float32; convert indices with .long()"),
    Bad("target", Z[0, :, :6], ValueError, "(5, 6)"),
    Bad("target", Z[0, :, 0], ValueError, "probabilities (5, 7)"),
    Bad("target", sparse(Z[0]), TypeError, "torch.sparse_coo"),
    Bad("target", Z[0].clone().requires_grad_(), ValueError, ".detach()"),
    Bad("target", Z[0].to("meta"), ValueError, "meta"),
    Bad("target", Y[:4], ValueError, "(4,)"),
    Bad("target", Y.unsqueeze(1), ValueError, "(5, 1)"),
    Bad("target", torch.zeros(5, 7, dtype=torch.int64), ValueError, "convert them with .float()"),
    Bad("target", torch.zeros(5, 6, dtype=torch.int64), ValueError, "probabilities (5, 7)"),
    Bad("target", torch.tensor([0, 200, 1, 2, 3], dtype=torch.uint8), ValueError, "200"),
    *(bad
      for name, good in (("weight", Z[0, 0]), ("sample_weight", Z[0, :, 0]))
      for bad in (
          Bad(name, [1.0] * len(good), TypeError, "list"), Bad(name, 1.0, TypeError, "float"),
          Bad(name, good.long(), TypeError, "torch.int64; convert it with .float()"),
          Bad(name, good[:-1], ValueError, str(tuple(good[:-1].shape))),
          Bad(name, good.unsqueeze(0), ValueError, str((1, len(good)))),
          Bad(name, good.to("meta"), ValueError, "meta"),
          Bad(name, good.clone().requires_grad_(), ValueError, ".detach()"),
      )),
    Bad("target", torch.tensor(0), ValueError, "()"),
    Bad("target", torch.tensor([0, 1, 7, 0, 0]), ValueError, "7"),
    Bad("target", torch.tensor([0, 1, -1, 0, 0]), ValueError, "-1"),
    Bad("target", torch.tensor([0, 1, -101, 0, -100]), ValueError, "-101"),
    Bad("target", torch.tensor([0, 1, 1 << 40, 0, 0]), ValueError, str(1 << 40)),
    Bad("target", Y.to("meta"), ValueError, "meta"),
    *(Bad(name, value, error)
      for name in ("temperature", "ce_weight", "kl_weight", "label_smoothing")
      for value, error in NUMBERS),
    Bad("temperature", 0, ValueError, "0"),
    Bad("temperature", -2.0, ValueError, "-2"),
    Bad("temperature", [1.0, 2.0], ValueError, "2"),
    Bad("temperature", [], ValueError),
    *(Bad(name, value, error)
      for name in ("ce_weight", "kl_weight")
      for value, error in (([1.0, 1.0], ValueError), ([1.0, NAN, 1.0], ValueError),
                           ([1.0, None, 1.0], TypeError), ({0: 1.0}, TypeError))),
    Bad("label_smoothing", -0.1, ValueError, "-0.1"),
    Bad("label_smoothing", 1.0, ValueError, "1.0"),
    *(Bad("teacher", value, error) for value, error in CHOICES),
    Bad("teacher", ["others", "mean"], ValueError, "2"),
    Bad("teacher", ["best"], ValueError, "'best'"),
    Bad("detach_teacher", "yes", TypeError, "str"),
    Bad("detach_teacher", None, TypeError, "NoneType"),
    Bad("detach_teacher", [True, False], ValueError, "2"),
    Bad("ignore_index", None, TypeError, "NoneType"),
    Bad("ignore_index", 1.5, TypeError, "float"),
    Bad("ignore_index", "none", TypeError, "str"),
    Bad("ignore_index", torch.tensor(1), TypeError, ".tolist()"),
    Bad("ignore_index", 2**70, ValueError, "71"),
    Bad("ignore_index", np.float32(1), TypeError, "float"),
    Bad("temperature", torch.tensor(2.0), TypeError, ".tolist() outside of the training step"),
    Bad("ce_weight", np.ones(3), TypeError, "ndarray; convert it with .tolist()"),
    Bad("ce_weight", [torch.tensor(1.0)] * 3, TypeError, ".tolist()"),
    Bad("temperature", Fraction(1, 10**400), ValueError, "0.0"),  # as a float
    Bad("label_smoothing", Fraction(10**400 - 1, 10**400), ValueError, "1.0"),
    Bad("groups", torch.tensor([3]), TypeError, ".tolist()"),
    *(Bad("reduction", value, error) for value, error in CHOICES),
    Bad("groups", [1, 1], ValueError, "[1, 1]"),
    Bad("groups", [4], ValueError, "[4]"),
    Bad("groups", [0, 3], ValueError, "[0, 3]"),
    Bad("groups", [-1, 4], ValueError, "[-1, 4]"),
    Bad("groups", [], ValueError, "[]"),
    Bad("groups", 3, TypeError, "int"),
    Bad("groups", [1.5, 1.5], (TypeError, ValueError), "1.5"),
    *IMPLS,
]

GOOD = {
    "representation": {"features": X},
    "kernel": {"weights": W},
    "consistency": {"logits": Z, "target": Y},
}
FUNCTIONS = {
    "representation": F.representation_similarity,
    "kernel": F.kernel_similarity,
    "consistency": F.collaborative_consistency,
}
MODULES = {
    "representation": imcl_fast.RepresentationSimilarityLoss,
    "kernel": imcl_fast.KernelSimilarityLoss,
    "consistency": imcl_fast.CollaborativeConsistencyLoss,
}
CASES = [
    *(("representation", bad) for bad in REPRESENTATION),
    *(("kernel", bad) for bad in KERNEL),
    *(("consistency", bad) for bad in CONSISTENCY),
]


def call_module(kind: str, arguments: dict) -> torch.Tensor:
    tensors = {name: arguments.pop(name) for name in GOOD[kind]}
    each = {name: arguments.pop(name) for name in ("sample_weight",) if name in arguments}
    return MODULES[kind](**arguments)(*tensors.values(), **each)


def call_function(kind: str, arguments: dict) -> torch.Tensor:
    return FUNCTIONS[kind](**arguments)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("call", [call_function, call_module])
def test_the_good_arguments_are_good(kind: str, call: Callable) -> None:
    assert torch.isfinite(call(kind, {**GOOD[kind], "impl": "torch"}))


@pytest.mark.parametrize("call", [call_function, call_module])
@pytest.mark.parametrize("kind,bad", CASES, ids=[f"{kind}-{bad}" for kind, bad in CASES])
def test_bad_argument(kind: str, bad: Bad, call: Callable) -> None:
    arguments = {"impl": "torch", **GOOD[kind], bad.argument: bad.value}
    with pytest.raises(bad.error) as caught:
        call(kind, arguments)
    message = str(caught.value)
    assert message.startswith(bad.argument), f"doesn't name the argument: {message}"
    assert "expected" in message, f"doesn't say what was expected: {message}"
    assert bad.got in message, f"doesn't say what came: {message}"


@pytest.mark.parametrize("kind", GOOD)
def test_options_are_keywords_only(kind: str) -> None:
    with pytest.raises(TypeError, match="positional"):
        FUNCTIONS[kind](*GOOD[kind].values(), "square")
    with pytest.raises(TypeError, match="positional"):
        MODULES[kind]("square")
    with pytest.raises(TypeError, match="temprature"):
        FUNCTIONS[kind](**GOOD[kind], temprature=1.0)


def test_an_index_to_ignore_with_probabilities_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^ignore_index: expected .* got 3; .*sample_weight"):
        F.collaborative_consistency(Z, Z[0].softmax(-1), ignore_index=3)


@pytest.mark.parametrize("kind", ["representation", "kernel"])
def test_a_module_finds_a_bad_penalty_when_it_is_made(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^penalty: .*'cubic'"):
        MODULES[kind](penalty="cubic")


def test_a_module_finds_a_bad_reduction_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"^reduction: .*'average'"):
        imcl_fast.CollaborativeConsistencyLoss(reduction="average")


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
@pytest.mark.parametrize("kind", GOOD)
def test_an_implementation_that_cannot_run_says_why(kind: str, name: str) -> None:
    device = "meta" if implementations.why_not(name, "cpu") is None else "cpu"
    reason = implementations.why_not(name, device)
    arguments = {key: value.to(device) for key, value in GOOD[kind].items()}
    with pytest.raises(RuntimeError) as caught:
        FUNCTIONS[kind](**arguments, impl=name)
    assert name in str(caught.value) and reason in str(caught.value)
    assert "imcl_fast.env" in str(caught.value)


def test_good_arguments_in_every_spelling(impl: Impl) -> None:
    """Lists, tuples, whole numbers and numbers for each head are all the same."""
    z, y = Z.to(impl.device), Y.to(impl.device)
    expected = F.collaborative_consistency(z, y, impl=impl.name)
    for options in (
        {"temperature": 2, "ce_weight": 1, "kl_weight": 1, "label_smoothing": 0},
        {"temperature": [2.0], "ce_weight": (1, 1, 1), "kl_weight": [1.0] * 3},
        {"teacher": ["others"], "detach_teacher": (True,), "groups": (3,)},
    ):
        for logits in (z, list(z), tuple(z), [z[:1], z[1], z[2:]]):
            got = F.collaborative_consistency(logits, y, impl=impl.name, **options)
            torch.testing.assert_close(got, expected)
    x = X.to(impl.device)
    torch.testing.assert_close(
        F.representation_similarity((x,), eps=0, impl=impl.name),
        F.representation_similarity([x], impl=impl.name),
    )


@pytest.mark.parametrize(
    "two", [np.float16(2), np.float32(2), np.float64(2), np.longdouble(2), np.int64(2),
            np.uint8(2), Fraction(2)], ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_numbers_may_be_numpys(two: object) -> None:
    """The values are exactly those of Python's numbers, in functions and modules, and the modules
    hold Python's, which torch.compile needs."""
    options = {"temperature": 2.0, "ce_weight": 2.0, "kl_weight": [2.0, 1.0, 2.0]}
    given = {"temperature": two, "ce_weight": two, "kl_weight": [two, 1.0, two]}
    expected = F.collaborative_consistency(Z, Y, **options, impl="torch")
    assert torch.equal(F.collaborative_consistency(Z, Y, **given, impl="torch"), expected)
    module = imcl_fast.CollaborativeConsistencyLoss(**given, impl="torch")
    assert torch.equal(module(Z, Y), expected)
    assert {type(x) for x in (module.temperature, *module.kl_weight)} <= {int, float}
    features = [F.representation_similarity(X, eps=e, impl="torch") for e in (2.0, two)]
    assert torch.equal(*features)
    weights = [imcl_fast.KernelSimilarityLoss(eps=e, impl="torch")(W) for e in (2.0, two)]
    assert torch.equal(*weights)


def test_integers_and_bools_may_be_numpys() -> None:
    given = {"ignore_index": np.int16(-100), "groups": [np.int64(1), np.uint8(2)],
             "detach_teacher": np.False_}  # fmt: skip
    plain = {"ignore_index": -100, "groups": [1, 2], "detach_teacher": False}
    expected = F.collaborative_consistency(Z, Y, **plain, impl="torch")
    assert torch.equal(F.collaborative_consistency(Z, Y, **given, impl="torch"), expected)
    module = imcl_fast.CollaborativeConsistencyLoss(**given, impl="torch")
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(Z, Y), expected)
    centred = [imcl_fast.RepresentationSimilarityLoss(center=c, impl="torch")(X)
               for c in (True, np.True_)]  # fmt: skip
    assert torch.equal(*centred)


def test_triton_on_a_gpu_needs_a_c_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    cache = implementations._why_not_c_compiler

    def chosen(path: Path) -> tuple[str | None, str]:
        monkeypatch.setenv("PATH", str(path))
        cache.cache_clear()
        return (implementations.why_not("triton", "cuda"),
                implementations.choose("auto", "pairwise", torch.device("cuda")))  # fmt: skip

    try:
        implementations._warn_fallback.cache_clear()
        with pytest.warns(RuntimeWarning, match="no gcc or clang; install one, or set CC"):
            reason, auto = chosen(tmp_path)
        assert "C compiler" in (reason or "") and auto == "torch"
        compiler = tmp_path / "gcc"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        assert chosen(tmp_path) == (None, "triton")
    finally:
        cache.cache_clear()
        implementations._warn_fallback.cache_clear()


def test_the_interpreter_of_an_old_triton_needs_an_old_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"triton": "3.6.0", "numpy": "2.4.1"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(implementations, "version", installed.__getitem__)
    caches = (
        implementations._triton_version, implementations._why_not_triton_version,
        implementations._why_not_interpreter,
    )  # fmt: skip

    def reason() -> str | None:
        for cache in caches:
            cache.cache_clear()
        return implementations._why_not_triton("cpu", [])

    try:
        assert "NumPy 2.4.1" in (reason() or "") and "triton>=3.7" in (reason() or "")
        installed["numpy"] = "2.3.5"
        assert reason() is None
        installed.update(triton="3.7.1", numpy="2.4.1")
        assert reason() is None
    finally:
        for cache in caches:
            cache.cache_clear()


def test_the_capability_asked_for_is_that_of_the_tensors_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(implementations, "_why_not_cuda", lambda device: None)
    monkeypatch.setattr(implementations, "_why_not_capability", asked.append)
    implementations.choose("cuda", "pairwise", torch.device("cuda", 1))
    assert asked == [1]


@pytest.mark.parametrize(
    ("built", "sources", "gpu", "runs"),
    [
        ("80", "", (8, 0), True),
        ("80", "", (8, 9), True),
        ("80", "", (9, 0), False),
        ("89", "", (8, 0), False),
        ("90a", "", (9, 0), True),
        ("90a", "90a", (10, 0), False),
        ("100f", "", (10, 3), True),
        ("100a", "", (10, 3), False),
        ("80;90;100;120", "120", (11, 0), False),
        ("80;90;100;120", "120", (12, 1), True),
        ("80;90", "90", (12, 0), True),
        ("80;90", "", (7, 5), False),
    ],
)
def test_kernels_run_where_their_machine_code_or_its_source_does(
    built: str, sources: str, gpu: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Info:
        cuda_architectures = staticmethod(lambda: built)
        cuda_ptx = staticmethod(lambda: sources)

    monkeypatch.setattr(implementations.operators, "build_info", Info)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpu)
    reason = implementations._why_not_capability.__wrapped__(0)
    assert (reason is None) == runs
    if reason is not None:
        number = f"{gpu[0]}.{gpu[1]}"
        assert f"TORCH_CUDA_ARCH_LIST={number}" in reason and built.split(";")[0] in reason


def test_a_value_is_validated_whatever_was_remembered():
    """1 and True are one key of a dict, and so are 1 and 1.0."""
    logits, target = torch.randn(2, 3, 5), torch.tensor([0, 4, 2])
    for _ in range(2):
        expected = F.collaborative_consistency(logits, target, temperature=1)
        again = F.collaborative_consistency(logits, target, temperature=1.0)
        assert torch.equal(again, expected)
        with pytest.raises(TypeError, match="temperature: expected a number"):
            F.collaborative_consistency(logits, target, temperature=True)
        with pytest.raises(TypeError, match="detach_teacher: expected a bool"):
            F.collaborative_consistency(logits, target, detach_teacher=1)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_an_integer_of_65_bits_is_named(number):
    told = "^ignore_index: expected an int of 64 bits, got one of 64"
    with pytest.raises(ValueError, match=told):
        F.collaborative_consistency(Z, Y, ignore_index=number)
