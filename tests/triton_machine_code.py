"""A small model of the machine code that kernels contain: what the interpreter cannot run.

Owns the few instructions of PTX that we use.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def bf16(bits: Tensor) -> Tensor:
    """The lower 16 bits as a number."""
    return (bits & 0xFFFF).to(torch.uint16).view(torch.bfloat16)


def halves(operate: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> Callable[..., Tensor]:
    """An operation on numbers as one on both halves of registers, rounded once to the dtype."""

    def on_registers(*registers: Tensor) -> Tensor:
        low, high = (
            operate(*(((x >> shift) & 0xFFFF).to(torch.uint16).view(dtype).float() for x in registers)).to(dtype)
            for shift in (0, 16)
        )
        return low.view(torch.uint16).long() | (high.view(torch.uint16).long() << 16)

    return on_registers


def e4m3(bits: Tensor) -> Tensor:
    """The lower 8 bits as a number of fp16."""
    return (bits & 0xFF).to(torch.uint8).view(torch.float8_e4m3fn).half().view(torch.uint16).long()


def chosen_bytes(a: Tensor, b: Tensor, places: Tensor) -> Tensor:
    """Four of the eight bytes of a (the lower four) and b, each by a digit of `places`, the lowest first."""
    eight = a | (b << 32)
    digits = [int(places[0]) >> (4 * i) & 7 for i in range(4)]
    return sum((((eight >> (8 * digit)) & 0xFF) << (8 * i) for i, digit in enumerate(digits)), torch.zeros_like(a))


INSTRUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "shl.b32": lambda x, places: (x << places) & 0xFFFFFFFF,
    "and.b32": torch.bitwise_and,
    "shr.u32": lambda x, places: x >> places,
    "lop3.b32": lambda a, b, c, table: torch.where(table == 0xEA, (a & b) | c, -1),  # the table of that function
    "sub.rn.bf16x2": halves(torch.sub),
    "sub.rn.f16x2": halves(torch.sub, torch.float16),
    "xor.b32": torch.bitwise_xor,
    "prmt.b32": chosen_bytes,
    "cvt.rn.f16x2.e4m3x2": lambda x: e4m3(x) | (e4m3(x >> 8) << 16),
    "mul.rn.bf16x2": halves(torch.mul),
    "fma.rn.bf16x2": halves(lambda a, b, c: a * b + c),  # the product of two bf16 is exact in fp32
}


def run_machine_code(code: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers, of 32 bits as int64, after PTX of the few instructions that our kernels use."""

    size = next(iter(registers.values())).shape

    def value(name: str) -> Tensor:
        return torch.full(size, int(name, 0)) if name[0].isdigit() else registers[name]

    for statement in code.strip().strip("{}").split(";"):
        operation, _, rest = statement.strip().partition(" ")
        names = re.findall(r"[$\w]+", rest)
        if operation == "mov.b32" and len(names) == 2:
            registers[names[0]] = value(names[1])
        elif operation == "mov.b32" and rest.startswith("{"):  # a register into its halves
            registers[names[0]], registers[names[1]] = value(names[2]) & 0xFFFF, value(names[2]) >> 16
        elif operation == "mov.b32":
            registers[names[0]] = value(names[1]) | (value(names[2]) << 16)
        elif operation and operation != ".reg":
            registers[names[0]] = INSTRUCTIONS[operation](*map(value, names[1:]))
    return registers
