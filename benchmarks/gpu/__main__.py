"""Everything that only a GPU can say, in one run: `python -m benchmarks.gpu FOLDER`, or `make gpu`.

Owns the order of the parts and their time. First each kernel against its definition in fp64, then whole models from end
to end, then each kernel's time as a share of what the device can do, measured in the same run. `--parts` names some of
them. Writes `gpu.json` and `gpu.svg` to the folder, and into the former what was left out and why. Kernels need torch,
Triton and numpy; whole models safetensors and msgspec too, and are left out where those are not there.

`--dry` runs tiny cases in Triton's interpreter on a machine without a GPU: its times say nothing, but the script ran.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before they are imported

import torch

from benchmarks.gpu import checks, micro
from benchmarks.gpu.measure import DRY, ceilings
from benchmarks.gpu.report import Report, picture

BUDGET_S = 540.0  # a run fits into ten minutes; what does not fit is named
MICRO_S = 150.0  # of them for the micro table: compiling is most of it
PARTS = ("checks", "models", "micro")


def main() -> None:
    """Runs all parts, and ends with an error where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    folder = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    if DRY:
        from tests import triton_interpreter

        triton_interpreter.install()
    torch.manual_seed(0)
    end = time.monotonic() + BUDGET_S
    report = Report("interpreter" if DRY else torch.cuda.get_device_name())
    with torch.inference_mode():
        ceilings(report)
        wrong = checks.run(report) if "checks" in asked.parts else []
        if "models" in asked.parts:
            models(report, end - MICRO_S)
        if "micro" in asked.parts:
            micro.run(report, end)
    report.left_out += [part for part in PARTS if part not in asked.parts]
    (folder / "gpu.json").write_text(json.dumps(asdict(report), indent=1))
    (folder / "gpu.svg").write_text(picture(report))
    for reason in report.left_out:
        print("left out:", reason)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


def models(report: Report, end: float) -> None:
    """Whole models, where what the engine imports is there."""
    try:
        from benchmarks.gpu import whole
    except ImportError as error:
        report.left_out.append(f"whole models: {error}")
        return
    whole.run(report, end)


if __name__ == "__main__":
    main()
