"""Builds the compiled extension with ninja: the CPU kernels once per ISA level, the CUDA
kernels where nvcc is, the operators on PyTorch's stable ABI, and the small pybind11 module of
build facts. The torch it is built beside need not know CUDA.

IMCL_FAST_BUILD says what to build: ``auto`` (the default) the CPU kernels and, where nvcc works,
the CUDA kernels; ``cuda`` both or nothing; ``cpu`` the CPU kernels only; ``0`` nothing. CXX names
the compiler, CXXFLAGS and LDFLAGS what it is given after our own flags, MAX_JOBS how many of it
run at once; one that compiles for another machine cross-builds the CPU kernels. nvcc is taken
from CUDA_HOME, PATH or /usr/local/cuda; TORCH_CUDA_ARCH_LIST says for which GPUs it compiles, as
for any PyTorch extension ("8.0;9.0+PTX").

IMCL_FAST_PORTABLE=1 is for wheels that go to others: without the pybind11 module, the only part
that is of one Python version, tagged for every Python 3, and for systems with an old glibc too.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # pip doesn't look where it isolates nothing
    sys.exit(
        f"imcl_fast: building needs setuptools 77 or later, and {setuptools.__version__} is "
        "installed. Run `pip install --upgrade 'setuptools>=77'`."
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build/objects"
KERNELS, LINKED = "imcl_fast/kernels", "../kernels"  # a symbolic link, and what it is to
CUDA_SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
OPERATORS, BUILD_INFO = "imcl_fast._operators", "imcl_fast._build_info"

# -fno-strict-aliasing: the kernels carve objects of many types out of one scratch buffer.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -fno-strict-aliasing -Wall -Wextra -Wno-psabi"
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
# GCC 12's own intrinsic headers trip these two.
INTRINSICS = "-Wno-uninitialized -Wno-maybe-uninitialized"
ISA_FLAGS = {
    "amx": f"{AVX512} -mavx512bf16 -DIMCL_MATRIX_UNIT {INTRINSICS}",  # its instructions as text
    "avx512bf16": f"{AVX512} -mavx512bf16 {INTRINSICS}",
    "avx512": f"{AVX512} {INTRINSICS}",
    "avx2": "-mavx2 -mfma -mf16c",
    "baseline": "",
}
PRODUCTS_ONLY = ("amx",)  # levels of rounded products, which only the pairwise penalty has
TORCH_ABI = "0x020b000000000000"  # runs under torch 2.11 and later
OLDEST_TORCH = (2, 11)

NVCCFLAGS = (
    "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v"
)
OLDEST_GPU = 80
DEFAULT_GPUS = (80, 90, 100, 120)  # those nvcc knows, and PTX of the newest
# The names that PyTorch gives to some of them.
GPU_NAMES = {
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# What an nvcc older than 12.1, or one that doesn't take the C++ compiler, can't compile.
PROBE = """\
#include <cuda_bf16.h>
struct Large { char bytes[8192]; };
__global__ void probe(const __grid_constant__ Large large, __nv_bfloat16* out) {
  out[threadIdx.x] = __float2bfloat16_rn(large.bytes[threadIdx.x]);
}
void launch(__nv_bfloat16* out) { probe<<<1, 32>>>(Large{}, out); }
"""


def fail(sentence: str) -> None:
    sys.exit(
        f"imcl_fast: {sentence} To install without the compiled extension (slower, the "
        "plain-PyTorch algebra only), set IMCL_FAST_BUILD=0."
    )


def torch_folder() -> Path:
    """The installed torch, without importing it: pip's isolated builds hide it from sys.path."""
    spec = find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    found = "none"
    for place in places:
        if not (place / "version.py").is_file():  # nor is what an uninstall may have left
            continue
        version = re.search(r"__version__ = '(\d+)\.(\d+)", (place / "version.py").read_text())
        if version and (int(version[1]), int(version[2])) >= OLDEST_TORCH:
            return place
        found = f"{version[1]}.{version[2]}" if version else "an unknown one"
    if found == "none":
        upgrade, why = "", "none is installed, or the build's isolated environment hides it"
    else:
        upgrade, why = "--upgrade ", f"{found} is installed"
    fail(
        "building needs the torch that it will run with, torch "
        f"{'.'.join(map(str, OLDEST_TORCH))} or later, and {why}. Run `pip install {upgrade}torch "
        "'setuptools>=77' ninja pybind11`, then `pip install --no-build-isolation .`."
    )
    raise AssertionError


def compiler() -> str:
    """The command, as a shell takes it: CXX may be one of several words ("ccache g++")."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = shutil.which(wanted[0]) if wanted else shutil.which("g++") or shutil.which("clang++")
    if not found:
        fail(f"no C++ compiler found ({shlex.join(wanted) or 'g++ or clang++'}). Install one, or "
             "set CXX.")
    return shlex.join([str(found), *wanted[1:]])


def users_flags(variable: str) -> str:
    """What the user adds to a command in a ninja file, after our own flags, so that it wins."""
    try:
        return shlex.join(shlex.split(os.environ.get(variable, ""))).replace("$", "$$")
    except ValueError as error:  # quotes that nothing closes
        fail(f"{variable}: {error}: {os.environ[variable]!r}.")
        raise AssertionError from error


def program_of(cxx: str) -> str:
    """The compiler itself in such a command, without what it is started by and its options."""
    return [word for word in shlex.split(cxx) if not word.startswith("-")][-1]


def machine_of(cxx: str) -> str:
    """The kind of machine that a compiler compiles for, as ``platform.machine`` names it."""
    done = subprocess.run([*shlex.split(cxx), "-dumpmachine"], capture_output=True, text=True)
    name = done.stdout.partition("-")[0].strip().lower()
    native = platform.machine().lower()
    # Apple's says arm64 or aarch64, and Windows' AMD64.
    same = {"x86_64": "amd64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "aarch64"}
    return native if name in ("", native, same.get(native)) else name


def is_cross(cxx: str) -> bool:
    return machine_of(cxx) != platform.machine().lower()


def ninja_program() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if not found:
        fail("ninja is not installed. Run `pip install ninja`.")
    return str(found)


def jobs() -> int:
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            fail(f"MAX_JOBS: expected a number from 1 on, got {wanted!r}.")
        return int(wanted)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // 2**30))  # a compiler takes under 1 GiB


class Gpus(NamedTuple):
    """Architectures to compile for: "80", "90a", as machine code and as PTX."""

    binary: tuple[str, ...]
    ptx: tuple[str, ...]

    def flags(self) -> str:
        kinds = [("sm", name) for name in self.binary] + [("compute", name) for name in self.ptx]
        return " ".join(f"-gencode arch=compute_{name},code={kind}_{name}" for kind, name in kinds)


class Nvcc(NamedTuple):
    program: str
    version: str
    gpus: Gpus
    include: str  # flags
    libraries: str


class NoCuda(Exception):
    """Why the CUDA kernels can't be built: a sentence."""


def output(*command: str) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise NoCuda(f"{command[0]} can't be run: {error}.") from None
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["it says nothing"]
        worst = next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
        raise NoCuda(f"{command[0]} doesn't work: {worst.strip()}")
    return done.stdout


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which(str(Path(home) / "bin/nvcc"))
        if not found:
            raise NoCuda(f"CUDA_HOME is {home}, and there is no bin/nvcc in it.")
        return found
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        raise NoCuda("no nvcc in PATH or /usr/local/cuda; install the CUDA toolkit (12.1 or "
                     "later), or set CUDA_HOME.")
    return found


def wanted_gpus(known: set[int], arch_list: str | None) -> Gpus:
    """From TORCH_CUDA_ARCH_LIST, or by default; `known` are those nvcc can compile for."""
    if not arch_list or not arch_list.strip():
        chosen = [str(gpu) for gpu in DEFAULT_GPUS if gpu in known]
        if not chosen:
            raise NoCuda(f"nvcc knows none of the GPUs {', '.join(map(str, DEFAULT_GPUS))}.")
        return Gpus(tuple(chosen), (chosen[-1],))
    for name, meaning in GPU_NAMES.items():
        arch_list = re.sub(rf"\b{name}\b", meaning, arch_list)
    binary, ptx = [], []
    for word in re.split("[;, ]+", arch_list.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not match:
            raise NoCuda("TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 9.0+PTX, or "
                         f"one of {', '.join(GPU_NAMES)}; got {word!r}.")
        gpu, name = int(match[1] + match[2]), match[1] + match[2] + match[3]
        if gpu < OLDEST_GPU:
            continue  # an environment's list for all it builds
        if gpu not in known:
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST: this nvcc doesn't know {word}; it knows "
                         f"{', '.join(f'{gpu // 10}.{gpu % 10}' for gpu in sorted(known))}.")
        if name not in binary:
            binary.append(name)
        if match[4] and name not in ptx:
            ptx.append(name)
    if not binary:
        raise NoCuda("the CUDA kernels need a GPU of 8.0 or later, and TORCH_CUDA_ARCH_LIST "
                     f"names none: {arch_list!r}.")
    return Gpus(tuple(binary), tuple(ptx))


def nvcc(cxx: str) -> Nvcc:
    """The nvcc to build with, tried out on a small kernel."""
    program, cxx = find_nvcc(), program_of(cxx)
    release = re.search(r"release \S+ V(\S+)", output(program, "--version").replace(",", ""))
    listed = re.findall(r"compute_(\d+)", output(program, "--list-gpu-arch"))
    gpus = wanted_gpus(set(map(int, listed)), os.environ.get("TORCH_CUDA_ARCH_LIST"))
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text(PROBE)
        try:
            output(program, "-ccbin", cxx, *NVCCFLAGS.split(), *Gpus(gpus.binary[:1], ()).flags()
                   .split(), "-shared", "-o", f"{folder}/probe.so", str(probe))
        except NoCuda as error:
            raise NoCuda(f"{error} It must be CUDA 12.1 or later and take {cxx}.") from None
        # Where its headers and its runtime lie.
        plan = output(program, "-ccbin", cxx, "--dryrun", str(probe))
    include, libraries = (re.search(rf"^#\$ {name}= *(.*)$", plan, re.MULTILINE)
                          for name in ("INCLUDES", "LIBRARIES"))
    if not include or not libraries:
        raise NoCuda(f"{program} --dryrun doesn't say where its headers and libraries are.")
    folders = [flag.removeprefix("-I") for flag in shlex.split(include[1])]
    return Nvcc(
        program,
        release[1] if release else "",
        gpus,
        " ".join(f"-isystem {shlex.quote(folder)}" for folder in folders if folder),
        " ".join(map(shlex.quote, shlex.split(libraries[1]))),
    )


def chosen_nvcc(cxx: str) -> Nvcc | None:
    """What IMCL_FAST_BUILD wants and this machine has."""
    mode = build_mode()
    if mode == "cpu" or (mode == "auto" and portable()):  # a wheel for others runs Triton's
        return None
    try:
        if portable():
            raise NoCuda("IMCL_FAST_PORTABLE=1 is for wheels, which have no CUDA kernels.")
        if is_cross(cxx):
            raise NoCuda(f"{cxx} compiles for {machine_of(cxx)}, another machine.")
        return nvcc(cxx)
    except NoCuda as reason:
        if mode == "cuda":
            fail(f"IMCL_FAST_BUILD=cuda: {reason}")
        print(f"imcl_fast: building without CUDA kernels: {reason}", file=sys.stderr)
        return None


def word(text: object) -> str:
    """A path in a command of a ninja file."""
    return shlex.quote(str(text)).replace("$", "$$")


def name_of(path: object) -> str:
    """A path in what a ninja file says is built of what."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(operators: Path, build_info: Path | None = None) -> str:
    """The build as a ninja file, its paths relative to the build folder or absolute; without
    ``build_info`` no pybind11 module."""
    torch = torch_folder()
    cxx = compiler()
    gpu = chosen_nvcc(cxx)
    x86 = machine_of(cxx) in ("x86_64", "amd64")
    levels = list(ISA_FLAGS) if x86 else ["baseline"]
    csrc, cpu, cuda = ROOT / "csrc", ROOT / "csrc/cpu", ROOT / "csrc/cuda"
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"cxx = {cxx.replace('$', '$$')}",
        f"cxxflags = {CXXFLAGS} -I{word(cpu)}"
        + f" -include {word(csrc / 'portable.h')}" * portable(),
        "rule compile",
        f"  command = $cxx $cxxflags $flags {users_flags('CXXFLAGS')} -MMD -MF $out.d -c $in "
        "-o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shared} -o $out $in $libs {users_flags('LDFLAGS')}",
        # A library by name alone: what it defines is found when it is there.
        "rule name",
        "  command = $cxx -shared -nostdlib -Wl,-soname,$out -o $out -x c++ /dev/null",
    ]

    def compile_(source: Path, name: str, flags: str = "") -> str:
        lines.extend([f"build {name}.o: compile {name_of(source)}", f"  flags = {flags}"])
        return f"{name}.o"

    kernels = []
    if gpu:  # first, for they take longest
        # ptxas's report of registers stays in the log beside the object.
        lines += [
            f"nvcc = {word(gpu.program)} -ccbin {word(program_of(cxx))} {NVCCFLAGS} "
            f"{gpu.gpus.flags()}",
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d -c $in -o $out > $out.log 2>&1 || "
            "{ cat $out.log; exit 1; }; grep -A 3 warning $out.log || true",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source in CUDA_SOURCES:
            kernels.append(f"{source.stem}_cuda.o")
            lines.append(f"build {kernels[-1]}: nvcc {name_of(source)}")
    kernels += [
        compile_(cpu / f"{op}_kernels.cpp", f"{op}_{isa}", f"-DIMCL_ISA={isa} {ISA_FLAGS[isa]}")
        for op in ("pairwise", "consistency", "dependence")
        for isa in levels
        if op == "pairwise" or isa not in PRODUCTS_ONLY
    ]
    kernels += [
        compile_(cpu / f"{name}.cpp", name)
        for name in ("pairwise", "consistency", "dependence", "dispatch", "scratch")
    ]
    isa = compile_(cpu / "isa.cpp", "isa")
    stable = f"-DTORCH_TARGET_VERSION={TORCH_ABI} -isystem {word(torch / 'include')}"
    on_tensors = [
        compile_(csrc / "tensors.cpp", "tensors", stable),
        compile_(cpu / "operators.cpp", "operators_cpu", stable),
        compile_(
            csrc / "registration.cpp", "registration", stable + (" -DIMCL_WITH_CUDA" if gpu else "")
        ),
    ]
    libraries = f"-L{word(torch / 'lib')} -ltorch_cpu -lc10"
    definitions, names = "", ""
    if is_cross(cxx):  # the libraries of this torch are another machine's
        names = "libtorch_cpu.so libc10.so"
        lines += [f"build {name}: name" for name in names.split()]
        libraries = f"-Wl,--no-as-needed {names}"
    if gpu:
        on_tensors.append(
            compile_(cuda / "operators.cpp", "operators_cuda", f"{stable} {gpu.include}")
        )
        # -ltorch brings in the CUDA libraries of a torch that has them.
        libraries = (
            f"-L{word(torch / 'lib')} -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10 "
            f"{gpu.libraries} -lcudart_static -Wl,--exclude-libs,libcudart_static.a "
            "-ldl -lrt -lpthread"
        )
        named = {
            "IMCL_CUDA_ARCHITECTURES": ";".join(gpu.gpus.binary),
            "IMCL_CUDA_PTX": ";".join(gpu.gpus.ptx),
            "IMCL_NVCC": gpu.version,
        }
        definitions = " ".join(f"'-D{name}=\"{value}\"'" for name, value in named.items())
    facts = [compile_(csrc / "facts.cpp", "facts", definitions), isa]
    if portable():
        facts.append(compile_(csrc / "portable.cpp", "portable"))
        libraries += f" -Wl,--version-script={word(csrc / 'portable.map')}"
    linked = [(operators, [*on_tensors, *kernels, *facts], libraries)]
    if build_info:
        try:
            import pybind11
        except ImportError:
            fail("pybind11 is not installed. Run `pip install pybind11`.")
        folders = pybind11.get_include(), sysconfig.get_path("include")
        python = " ".join(f"-isystem {word(folder)}" for folder in folders)
        info = compile_(csrc / "build_info.cpp", "build_info", python)
        linked.append((build_info, [info, *facts], ""))
    for out, objects, libs in linked:
        lines.extend(
            [f"build {name_of(out)}: link {' '.join(objects)} | {names}", f"  libs = {libs}"]
        )
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # The operators are no Python module: torch loads them, whatever the Python version.
        if fullname.endswith("_operators"):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        outputs = [Path(self.get_ext_fullpath(each.name)).resolve() for each in self.extensions]
        for output in outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which is a new one each time where pip calls.
        kind = "-portable" * portable() + f"-{machine_of(compiler())}" * is_cross(compiler())
        folder = OBJECTS.with_name(OBJECTS.name + kind)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(*outputs))
        command = [ninja_program(), "-C", str(folder), f"-j{jobs()}"]
        if subprocess.run(command).returncode:
            fail(f"the build failed; its messages stand above. It ran in {folder}.")


class BuildWheel(bdist_wheel):
    def run(self) -> None:
        # setuptools packs what it finds there, modules of an earlier build's Python too.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        if self.root_is_pure:
            return python, abi, system
        if portable():
            python, abi = "py3", "none"
        if is_cross(compiler()):
            system = f"{sys.platform}_{machine_of(compiler())}"
        return python, abi, system


class SourceArchive(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        # setuptools follows the link; two copies of the kernels would go their own ways.
        link = Path(base_dir) / KERNELS
        if link.is_symlink() or link.is_file():  # of an archive that was interrupted, or a ZIP
            link.unlink()
        shutil.rmtree(link, ignore_errors=True)
        link.symlink_to(LINKED)


def build_mode() -> str:
    mode = os.environ.get("IMCL_FAST_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "0"):
        fail(f"IMCL_FAST_BUILD: expected auto, cpu, cuda or 0, got {mode!r}.")
    return mode


def portable() -> bool:
    wanted = os.environ.get("IMCL_FAST_PORTABLE", "0")
    if wanted not in ("0", "1"):
        fail(f"IMCL_FAST_PORTABLE: expected 0 or 1, got {wanted!r}.")
    return wanted == "1"


def extensions() -> list[Extension]:
    if build_mode() == "0":
        return []
    return [Extension(name, []) for name in (OPERATORS, BUILD_INFO)[: 1 if portable() else 2]]


if __name__ == "__main__":
    commands = {"build_ext": BuildExtension, "bdist_wheel": BuildWheel, "sdist": SourceArchive}
    setup(ext_modules=extensions(), cmdclass=commands)
