"""What the kernels become on Hopper, found out without a GPU: `python -m tests.triton_compiler NAME...`

Owns a process without the interpreter. Each named launch of `tests/triton_launches.py` runs the table's own code on
tensors without memory, and every kernel that it would launch is compiled for sm_90 as it would be there, with the
same alignments, constants and options. Prints a JSON list of `Compiled`, read from the machine code. No driver is
touched: Triton's wheel brings ptxas and the disassembler.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^\.(L_x_\d+):")


@dataclass(frozen=True)
class Compiled:
    """One kernel as machine code."""

    launch: str
    kernel: str
    constants: dict[str, Any]
    num_warps: int
    registers: int  # of each thread
    spills: int  # instructions that move registers to memory and back
    shared_bytes: int
    instructions: dict[str, int]  # name -> number in the whole kernel
    loop: dict[str, int] = field(default_factory=dict)  # of the innermost loop that multiplies matrices

    @property
    def products(self) -> set[str]:
        """The kinds of matrix instructions: HGMMA is Hopper's own, over a whole warp group."""
        return {name.partition(".")[0] for name in self.instructions if "MMA" in name}

    def count(self, pattern: str) -> int:
        """How many instructions' names match."""
        return sum(number for name, number in self.instructions.items() if re.match(pattern, name))


class _NoDriver:
    """What Triton asks of a driver before it launches, answered for a device that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_launches(names: list[str]) -> list[Compiled]:
    """The kernels of the named launches, each once a launch."""
    from tests.triton_launches import LAUNCHES

    driver.set_active(_NoDriver())
    compiled: list[Compiled] = []
    seen = set()
    run, launch = JITFunction.run, ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {p.name: a for p, a in zip(self.params, args, strict=False) if p.is_constexpr} | {
            name: value for name, value in kwargs.items() if name in self.arg_names
        }
        if (key := (launch, kernel.hash)) not in seen:
            seen.add(key)
            compiled.append(_read(launch, self.__name__, constants, kernel))
        return kernel

    JITFunction.run = compile_only
    for launch in names:
        LAUNCHES[launch]()
    return compiled


def _read(launch: str, name: str, constants: dict[str, Any], kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_output(*command, file.name) for command in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.search(line):
            instructions.append((instruction[1], instruction[2]))
    names = [instruction for instruction, _ in instructions]
    return Compiled(
        launch=launch,
        kernel=name,
        constants={name: value for name, value in constants.items() if isinstance(value, bool | int | str)},
        num_warps=kernel.metadata.num_warps,
        registers=int(registers[1]),
        spills=sum(one.startswith(("LDL", "STL")) for one in names),
        shared_bytes=kernel.metadata.shared,
        instructions=dict(Counter(names)),
        loop=dict(Counter(_product_loop(instructions, labels))),
    )


def _product_loop(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[str]:
    """The instructions of the shortest loop with a matrix product in it; none where there is no such loop."""
    bodies = []
    for place, (name, operands) in enumerate(instructions):
        target = re.search(r"L_x_\d+", operands) if name.startswith("BRA") else None
        if target and labels.get(target[0], place + 1) <= place:
            bodies.append([body for body, _ in instructions[labels[target[0]] : place + 1]])
    return min((body for body in bodies if any("MMA" in one for one in body)), key=len, default=[])


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    json.dump([asdict(one) for one in compile_launches(sys.argv[1:])], sys.stdout)
