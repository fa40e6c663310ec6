"""Compiles the C++ kernels and loads them into torch: `python -m kernels.cpu.native`, and at first use.

Owns where the library is kept: in the Python environment where that can be written, else in the user's cache. Its name
holds a hash of the sources, the flags and torch's version, so what is found always fits. The compiler is called by
ourselves, with torch's paths: `torch.utils.cpp_extension.load` knows one set of flags for all sources, needs ninja, and
waits for ever for the lock of a build that was killed.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
_LOG = logging.getLogger(__name__)

COMPILE_S_MAX = 900  # a quarter of a minute on two free cores, minutes on busy ones

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
INSTRUCTION_SETS = {"avx2": _AVX2, "avx512": _AVX512}

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-pthread", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


class Unavailable(Exception):
    """There are no C++ kernels here; the text says why."""


@cache
def load(progress: Callable[[str], None] = _LOG.warning) -> list[str]:
    """The kernels are in `torch.ops.tokenmill_cpu`; the instruction sets that this processor has, the one in use first.

    Compiles them if that has not been done, and tells `progress` so. Raises Unavailable where they cannot run or be
    compiled.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"they are for x86-64, not for {platform.machine()}")
    library = next((path for path in _places() if path.exists()), None) or _build(progress)
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:  # spoilt, or of another C library
        raise Unavailable(f"{library} cannot be loaded: {error}; delete it to have it made anew") from error
    instruction_sets: list[str] = torch.ops.tokenmill_cpu.instruction_sets()
    if not instruction_sets:
        raise Unavailable("this processor has no AVX2")
    return instruction_sets


def _places() -> Iterator[Path]:
    """Where the library may be, in the order in which it is looked for and built."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    user_cache = configured if configured.is_absolute() else Path.home() / ".cache"
    for folder in (Path(sys.prefix) / "share", user_cache):
        yield folder / "tokenmill" / f"cpu-kernels-{_fingerprint()}.so"


@cache
def _fingerprint() -> str:
    about = hashlib.sha256(repr((torch.__version__, FLAGS, INSTRUCTION_SETS)).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        about.update(path.read_bytes())
    return about.hexdigest()[:16]


def _build(progress: Callable[[str], None]) -> Path:
    from torch.utils import cpp_extension  # takes half a second, and is seldom needed

    compiler = cpp_extension.get_cxx_compiler()  # type: ignore[no-untyped-call]
    if shutil.which(compiler) is None:
        raise Unavailable(f"there is no compiler {compiler!r}: install g++, or name another in CXX")
    refusals = []
    for library in _places():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent, prefix=".building-") as folder:
                progress("compiling the CPU kernels, once: a quarter of a minute on two free cores")
                made = _compile(compiler, Path(folder), cpp_extension.include_paths(), cpp_extension.library_paths())
                made.replace(library)  # whole or not at all, whoever else builds now
        except OSError as error:
            refusals.append(str(error))
        else:
            return library
    raise Unavailable(f"there is no folder to keep them in: {'; '.join(refusals)}")


def _compile(compiler: str, folder: Path, includes: list[str], libraries: list[str]) -> Path:
    """The library, made in `folder`: the kernels once for each instruction set, the ops once, all at the same time."""
    include = [flag for path in includes for flag in ("-isystem", path)]
    units = {isa: [*flags, f"-DISA={isa}", "kernels.cpp"] for isa, flags in INSTRUCTION_SETS.items()}
    units |= {"threads": ["threads.cpp"], "ops": [*include, "ops.cpp"]}

    def compile_unit(name: str) -> str:
        target = str(folder / f"{name}.o")
        _run([compiler, *FLAGS, *units[name], "-c", "-o", target])
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_unit, reversed(units)))  # the longest first
    made = folder / "library.so"
    search = [f"-L{path}" for path in libraries]
    _run([compiler, "-shared", "-pthread", *objects, *search, "-lc10", "-ltorch_cpu", "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, cwd=SOURCES, check=True, capture_output=True, text=True, timeout=COMPILE_S_MAX)
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}\n{error.stderr[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the compiler took more than {COMPILE_S_MAX} s") from error
