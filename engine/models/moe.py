"""The mixture-of-experts feed-forward.

Owns which matrices are the router, the experts and the shared expert. Choosing and multiplying are the backend's.
"""

from torch import Tensor

from engine.models.layers import SwiGlu, Weights
from engine.models.parameters import Parameter
from engine.models.spec import Mixture


class MixtureOfExperts:
    """The mixture of one layer (Shazeer et al. 2017, arXiv 1701.06538)."""

    def __init__(self, spec: Mixture, weights: Weights, layer: int) -> None:
        self._spec = spec
        self._ops = weights.ops
        bias = [Parameter("router_bias", layer)] if spec.router_bias else ()
        self._router = weights.dense_projection(weights.tensor(Parameter("router", layer)), bias)
        self._shared = _Shared(spec, weights, layer) if spec.shared_intermediate else None
        gate_up, down = [], []
        for expert in range(spec.num_experts):
            fused = (Parameter(f"expert.{role}", layer, expert) for role in ("gate", "up"))
            gate_up.append(weights.projection(*fused))
            down.append(weights.projection(Parameter("expert.down", layer, expert)))
        kernel = down[0].kernel
        self._linear = kernel.linear
        self._gate_up = kernel.stack([projection.weight for projection in gate_up])
        self._down = kernel.stack([projection.weight for projection in down])

    def __call__(self, x: Tensor) -> Tensor:
        """The weighted sum of each token's chosen experts, plus the shared expert: x (T, C) -> (T, C)."""
        logits = self._router(x)  # (T, E)
        weights, chosen = self._ops.route(logits, self._spec.num_chosen, self._spec.score, self._spec.renormalise)
        routed = self._ops.experts(x, weights, chosen, self._gate_up, self._down, self._linear, self._ops.swiglu)
        return routed if self._shared is None else routed + self._shared(x)


class _Shared:
    """The expert of every token, counted whole or by a gate of its own."""

    def __init__(self, spec: Mixture, weights: Weights, layer: int) -> None:
        self._expert = SwiGlu(weights, layer, role="shared")
        gate = Parameter("shared_gate", layer)
        self._gate = weights.dense_projection(weights.tensor(gate)) if spec.shared_gate else None

    def __call__(self, x: Tensor) -> Tensor:
        """What x (T, C) gets from it (T, C)."""
        output = self._expert(x)
        return output if self._gate is None else output * self._gate(x).sigmoid()
