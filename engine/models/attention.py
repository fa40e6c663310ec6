"""Grouped-query attention over the block cache.

Owns the projections and the order of rotate, write, attend. The arithmetic is the backend's.
"""

import torch
from torch import Tensor

from engine.models.layers import StepInputs, Weights
from engine.models.parameters import Parameter
from engine.models.spec import GroupedQuery, QueryKeyNorm
from kernels.ops import HeadNorms, Normed, Ops


class GroupedQueryAttention:
    """The attention of one layer."""

    def __init__(self, spec: GroupedQuery, weights: Weights, layer: int) -> None:
        self._spec = spec
        self._ops = weights.ops
        self._layer = layer
        self._scale = spec.head_size**-0.5
        fused = [Parameter(f"attention.{role}", layer) for role in ("query", "key", "value")]
        self._qkv = weights.projection(*fused, bias=[_bias(parameter) for parameter in fused if spec.bias])
        self.layouts = {self._qkv.layout}  # of what multiplies its input
        output = Parameter("attention.output", layer)
        self._output = weights.projection(output, bias=[_bias(output)] if spec.output_bias else ())
        self._sinks = weights.tensor(Parameter("attention.sinks", layer)) if spec.sinks else None  # (H,)
        self._head_norms, self._joint_norms = _norms(spec.query_key_norm, weights, layer)

    def __call__(self, x: Normed, step: StepInputs) -> Tensor:
        """What x (T, C) adds to the residual stream (T, C). The step's keys and values are in the cache afterwards."""
        H, G = self._spec.num_heads, self._spec.num_kv_heads
        key_cache, value_cache = step.key_caches[self._layer], step.value_caches[self._layer]
        qkv = self._qkv(x)
        heads = self._jointly_normed(qkv.view(len(qkv), H + 2 * G, self._spec.head_size))  # (T, H + 2 G, D)
        queries = self._ops.rotate_and_write(
            heads, self._head_norms, step.cos, step.sin, key_cache, value_cache, step.batch.slots
        )  # (T, H, D)
        attended = self._ops.attention(
            queries, key_cache, value_cache, step.batch, self._scale, self._spec.window, self._sinks
        )  # (T, H, D)
        return self._output(attended.flatten(1))

    def _jointly_normed(self, heads: Tensor) -> Tensor:
        """The heads (T, H + 2 G, D), queries and keys after norms over all of either, where the model has such."""
        if not self._joint_norms:
            return heads
        H, G = self._spec.num_heads, self._spec.num_kv_heads
        parts = heads[:, :H], heads[:, H : H + G]
        normed = [norm(part) for norm, part in zip(self._joint_norms, parts, strict=True)]
        return torch.cat([*normed, heads[:, H + G :]], dim=1)


class _JointNorm:
    """The RMS norm of all heads (T, heads, D) of a token together, whichever rank has them.

    Where ranks share a key-value head, all are shared by equally many, which leaves the mean of their squares as it is.
    """

    def __init__(self, norm: QueryKeyNorm, weight: Tensor, weights: Weights) -> None:
        self._eps = norm.eps
        self._ops: Ops = weights.ops
        self._ranks = weights.ranks
        self._size = len(weight)  # of what is here
        self._weight = self._all(weight[None])[0]

    def __call__(self, x: Tensor) -> Tensor:
        normed = self._ops.rms_norm(self._all(x.flatten(1)), self._weight, self._eps)
        return normed[:, self._ranks.rank * self._size :][:, : self._size].reshape(x.shape)

    def _all(self, part: Tensor) -> Tensor:
        return self._ranks.gather(part, self._ranks.size * self._size)


def _norms(norm: QueryKeyNorm | None, weights: Weights, layer: int) -> tuple[HeadNorms | None, list[_JointNorm]]:
    """Those of queries and keys: of each head, or of all together."""
    if norm is None:
        return None, []
    query, key = (weights.tensor(Parameter(f"attention.{role}_norm", layer)) for role in ("query", "key"))
    if norm.per_head:
        return HeadNorms(query, key, norm.eps), []
    return None, [_JointNorm(norm, weight, weights) for weight in (query, key)]


def _bias(parameter: Parameter) -> Parameter:
    return parameter._replace(role=f"{parameter.role}_bias")
