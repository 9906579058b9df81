"""How kernels are launched, tuned and fed on devices that are not here: by stand-ins, and by what
the compiler makes for one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import offline_compile
import triton
import triton.language as tl
import triton.testing
from test_launch import CPU, Kernel, repeated, streams
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from imcl_fast.kernels import (
    autotune,
    config,
    dependence,
    kept,
    launch,
    numerics,
    pairwise,
    plan,
    reduction,
)
from imcl_fast.kernels.constants import plain
from imcl_fast.kernels.launch import Launch

__all__ = ["streams"]  # a fixture


def test_counters_are_of_one_stream_and_too_few_are_kept(streams, monkeypatch):
    """Of another stream they are others; too few ones are kept, for launches on their way."""
    monkeypatch.setattr(kept, "_counters", {})
    first = kept.tickets(CPU, 3)
    assert kept.tickets(CPU, 3) is first
    streams.append(1)
    assert kept.tickets(CPU, 3).data_ptr() != first.data_ptr()
    streams.append(0)
    few, size = weakref.ref(first), len(first)
    del first
    assert len(kept.tickets(CPU, size + 1)) > size
    assert few() is not None


def test_abandoned_memory_is_not_freed(streams):
    partials = weakref.ref(kept.scratch(CPU, 10, torch.float32).partials)
    kept.abandon(kept.scratch(CPU, 10, torch.float32))
    assert kept.scratch(CPU, 10, torch.float32).partials is not partials() is not None


def test_tables_are_copied_by_another_thread(monkeypatch):
    monkeypatch.setattr(kept, "capturing", lambda device: False)
    values = SimpleNamespace(to=lambda device: threading.get_ident())
    assert kept.on_device(values, torch.device("meta")) != threading.get_ident()


def test_a_launch_repeated_goes_to_the_stream_that_is_current(monkeypatch):
    current = ["a"]
    active = SimpleNamespace(get_current_stream=lambda index: current[-1])
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    kernel = Kernel()
    again = repeated(kernel)
    again()
    for name in ("a", "b"):
        current.append(name)
        again()
    assert [seen[4] for seen in kernel.seen[1:]] == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_amd_has_no_tf32_in_either_form(dtype):
    """AMD's GPUs multiply no TensorFloat-32, in neither form."""
    c = pairwise._constants(
        (1, 0, 0, False, False),
        dtype,
        0,
        False,
        True,
        config.PassConfig(32, 3, 4, 255),
        numerics.TF32,
        None,
    )
    found = launch.for_amd({"C": c, "maxnreg": 255, "num_warps": 4})
    assert found["num_warps"] == 4 and "maxnreg" not in found
    products = [plain(getattr(found["C"], name)) for name in ("product", "form_product")]
    assert products == [plain(numerics.IEEE)] * 2


def test_intel_takes_no_register_limit(monkeypatch):
    assert "maxnreg" not in Launch(Kernel(), 1, torch.device("xpu", 0), C="c", maxnreg=255).options


def test_launches_go_to_the_device_of_the_tensors(monkeypatch):
    """Intel's, too."""
    seen = []

    class Entered:
        def __init__(self, device):
            seen.append(device)

        __enter__ = __exit__ = lambda *_: None

    monkeypatch.setattr(torch.xpu, "current_device", lambda: 0)
    monkeypatch.setattr(torch.xpu, "device", Entered)
    for index in (0, 1):
        repeated(Kernel(), torch.device("xpu", index))()
    assert seen == [torch.device("xpu", 1)]


def test_streams_of_intel_s_gpus_are_told_apart(monkeypatch):
    queues = [7]
    monkeypatch.setattr(
        torch.xpu, "current_stream", lambda device: SimpleNamespace(sycl_queue=queues[-1])
    )
    xpu = torch.device("xpu", 0)
    found = [kept._stream(xpu)]
    queues.append(8)
    assert [*found, kept._stream(xpu)] == [7, 8]


def test_on_rocm_options_are_amd_s(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(launch, "for_amd", lambda options: {"C": options["C"], "of": "AMD"})
    assert repeated(Kernel(), torch.device("cuda", 0)).options == {"C": "constants", "of": "AMD"}


def tune(monkeypatch, tmp_path, name="gpu", capturing=False):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_time", lambda run: run())
    module = SimpleNamespace(get_device_name=lambda device: name)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    return lambda *times: autotune.best(
        "op", (1,), torch.float32, torch.device("cuda"), "ab", lambda c: times["ab".index(c)]
    )


def test_nothing_is_timed_during_capture(monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "_winners", {})
    best = tune(monkeypatch, tmp_path, capturing=True)
    assert best() == "a"  # nothing is timed
    assert tune(monkeypatch, tmp_path)(2.0, 1.0) == "b"
    assert tune(monkeypatch, tmp_path, capturing=True)() == "b"


def test_winners_are_of_one_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "_winners", {})
    assert tune(monkeypatch, tmp_path)(2.0, 1.0) == "b"
    assert tune(monkeypatch, tmp_path, "other gpu")(1.0, 2.0) == "a"


def test_winners_are_kept_for_other_processes(monkeypatch, tmp_path):
    for times in ((2.0, 1.0), (1.0, 2.0)):  # another process reads it
        monkeypatch.setattr(autotune, "_winners", None)
        assert tune(monkeypatch, tmp_path)(*times) == "b"


def test_a_cache_that_can_not_be_written_stops_nothing(monkeypatch, tmp_path):
    (tmp_path / "imcl_fast").write_text("no folder")
    monkeypatch.setattr(autotune, "_winners", None)
    assert tune(monkeypatch, tmp_path)(2.0, 1.0) == "b"


def test_a_candidate_without_room_does_not_win(monkeypatch):
    def full(*_, **__):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", full)
    assert autotune._time(lambda: None) == float("inf")


def test_autotuning_is_asked_for_and_for_gpus(monkeypatch):
    said = {}
    code = (
        "import torch; from imcl_fast.kernels import autotune; "
        "print(*(autotune.wanted(torch.device(d)) for d in ('cpu', 'cuda')))"
    )
    for asked in ("0", "1"):
        said[asked] = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "IMCL_FAST_AUTOTUNE": asked},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    assert said == {"0": ["False", "False"], "1": ["False", "True"]}


def test_candidates_have_warps():
    pinned = config.ConsistencyConfig(1, 32, 4, 1, 255)
    found = config.consistency_candidates(pinned, 6)
    assert found[0] == pinned
    assert all(1 <= each.num_warps <= 16 and each.programs <= 6 for each in found)


def test_processors_of_intel_s_gpus(monkeypatch):
    module = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(gpu_subslice_count=64)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert config.processors_of(torch.device("xpu", 7)) == 64


def test_gradients_of_float16_are_multiplied_in_tf32():
    assert [plain(pairwise._gradient_product(torch.float16, p)) for p in range(3)] == [
        plain(numerics.TF32)
    ] * 3


def test_tables_are_held_by_both_passes(monkeypatch):
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    x, held = torch.randn(2, 5, 4, 4), []
    for module in (pairwise, dependence):
        monkeypatch.setattr(module, "hold", lambda memory, device: held.append(memory))
    loss, state = pairwise.forward([x], 0, True, 1e-12, True, 0, True)
    pairwise.backward(loss, [x], state, 0, True, 1e-12, True, 0)
    grams, means = dependence.forward([x, x], [1.0, 1.0])
    dependence.backward(grams, [x, x], means)
    assert len(held) == 4 and all(table.dtype == torch.int64 for table in held)
    assert held[0] is held[1] and held[2] is held[3]


@triton.jit
def _summed(partials, tickets, count, result):
    tl.store(partials + tl.program_id(0), 1.0)
    if reduction.draws_last_ticket(tickets, count):
        tl.store(result, reduction.total(partials, count, 1, tl.float32, 1024))


@triton.jit
def _all_sums(partials, tickets, count, result):
    i = tl.arange(0, 16)
    tile = tl.zeros([16, 16], tl.float32) + tl.program_id(0)
    tile, last = reduction.added_up(tile, partials, tickets, tl.program_id(0), count, 8)
    if last:
        tl.store(result + i[:, None] * 16 + i[None, :], tile)


@triton.jit
def _totals(partials, tickets, count, result):
    tl.store(partials + tl.program_id(0), 1.0)
    if reduction.draws_last_ticket(tickets, count):
        tl.store(result + tl.arange(0, 4), reduction.totals(partials, count, 3, 4, 128, tl.float32))


@triton.jit
def _multiplied(a, b, c, PRODUCT: tl.constexpr):
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    sums = tl.zeros([64, 64], tl.float32)
    tl.store(
        c + i * 64 + j,
        numerics.dot(tl.load(a + i * 64 + j), tl.load(b + i * 64 + j), sums, PRODUCT),
    )


def compiled_for_90(kernel, types, constants=None):
    names = kernel.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants or {}, "constexpr")
    return triton.compile(
        ASTSource(kernel, signature, {(names.index(n),): v for n, v in (constants or {}).items()}),
        target=GPUTarget("cuda", 90, 32),
    ).asm


@pytest.mark.parametrize("kernel", [_summed, _all_sums, _totals])
def test_others_sums_are_read_past_the_first_level_cache_and_after_the_ticket(kernel):
    """What other programs stored is read past the first-level cache, after the ticket."""
    ptx = compiled_for_90(kernel, ("*fp32", "*i32", "i32", "*fp32"))["ptx"]
    before, _, after = ptx.partition("atom.")
    assert "bar.sync" in before and "acq_rel" in after.splitlines()[0]
    loads = [line for line in after.splitlines() if "ld.global" in line]
    assert loads and all(".cg" in line for line in loads)


@pytest.mark.parametrize(
    "name, count, a", [("BFLOAT16X3", 3, "*bf16"), ("TF32X2", 2, "*fp16"), ("TF32", 1, "*fp32")]
)
def test_there_are_as_many_products_as_parts(name, count, a):
    """As many products as there are parts; of TF32 both factors are rounded before."""
    asm = compiled_for_90(_multiplied, (a, "*fp32", "*fp32"), {"PRODUCT": getattr(numerics, name)})
    assert asm["ttir"].count("tt.dot ") == count
    if name == "TF32":
        assert asm["ttir"].count("arith.addi") >= 2 and asm["ttir"].count("4096") >= 1


# What is chosen for a GPU


@pytest.mark.parametrize("heads", [1, 4, 8, 16, 30, 60])
@pytest.mark.parametrize("classes", [1, 10, 255, 1000, 50_000])
def test_a_configuration_has_at_least_one_of_everything(heads: int, classes: int) -> None:
    for heavy in (False, True):
        for rich in (False, True):
            found = config.consistency_config(heads, heavy, rich, 64, classes, CPU)
            assert min(found) >= 1 and found.block & (found.block - 1) == 0


def test_amds_9_4_is_no_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    of = plan.operands_in_shared_memory.__wrapped__
    assert of(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not of(torch.device("cuda", 0))


def test_centred_float16_is_multiplied_in_a_wider_range() -> None:
    assert plain(pairwise._gram_product(torch.float16, True, 0)) == plain(numerics.TF32)


def test_amd_has_no_tensorfloat() -> None:
    """Of a centred float16, and of a dependence."""
    of_pass = config.PassConfig(32, 3, 4, 255)
    plan_of = (1, 0, 0, False, False)
    centred = pairwise._constants(
        plan_of, torch.float16, 0, True, True, of_pass, numerics.TF32, None
    )
    gram = dependence._constants((1, 0, False), (True, True), torch.float16, (32, 16, 32, 8))
    for constants, names in ((centred, ("product", "form_product")), (gram, ("product",))):
        found = launch.for_amd({"C": constants})["C"]
        assert all(plain(getattr(found, name)) == plain(numerics.IEEE) for name in names)


@pytest.mark.parametrize(
    ("name", "a", "said"),
    [("IEEE", "*fp32", ""), ("TF32X3", "*fp32", "tf32x3"), ("FLOAT16", "*fp16", "xf16>"),
     ("BFLOAT16", "*fp32", "xbf16>")],
)  # fmt: skip
def test_a_product_is_what_its_name_says(name: str, a: str, said: str) -> None:
    made = compiled_for_90(_multiplied, (a, "*fp32", "*fp32"), {"PRODUCT": getattr(numerics, name)})
    (line,) = [each for each in made["ttir"].splitlines() if "tt.dot " in each]
    assert said in line if said else "tf32" not in line


def test_the_labels_gradient_is_stored_after_that_of_all_classes(monkeypatch) -> None:
    """Other threads store that; without a barrier the last one would win."""
    import triton._C.libtriton as library

    caught = []
    monkeypatch.setattr(config, "processors_of", lambda device: 132)
    monkeypatch.setattr(
        Launch, "__call__",
        lambda self, *args: caught.append((self.kernel, args, dict(self.options))),
    )  # fmt: skip
    offline_compile.consistency_of(2, 4, 50_000, torch.float32)
    ((kernel, args, options),) = caught
    source = offline_compile.source(kernel, args, {"C": options["C"]})
    target = GPUTarget("cuda", 90, 32)
    backend = triton.compiler.compiler.make_backend(target)
    found, context = backend.parse_options({"num_warps": 4}), library.ir.context()
    library.ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(found)
    text = str(source.make_ir(target, found, functions, backend.get_module_map(), context))
    assert text.count("barrier") >= 2  # this one and the ticket's
