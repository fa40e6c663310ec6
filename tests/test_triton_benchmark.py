"""The script for the GPU runs from end to end before a GPU meets it, and with what a machine with a GPU has."""

import json
import subprocess
import sys
from pathlib import Path

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
    }
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
