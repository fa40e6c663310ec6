"""The experts of a layer on the CPU: one prepared GEMM for each expert that has tokens, over all its tokens at once.

(Sorting and one GEMM each beat torch's grouped GEMM by 1.15 to 1.6 times, and gathering weights by 2 and more.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.ops import Linear


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
    """As the definition: a token's outputs are summed in fp32 and in the experts' order, whoever else is there.

    Biases go to the definition itself.
    """
    if gate_up_bias is not None or down_bias is not None:
        biases = gate_up_bias, down_bias
        return reference.experts(x, chosen_weights, chosen, gate_up, down, linear, activation, *biases, shared)
    of_tokens = _experts_of_one if len(x) == 1 else _experts_of_many
    routed = of_tokens(x, chosen_weights, chosen, gate_up, down, linear, activation)
    return routed if shared is None else routed + shared


def _experts_of_many(
    x: Tensor,
    chosen_weights: Tensor,
    chosen: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    linear: Linear,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    expert, order = chosen.flatten().sort(stable=True)  # (T * K,) both: pairs of a token and an expert, by expert
    tokens = order // chosen.shape[1]
    *num_tokens, num_others = torch.bincount(expert, minlength=len(gate_up) + 1).tolist()
    ours = slice(len(order) - num_others)
    tokens, order = tokens[ours], order[ours]
    outputs = [
        linear(activation(linear(rows, expert_gate_up)), expert_down)
        for rows, expert_gate_up, expert_down in zip(torch.split(x[tokens], num_tokens), gate_up, down, strict=True)
        if len(rows)
    ]
    total = torch.zeros(x.shape, dtype=torch.float32)
    if outputs:
        total.index_add_(0, tokens, torch.cat(outputs).float().mul_(chosen_weights.flatten()[order, None]))
    return total.to(x.dtype)


def _experts_of_one(
    x: Tensor,
    chosen_weights: Tensor,
    chosen: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    linear: Linear,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """The one token of a lone decode goes to every chosen expert: nothing to sort, gather or scatter."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert, weight in sorted(zip(chosen[0].tolist(), chosen_weights[0].tolist(), strict=True)):
        if expert < len(gate_up):
            output = linear(activation(linear(x, gate_up[expert])), down[expert])
            total.add_(output.float(), alpha=weight)
    return total.to(x.dtype)
