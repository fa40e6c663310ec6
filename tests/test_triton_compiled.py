"""Every kernel compiles for Hopper to what it was written to become: no GPU is needed to know."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.triton.cache import FP8, INT8, PLAIN
from tests.triton_compiler import Compiled
from tests.triton_launches import LAUNCHES

SHARED_BYTES_MAX = 227 << 10  # of one Hopper multiprocessor, all of it for one program
REGISTERS = 1 << 16  # of one multiprocessor
NUM_PROCESSES = 2  # a compilation takes about a second, and reading it half of one

# All are compiled before the first test: some 60 s on two idle cores, ten times as much on a crowded machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[Compiled]]:
    """The kernels of every launch, compiled outside this process, whose Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.triton_compiler", *list(LAUNCHES)[i::NUM_PROCESSES]],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(NUM_PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES
    by_launch: dict[str, list[Compiled]] = {name: [] for name in LAUNCHES}
    for kernel in (Compiled(**fields) for output in outputs for fields in json.loads(output)):
        by_launch[kernel.launch].append(kernel)
    return by_launch


def each(kernels: list[Compiled], name: str) -> Iterator[Compiled]:
    """The compiled forms of one kernel, of which there is at least one."""
    found = [kernel for kernel in kernels if kernel.kernel == name]
    assert found, f"no {name} among {[kernel.kernel for kernel in kernels]}"
    yield from found


@pytest.mark.parametrize("launch", LAUNCHES)
def test_no_kernel_spills_and_each_fits_a_multiprocessor(compiled: dict[str, list[Compiled]], launch: str) -> None:
    assert compiled[launch], "nothing was launched"
    for kernel in compiled[launch]:
        assert kernel.spills == 0, kernel
        assert kernel.shared_bytes <= SHARED_BYTES_MAX, kernel
        assert kernel.registers * kernel.num_warps * 32 <= REGISTERS, kernel


ELEMENTWISE = [name for name in LAUNCHES if name.partition(",")[0] in {"norms", "rotate and write", "swiglu"}]


@pytest.mark.parametrize("launch", ELEMENTWISE)
def test_elementwise_kernels_move_16_bytes_at_a_time(compiled: dict[str, list[Compiled]], launch: str) -> None:
    for kernel in compiled[launch]:
        wide = kernel.count(r"LDG\.E.*\.128"), kernel.count(r"STG\.E.*\.128")
        assert min(wide) >= 1, kernel
        narrow = kernel.count(r"(LDG|STG)\.E(?!.*\.(64|128))")  # slots, and no more of each than there are rows
        assert narrow <= 1, kernel


# Of a thread for each logit: as many as the device has to spare when it reads fp32 at 3 TB/s.
INSTRUCTIONS_PER_LOGIT_MAX = 40.0


def test_logprobs_read_the_logits_16_bytes_at_a_time_and_no_more_slowly_than_memory(
    compiled: dict[str, list[Compiled]],
) -> None:
    for kernel in each(compiled["logprobs, Qwen3-30B-A3B"], "_blocks"):
        per_thread = kernel.constants["BLOCK"] / (kernel.num_warps * 32)
        assert kernel.count(r"LDG\.E.*\.128") == per_thread / 4, kernel
        assert sum(kernel.instructions.values()) / per_thread <= INSTRUCTIONS_PER_LOGIT_MAX, kernel


ATTENTION = [name for name in LAUNCHES if name.partition(",")[0] in {"decode", "drafts", "many drafts", "prompt"}]

# Instructions of one thread for each element of the cache that it helps to read. The device has 20 to spare when it
# reads bf16 at 3 TB/s (132 multiprocessors, 128 lanes, 1.75 GHz): decodes need 4, drafts 5, latent decodes 6.8. Of 8
# bits it has 10: decodes in fp8 need 4.6 (6.2 with heads of 64), drafts 7. int8's rows begin anywhere, and cost more
# than the memory does.
INSTRUCTIONS_PER_ELEMENT_MAX = {PLAIN.value: 7.0, FP8.value: 7.5, INT8.value: 16.0}


@pytest.mark.parametrize("launch", ATTENTION)
def test_attention_reads_the_cache_16_bytes_at_a_time_ahead_of_its_use(
    compiled: dict[str, list[Compiled]], launch: str
) -> None:
    for kernel in each(compiled[launch], "attend"):
        kind = kernel.constants["KIND"]
        copies = {name for name in kernel.loop if name.startswith("LDGSTS")}  # from memory to shared memory, at once
        if kind == INT8.value:
            assert copies, kernel
        else:
            assert "LDGSTS.E.BYPASS.128" in copies, kernel
            assert copies <= {"LDGSTS.E.BYPASS.128", "LDGSTS.E.64"}, kernel  # the 8 bytes are a block's number
        is_latent = kernel.constants["VALUE_IS_KEY"]
        columns = kernel.constants["KEY_SIZE"] + (0 if is_latent else kernel.constants["VALUE_SIZE"])
        per_thread = kernel.constants["TILE"] * columns / (kernel.num_warps * 32)
        if kernel.constants["ROWS"] <= 32:
            assert sum(kernel.loop.values()) / per_thread <= INSTRUCTIONS_PER_ELEMENT_MAX[kind], kernel


@pytest.mark.parametrize("launch", [name for name in ATTENTION if name.startswith(("prompt", "many"))])
def test_long_queries_use_the_products_of_whole_warp_groups(compiled: dict[str, list[Compiled]], launch: str) -> None:
    for kernel in each(compiled[launch], "attend"):
        assert kernel.products == {"HGMMA"}, kernel


PRODUCTS = [name for name in LAUNCHES if re.match("(bf16|fp8|int8|int4|mxfp4) ", name) and "matrix, 512" not in name]

# Instructions of one thread for each weight, in the loop. A device that reads 3 TB/s has 20 to spare for bf16, 10 for
# int8 and fp8, and 6.2 for int4 (0.625 bytes), of which 3.3 to 4 are used, half of them for half the weights of a
# tile's word. mxfp4, as long, needs one more for a sign, and GPT-OSS's has tiles of 64 inputs. fp8's are operands as
# they are: what is counted is mostly their scales.
INSTRUCTIONS_PER_WEIGHT_MAX = {"bf16": 3.0, "fp8": 2.0, "int8": 7.0, "int4": 4.5, "mxfp4": 6.0}


@pytest.mark.parametrize("launch", PRODUCTS)
def test_products_use_whole_warp_groups_and_few_instructions_for_a_weight(
    compiled: dict[str, list[Compiled]], launch: str
) -> None:
    for kernel in each(compiled[launch], "_product"):
        constants = kernel.constants
        assert kernel.products == {"QGMMA" if constants["FORMAT"] == "fp8" else "HGMMA"}, kernel  # Q: of 8 bits
        copies = {name for name in kernel.loop if name.startswith("LDGSTS")}
        # int8 is copied 8 bytes at a time: Triton's layout of an operand that it widens itself; mxfp4's scales, because
        # GPT-OSS's tiles are of 64 inputs. Where int4's groups are as deep as a tile, a row has one scale of 4 bytes.
        narrow = {
            "int8": "LDGSTS.E.64",
            "mxfp4": "LDGSTS.E.64",
            "int4": "LDGSTS.E" if constants["SCALE_GROUP"] == constants["DEPTH"] else "",
        }
        assert copies == {"LDGSTS.E.BYPASS.128", narrow.get(constants["FORMAT"], "")} - {""}, kernel
        num_weights = (1 + constants["IS_GATED"]) * constants["OUTPUTS"] * constants["DEPTH"]
        if constants["TOKENS"] <= 32:  # with more, arithmetic is the bound
            per_weight = sum(kernel.loop.values()) * kernel.num_warps * 32 / num_weights
            assert per_weight <= INSTRUCTIONS_PER_WEIGHT_MAX[constants["FORMAT"]], kernel
