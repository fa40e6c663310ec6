"""Launches of the Triton table at the shapes of published models, for the compile-only checks.

Owns the shapes. Tensors are on torch's meta device: they have a shape, a type and no memory.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kernels.triton import elementwise


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of a shape and type alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def norms(hidden_size: int) -> None:
    x, weight = tensor(8, hidden_size), tensor(hidden_size)
    elementwise.rms_norm(x, weight, 1e-6)
    elementwise.add_rms_norm(x, x, weight, 1e-6)


def before_attention(num_heads: int, num_kv_heads: int, head_size: int) -> None:
    qkv = tensor(8, num_heads + 2 * num_kv_heads, head_size)
    angles = tensor(8, head_size // 2, dtype=torch.float32)
    rotated = elementwise.rotary(qkv[:, : num_heads + num_kv_heads], angles, angles)
    cache = tensor(1024, 16, num_kv_heads, head_size)
    slots = tensor(8, dtype=torch.int64)
    elementwise.write_kv(rotated[:, num_heads:], qkv[:, num_heads + num_kv_heads :], cache, cache, slots)


def swiglu(intermediate: int) -> None:
    elementwise.swiglu(tensor(8, 2 * intermediate))


LAUNCHES: Mapping[str, Callable[[], None]] = {
    "norms, Qwen3-30B-A3B": partial(norms, 2048),
    "norms, Mixtral": partial(norms, 4096),
    "norms, GPT-OSS": partial(norms, 2880),
    "rotate and write, Qwen3-30B-A3B": partial(before_attention, 32, 4, 128),
    "rotate and write, Mixtral": partial(before_attention, 32, 8, 128),
    "rotate and write, GPT-OSS": partial(before_attention, 64, 8, 64),
    "swiglu, Mixtral": partial(swiglu, 14336),
    "swiglu, DeepSeek-V2-Lite": partial(swiglu, 10944),
}
