"""The script for the GPU runs from end to end before a GPU meets it, and with what a machine with a GPU has."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import baselines
from benchmarks.gpu.inputs import random_matrices
from kernels import reference

HOME = Path(__file__).parents[1]
# What we depend on and such a machine need not have.
ELSEWHERE = (
    *("aiohttp", "aiokafka", "cramjam", "cyclopts", "llguidance", "minijinja", "opentelemetry", "prometheus_client"),
    *("rich", "structlog", "transformers"),
)


def test_the_gpus_script_checks_measures_and_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", tmp_path, "--dry"], check=True, cwd=HOME)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["errors"]
    assert all(error <= 2**-7 for error in report["errors"].values())
    assert {line["what"].partition(",")[0] for line in report["lines"]} >= {
        "attention",
        "int4 experts",
        "bf16 experts",
        "fp8 experts",
        "fp8 matrix",
        "sample",
        "logprobs",
    }
    whats = [line["what"] for line in report["lines"]]
    assert any(what.startswith("bf16 experts") and what.endswith("torch's loop over experts, eager") for what in whats)
    whole = {figure["what"].partition(", ")[2] for figure in report["figures"]}
    assert whole >= {
        "first token, prompt of 4",
        "1 sequences, graphs, overlap on",
        "1 sequences, no graphs, overlap off",
        "1 sequences, host not hidden, sampling with it",
        "1 sequences x 2 tokens verified",
    }
    assert all(figure["value"] > 0 for figure in report["figures"] if "not hidden" not in figure["what"])
    assert not any("tiny" in reason for reason in report["left_out"])
    assert (tmp_path / "gpu.svg").read_text().startswith("<svg")


def test_others_are_timed_at_the_same_work() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 128).bfloat16()
    weights, chosen = reference.route(torch.randn(20, 8), 2, "softmax", True)
    layer = random_matrices("bf16", 8, 256, 128), random_matrices("bf16", 8, 128, 128)
    inner, outer = ([one.values[0].float() for one in matrices] for matrices in layer)
    expected = reference.experts(x, weights, chosen, inner, outer, reference.linear, reference.swiglu).float()
    grouped = dict(baselines.experts(x, weights, chosen, *layer))["torch's grouped_mm"]
    for actual in (baselines.experts_in_a_loop(x, weights, chosen, *layer), grouped()):
        assert isinstance(actual, Tensor)
        assert (actual.float() - expected).norm() <= 2**-7 * expected.norm()  # bf16 rounds between products


def test_engine_kernels_and_script_need_no_more_than_torch_triton_and_msgspec() -> None:
    missing = f"import sys; sys.modules.update(dict.fromkeys({ELSEWHERE}))"
    subprocess.run(
        [sys.executable, "-c", f"{missing}; import engine.thread, engine.build, benchmarks.gpu.whole"],
        check=True,
        cwd=HOME,
    )


def test_kernels_are_checked_and_timed_without_the_engine() -> None:
    missing = f"import sys; sys.modules.update(dict.fromkeys({(*ELSEWHERE, 'msgspec', 'safetensors', 'tokenizers')}))"
    subprocess.run([sys.executable, "-c", f"{missing}; import benchmarks.gpu.__main__"], check=True, cwd=HOME)
