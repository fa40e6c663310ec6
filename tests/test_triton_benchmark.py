"""The script for the GPU runs from end to end before a GPU meets it."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_gpus_script_checks_measures_and_draws(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", tmp_path, "--dry"], check=True, cwd=Path(__file__).parents[1]
    )
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
    assert (tmp_path / "gpu.svg").read_text().startswith("<svg")
