"""How the C++ kernels come to be, what happens where they cannot be, and how they divide their work among threads."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engine.quant import FORMATS
from kernels import backends
from kernels.cpu import OPS as TORCH_OPS
from kernels.cpu import native
from kernels.cpu.native import build
from kernels.cpu.native.build import Unavailable


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two empty places, the only ones that are looked at, and a compiler that writes a word."""
    places = [tmp_path / "environment" / "kernels.so", tmp_path / "cache" / "kernels.so"]
    monkeypatch.setattr(build, "_places", lambda: iter(places))
    monkeypatch.setattr(build, "_compile", lambda compiler, folder, *paths: _made(folder))
    monkeypatch.setenv("CXX", "true")  # a program that is everywhere
    return places


def _made(folder: Path) -> Path:
    (folder / "library.so").write_text("made")
    return folder / "library.so"


def test_the_library_is_kept_in_the_environment_and_the_waiting_is_told(places: list[Path]) -> None:
    told: list[str] = []
    assert build._build(told.append) == places[0]
    assert places[0].read_text() == "made"
    assert "compiling" in told[0]
    assert [path.name for path in places[0].parent.iterdir()] == ["kernels.so"], "nothing else is left behind"


def test_where_the_environment_cannot_be_written_the_cache_keeps_it(places: list[Path]) -> None:
    places[0].parent.write_text("a file where a folder should be")
    assert build._build(lambda _: None) == places[1]


def test_a_build_that_fails_leaves_nothing_and_says_what_the_compiler_said(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_nothing(compiler: str, folder: Path, *paths: list[str]) -> Path:
        build._run([compiler, "--no-such-flag"])
        return folder

    monkeypatch.setattr(build, "_compile", compile_nothing)
    monkeypatch.setenv("CXX", "g++")
    with pytest.raises(Unavailable, match="no-such-flag"):
        build._build(lambda _: None)
    assert list(places[0].parent.iterdir()) == []


def test_without_a_compiler_the_reason_names_it_and_its_remedy(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match=r"no-such-compiler.*install g\+\+"):
        build._build(lambda _: None)


def test_a_library_that_cannot_be_loaded_is_named(places: list[Path]) -> None:
    places[0].parent.mkdir()
    places[0].write_bytes(b"spoilt")
    with pytest.raises(Unavailable, match=r"environment/kernels\.so cannot be loaded"):
        build.load.__wrapped__()


def test_another_torch_or_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = build._fingerprint.__wrapped__
    ours = fingerprint()
    assert fingerprint() == ours
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert fingerprint() != ours
    monkeypatch.undo()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert fingerprint() != ours


def test_without_kernels_torch_does_the_work_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable() -> None:
        raise Unavailable("there is no abacus")

    monkeypatch.setattr(native, "ops", unavailable)
    with caplog.at_level(logging.WARNING):
        assert backends.pick("cpu") is TORCH_OPS
    assert "there is no abacus" in caplog.text
    assert backends.pick("cpu").name == "cpu-torch"


def test_a_matrix_meets_no_row_of_another_length() -> None:
    if (ops := backends.pick("cpu")).name != "cpu":
        pytest.skip("there are no C++ kernels here")
    kernel = ops.weights["int8"]
    weight = kernel.prepare(FORMATS["int8"].quantize(torch.randn(64, 96)))
    with pytest.raises(RuntimeError, match="other inputs than 100"):
        kernel.linear(torch.randn(1, 100), weight)


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def product() -> Iterator[Callable[[int], torch.Tensor]]:
    """A product of 37 blocks on the number of threads asked for."""
    if (ops := backends.pick("cpu")).name != "cpu":
        pytest.skip("there are no C++ kernels here")
    generator = torch.Generator().manual_seed(0)
    kernel = ops.weights["int8"]
    weight = kernel.prepare(FORMATS["int8"].quantize(torch.randn(37 * 64 - 5, 128, generator=generator)))
    x = torch.randn(9, 128, generator=generator)

    def multiply(num_threads: int) -> torch.Tensor:
        torch.set_num_threads(num_threads)
        return kernel.linear(x, weight)

    before = torch.get_num_threads()
    yield multiply
    torch.set_num_threads(before)


def test_no_number_of_threads_changes_a_bit(product: Callable[[int], torch.Tensor]) -> None:
    alone = product(1)
    for num_threads in [2, 3, 7, 64, 100] * 50:  # more than there are cores too, so that some come late
        assert torch.equal(product(num_threads), alone)


def test_callers_on_several_threads_get_what_they_would_get_alone(product: Callable[[int], torch.Tensor]) -> None:
    alone = product(1)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, alone) for one in pool.map(product, [2, 3, 4, 5] * 100))


def test_a_forked_process_computes_without_the_threads_that_it_did_not_get(
    product: Callable[[int], torch.Tensor],
) -> None:
    alone = product(4)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product(4), alone) else 1)
    assert os.waitpid(child, 0)[1] == 0
