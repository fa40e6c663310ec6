"""The CPU table in C++: the few ops that a step consists of, each one call.

Owns the table. `*.cpp` and `*.h` hold the kernels, `build.py` gets them compiled, `packing.py` lays weights out for
them. Products with int8, int4 and mxfp4 weights quantize activations by groups of a row (`reference.quantize_rows`);
all others are in fp32. What a row becomes does not depend on the other rows of the batch, to the bit.
The threads are our own (`threads.h`): torch's would look for work on the same cores for milliseconds after each op.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels import cpu, reference
from kernels.cpu import experts as torch_experts
from kernels.cpu import sample
from kernels.cpu.native import packing
from kernels.cpu.native.build import Unavailable, load
from kernels.cpu.native.packing import PACK, Packed, PackedExperts
from kernels.ops import AttentionBatch, Linear, Ops, WeightKernel

__all__ = ["Unavailable", "ops"]


THREADS = torch.get_num_threads()  # before anybody has changed it: the cores, or OMP_NUM_THREADS


@cache
def ops() -> Ops:
    """The table. Raises Unavailable where there are no C++ kernels."""
    load()
    calls = torch.ops.tokenmill_cpu
    return dataclasses.replace(
        cpu.OPS,
        name="cpu",
        rms_norm=calls.rms_norm.default,
        add_rms_norm=calls.add_rms_norm.default,
        rotary=calls.rotary.default,
        write_kv=calls.write_kv.default,
        rotate_and_write=reference.rotate_and_write_by(
            calls.rms_norm.default, calls.rotary.default, calls.write_kv.default
        ),
        attention=attention,
        swiglu=swiglu,
        route=route,
        experts=experts,
        sample=partial(sample.sample, greatest=calls.greatest.default),
        use_threads=use_threads,
        weights={**cpu.OPS.weights, **{name: WeightKernel(pack, linear, packing.stack) for name, pack in PACK.items()}},
    )


def use_threads(number: int) -> None:
    """As the definition. Torch is left with one: what it does is small, and its others would be in the way."""
    torch.ops.tokenmill_cpu.use_threads.default(number or THREADS)
    torch.set_num_threads(1)


def linear(x: Tensor, weight: Packed) -> Tensor:
    """As the definition, with x rounded as its format has it."""
    product: Tensor = torch.ops.tokenmill_cpu.linear.default(x, weight.data, weight.format, weight.out)
    return product


def swiglu(gate_up: Tensor) -> Tensor:
    """As the definition."""
    gated: Tensor = torch.ops.tokenmill_cpu.swiglu.default(gate_up)
    return gated


def experts(
    x: Tensor,
    chosen_weights: Tensor,
    chosen: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    linear: Linear,
    activation: Callable[[Tensor], Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """As the definition: in one call, where the experts are packed alike, gated by `swiglu` and without biases."""
    plain = activation is swiglu and gate_up_bias is None and down_bias is None
    if not (plain and isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts)) or (
        gate_up.format != down.format
    ):
        return torch_experts.experts(
            x, chosen_weights, chosen, gate_up, down, linear, activation, gate_up_bias, down_bias, shared
        )
    routed: Tensor = torch.ops.tokenmill_cpu.experts.default(
        x, chosen_weights, chosen, gate_up.data, down.data, gate_up.format, gate_up.out // 2
    )
    return routed if shared is None else routed + shared


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the definition."""
    attended: Tensor = torch.ops.tokenmill_cpu.attention.default(
        query, key_cache, value_cache, batch.block_tables, batch.query_starts, batch.context_lens, scale, window, sinks
    )
    return attended


def route(
    logits: Tensor,
    num_chosen: int,
    score: str,
    renormalise: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    groups_chosen: int = 1,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the definition, which does it where experts are grouped, or chosen with a bias."""
    if num_groups > 1 or bias is not None:
        return reference.route(logits, num_chosen, score, renormalise, scale, num_groups, groups_chosen, bias)
    weights, chosen = torch.ops.tokenmill_cpu.route.default(logits, num_chosen, score, renormalise, scale)
    return weights, chosen
