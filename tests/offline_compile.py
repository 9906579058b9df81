"""Compiles every Triton kernel for GPUs that aren't there, and prints what became of it.

Run by test_offline_compile.py and test_compiled_code.py in processes without TRITON_INTERPRET:
the real launchers are called on CPU or meta tensors, their launches are caught, and each kernel is
compiled with the very arguments and options it would have been launched with on a GPU of 132
processors. One JSON object per line.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import sass
import torch
import triton
import wgmma
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.rows import GPU_CONSISTENCIES
from bench.shapes import R18_FEATURES, resnet18_weights
from imcl_fast.algebra import divergences
from imcl_fast.kernels import config, consistency, dependence, launch, pairwise, plan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
# One or several samples at a time, all classes or chunks of them; the first of `make gpu`, then
# what many heads and few, small batches and large ones are planned to take.
CONSISTENCIES = (
    *GPU_CONSISTENCIES, (2, 4096, 10), (7, 128, 10), (7, 4096, 10), (2, 512, 1000), (3, 128, 100),
    (7, 128, 1000), (5, 128, 4096), (3, 16, 50257), (4, 16, 50257), (8, 4096, 128256),
)  # fmt: skip
# Of one processor: bytes of shared memory, of which each block costs 1 KiB more than it has.
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32


def describe(value):
    """Type, constant if specialised, and attributes of one argument, as the JIT sees it."""
    aligned = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}", None, aligned
    if value is None or isinstance(value, bool) or (isinstance(value, int) and value == 1):
        return "constexpr", value, []
    if isinstance(value, int):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, None, aligned if value % 16 == 0 else []
    return "fp32", None, []


def source(kernel, args, options) -> ASTSource:
    signature, constants, attributes = {}, {}, {}

    def add(path, value):
        if isinstance(value, tuple):
            return tuple(add((*path, i), v) for i, v in enumerate(value))
        kind, constant, attrs = describe(value)
        if kind == "constexpr":
            constants[path] = constant
        if attrs:
            attributes[path] = attrs
        return kind

    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = values[parameter.name]
        else:
            signature[parameter.name] = add((i,), values[parameter.name])
    return ASTSource(kernel, signature, constants, attributes)


def compile_launch(case: str, name: str, kernel, args, options) -> None:
    wanted = launch.for_amd(options) if TARGETS[name].backend == "hip" else dict(options)
    build = {k: wanted.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in wanted}
    compiled = triton.compile(source(kernel, args, wanted), target=TARGETS[name], options=build)
    row = {"case": case, "kernel": kernel.__name__, "target": name,
           "triton": triton.__version__, "shared": compiled.metadata.shared}  # fmt: skip
    if "ptx" in compiled.asm:
        row |= resources(compiled.asm["ptx"])
        row["blocks"] = blocks(name, row["registers"], row["shared"], build["num_warps"])
        code = sass.disassembled(compiled.asm["cubin"])
        row["tensor_cores"] = re.search(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", code) is not None
        row["races"] = wgmma.races(compiled.asm["ttgir"])
        row["loops"] = [loop._asdict() for loop in sass.main_loops(code)]
    print(json.dumps(row), flush=True)


def resources(ptx: str) -> dict[str, int]:
    """Registers and bytes spilled, as ptxas reports them."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        said = subprocess.run(
            [tool("ptxas", target[1]), "-v", f"--gpu-name={target[1]}", file, "-o", f"{file}.o"],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    assert registers and spills, said
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


def tool(name: str, target: str) -> Path:
    newer = sass.TOOLS / f"{name}-blackwell"
    return newer if int(re.sub(r"\D", "", target)) >= 100 and newer.exists() else sass.TOOLS / name


def blocks(target: str, registers: int, shared: int, warps: int) -> int:
    """How many blocks a processor runs at a time."""
    each = -(-registers * 32 // 256) * 256 * warps
    return min(REGISTERS // each, SHARED[target] // (shared + 1024), WARPS // warps, BLOCKS)


def benched():
    """Name and call of what `make gpu` measures; the batch, which no code depends on, is 2."""
    grad = torch.ones(())
    for dtype, precision in (
        (torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 0), (torch.float32, 2),
    ):  # fmt: skip
        name = TYPES[dtype] + ("", " high", " medium")[precision]
        for layout in (torch.channels_last, torch.contiguous_format):
            xs = [torch.empty((2, *s[1:]), dtype=dtype).contiguous(memory_format=layout)
                  for s in R18_FEATURES]  # fmt: skip
            lies = "NHWC" if layout == torch.channels_last else "NCHW"
            for center in (False, True):
                options = (0, center, 1e-12, True, precision)
                for layers in (xs, xs[:1]):
                    case = (f"R18 {len(layers)} features {name} {lies}"
                            f"{' centred' if center else ''}")  # fmt: skip
                    yield case, lambda xs=layers, o=options: pairwise_both(xs, o, grad)
        ws = [torch.empty(s, dtype=dtype) for s in resnet18_weights()]
        options = (0, False, 1e-12, False, precision)
        yield f"R18 kernels {name}", lambda ws=ws, o=options: pairwise_both(ws, o, grad)


def cases():
    """Name and call of what users run: the layers of a ResNet-18, and heads of a network."""
    shapes = [(2, 64, 8, 8), (2, 128, 8, 8), (2, 256, 8, 8), (2, 512, 4, 4)]
    layers = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3), (10, 64)]
    grad = torch.ones(())
    for dtype, precision in (
        (torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 0), (torch.float32, 1),
    ):  # fmt: skip
        name = TYPES[dtype] + ("", " high", " medium")[precision]
        for layout in (torch.contiguous_format, torch.channels_last):
            xs = [torch.empty(s, dtype=dtype).contiguous(memory_format=layout) for s in shapes]
            lies = "NHWC" if layout == torch.channels_last else "NCHW"
            for center in (False, True):
                options = (0, center, 1e-12, True, precision)
                case = f"representation {name} {lies}{' centred' if center else ''}"
                yield case, lambda xs=xs, o=options: pairwise_both(xs, o, grad)
        ws = [torch.empty(s, dtype=dtype) for s in layers]
        for penalty in (0, 1, 2):
            options = (penalty, False, 1e-12, False, precision)
            case = f"kernel {name} {('square', 'abs', 'signed')[penalty]}"
            yield case, lambda ws=ws, o=options: pairwise_both(ws, o, grad)
    for dtype in (torch.bfloat16, torch.float32):
        name = TYPES[dtype]
        for batch in (64, 128):  # one tile of samples, and more
            yield f"dependence {name} {batch}", lambda b=batch, d=dtype: dependence_both(b, d)
        for heads, batch, classes in CONSISTENCIES:
            for teacher in (0, 3):
                case = f"consistency {name} {heads} x {batch} x {classes} teacher {teacher}"
                yield case, lambda s=(heads, batch, classes), d=dtype, t=teacher: (
                    consistency_of(*s, d, teacher=[t])
                )
        # Soft labels, weights of classes and samples.
        numbers = torch.empty(128, 1000, device="meta")
        for kind, given in (
            ("probabilities", {"target": numbers}),
            ("weights", {"weight": numbers[0], "sample_weight": numbers[:, 0]}),
        ):
            yield f"consistency {name} 5 x 128 x 1000 {kind}", lambda d=dtype, g=given: (
                consistency_of(5, 128, 1000, d, label_smoothing=0.1, **g)
            )
        for kind, options in (
            ("reverse KL", {"divergence": [divergences.REVERSE_KL]}),
            ("JSD", {"divergence": [divergences.JSD]}),
            ("mixture", {"divergence": [divergences.MIXTURE], "temperature": [1.0]}),
        ):
            yield f"consistency {name} 5 x 128 x 1000 {kind}", lambda d=dtype, o=options: (
                consistency_of(5, 128, 1000, d, **o)
            )
        yield f"consistency {name} 5 x 128 x 8 labels", lambda d=dtype: (
            consistency_of(5, 128 * 8, 1, d, target=torch.empty(128 * 8, 2, device="meta"),
                           binary=True)
        )  # fmt: skip


def consistency_of(
    heads: int, batch: int, classes: int, dtype: torch.dtype, *, target=None, weight=None,
    sample_weight=None, **options,
) -> None:
    """A call on meta tensors, which have no memory and are planned as those of a GPU."""
    logits = [torch.empty(batch, classes, dtype=dtype, device="meta") for _ in range(heads)]
    if target is None:
        target = torch.empty(batch, dtype=torch.int64, device="meta")
    given = {
        "ce_weight": [1.0] * heads, "kl_weight": [1.0] * heads, "groups": [heads],
        "temperature": [2.0], "teacher": [0], "detach": [True], "divergence": [divergences.KL],
        "beta": [0.5], "label_smoothing": 0.0, "ignore_index": -100, "binary": False,
        "reduction": 0, "keep": True,
    }  # fmt: skip
    consistency.forward(logits, target, weight, sample_weight, **{**given, **options})


def pairwise_both(xs, options, grad) -> None:
    _, state = pairwise.forward(xs, *options, True)
    pairwise.backward(grad, xs, state, *options)


def dependence_both(batch: int, dtype: torch.dtype) -> None:
    """Three views of the layers of a ResNet-18, on meta tensors as above."""
    xs = [torch.empty((batch, *s[1:]), dtype=dtype, device="meta")
          for s in R18_FEATURES for _ in range(3)]  # fmt: skip
    grams, means = dependence.forward(xs, [1.0] * len(xs))
    dependence.backward(grams, xs, means)


def main() -> None:
    config.processors_of = lambda device: 132
    targets, wanted = sys.argv[1].split(","), re.compile(sys.argv[2])
    for case, call in itertools.chain(cases(), benched()):
        if not wanted.search(case):
            continue
        for target in targets:
            for module in (plan, config):
                module.operands_in_shared_memory = lambda device, of=target: of == "sm_90"
            for cache in (plan.plan, pairwise._forward, pairwise._backward):
                cache.cache_clear()
            caught = []

            def catch(self, *args, caught=caught):
                caught.append((self.kernel, args, self.options))

            launch.Launch.__call__ = catch
            call()
            for kernel, args, options in caught:
                compile_launch(case, target, kernel, args, dict(options))


if __name__ == "__main__":
    main()
