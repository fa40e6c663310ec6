"""The mixture-of-experts feed-forward.

Owns which matrices are the router, the experts and the shared expert. Choosing and multiplying are the backend's.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.layers import SwiGlu, Weights
from engine.models.parameters import Parameter
from engine.models.spec import Clamp, Mixture
from engine.quant import FORMATS
from kernels.ops import Normed, Ops


class MixtureOfExperts:
    """The mixture of one layer (Shazeer et al. 2017, arXiv 1701.06538)."""

    def __init__(self, spec: Mixture, weights: Weights, layer: int) -> None:
        self._spec = spec
        self._ops = weights.ops
        bias = [Parameter("router_bias", layer)] if spec.router_bias else ()
        self._router = weights.dense_projection(weights.tensor(Parameter("router", layer)), bias)
        self._balance = weights.exact(Parameter("router_balance", layer)) if spec.balancing_bias else None  # (E,)
        self._shared = _Shared(spec, weights, layer) if spec.shared_intermediate else None
        gate_up, down = [], []
        for expert in spec.experts:
            fused = (Parameter(f"expert.{role}", layer, expert) for role in ("gate", "up"))
            gate_up.append(weights.projection(*fused))
            down.append(weights.projection(Parameter("expert.down", layer, expert)))
        self._gate_up_bias = _biases(weights, layer, spec, "gate", "up") if spec.expert_bias else None  # (E, 2 I)
        self._down_bias = _biases(weights, layer, spec, "down") if spec.expert_output_bias else None  # (E, C)
        self._activation = _activation(spec.clamp, weights.ops)
        kernel = down[0].kernel
        if len(layouts := {projection.layout for projection in gate_up + down}) > 1:
            raise ModelError(
                f"the experts of layer {layer} are kept as {' and '.join(sorted(layouts))}, which cannot be multiplied "
                f"together; set weights to one of {', '.join(FORMATS)}"
            )
        of_shared = self._shared.layouts if self._shared else set()
        self.layouts = {self._router.layout} | layouts | of_shared  # of what multiplies its input
        self._linear = kernel.linear
        self._gate_up = kernel.stack([projection.weight for projection in gate_up])
        self._down = kernel.stack([projection.weight for projection in down])

    def with_experts(self, num_chosen: int) -> "MixtureOfExperts":
        """The same weights, of which each token chooses so many experts at most."""
        other = copy.copy(self)
        other._spec = replace(self._spec, num_chosen=min(num_chosen, self._spec.num_chosen))
        return other

    def __call__(self, x: Normed) -> Tensor:
        """The weighted sum of each token's chosen experts, plus the shared expert: x (T, C) -> (T, C)."""
        spec, logits = self._spec, self._router(x)  # (T, E)
        weights, chosen = self._ops.route(
            logits,
            spec.num_chosen,
            spec.score,
            spec.renormalise,
            spec.scale,
            spec.num_groups,
            spec.groups_chosen,
            self._balance,
        )
        if spec.held is not None:
            weights, chosen = _of_held(spec.held, weights, chosen)
        return self._ops.experts(
            x,
            weights,
            chosen,
            self._gate_up,
            self._down,
            self._linear,
            self._activation,
            self._gate_up_bias,
            self._down_bias,
            None if self._shared is None else self._shared(x),
        )


def _of_held(held: range, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The experts chosen (T, K) by their places among those held, as `Ops.experts` wants those that are not."""
    places = chosen - held.start
    is_held = (places >= 0) & (places < len(held))
    return weights.where(is_held, 0), places.where(is_held, len(held))


def _biases(weights: Weights, layer: int, spec: Mixture, *fused: str) -> Tensor:
    """Each expert's biases of the matrices side by side, (E, out)."""
    names = [[Parameter(f"expert.{role}_bias", layer, expert) for role in fused] for expert in spec.experts]
    return torch.stack([torch.cat([weights.tensor(name) for name in row]) for row in names])


def _activation(clamp: Clamp | None, ops: Ops) -> Callable[[Tensor], Tensor]:
    if clamp is None:
        return ops.swiglu
    return partial(ops.clamped_swiglu, alpha=clamp.alpha, limit=clamp.limit)  # a backend can see what it is


class _Shared:
    """The expert of every token, counted whole or by a gate of its own."""

    def __init__(self, spec: Mixture, weights: Weights, layer: int) -> None:
        self._expert = SwiGlu(weights, layer, role="shared")
        gate = Parameter("shared_gate", layer)
        self._gate = weights.dense_projection(weights.tensor(gate)) if spec.shared_gate else None
        self.layouts = self._expert.layouts

    def __call__(self, x: Normed) -> Tensor:
        """What x (T, C) gets from it (T, C)."""
        output = self._expert(x)
        return output if self._gate is None else output * self._gate(x).sigmoid()
