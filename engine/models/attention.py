"""Grouped-query attention over the block cache.

Owns the projections and the order of rotate, write, attend. The arithmetic is the backend's.
"""

import torch
from torch import Tensor

from engine.models.layers import StepInputs, Weights
from engine.models.parameters import Parameter
from engine.models.spec import GroupedQuery, QueryKeyNorm
from kernels.ops import Ops


class GroupedQueryAttention:
    """The attention of one layer."""

    def __init__(self, spec: GroupedQuery, weights: Weights, layer: int) -> None:
        self._spec = spec
        self._ops = weights.ops
        self._layer = layer
        self._scale = spec.head_size**-0.5
        fused = [Parameter(f"attention.{role}", layer) for role in ("query", "key", "value")]
        self._qkv = weights.projection(*fused, bias=[_bias(parameter) for parameter in fused if spec.bias])
        output = Parameter("attention.output", layer)
        self._output = weights.projection(output, bias=[_bias(output)] if spec.output_bias else ())
        self._sinks = weights.tensor(Parameter("attention.sinks", layer)) if spec.sinks else None  # (H,)
        norm, norms = spec.query_key_norm, [Parameter(f"attention.{role}_norm", layer) for role in ("query", "key")]
        self._norms = [_HeadNorm(norm, weights.tensor(weight), self._ops) for weight in norms] if norm else []

    def __call__(self, x: Tensor, step: StepInputs) -> Tensor:
        """What x (T, C) adds to the residual stream (T, C). The step's keys and values are in the cache afterwards."""
        H, G = self._spec.num_heads, self._spec.num_kv_heads
        key_cache, value_cache = step.key_caches[self._layer], step.value_caches[self._layer]
        qkv = self._qkv(x).view(len(x), H + 2 * G, self._spec.head_size)  # (T, H + 2 G, D)
        rotated = self._ops.rotary(self._normed(qkv[:, : H + G]), step.cos, step.sin)  # (T, H + G, D): queries, keys
        self._ops.write_kv(rotated[:, H:], qkv[:, H + G :], key_cache, value_cache, step.batch.slots)
        attended = self._ops.attention(
            rotated[:, :H], key_cache, value_cache, step.batch, self._scale, self._spec.window, self._sinks
        )  # (T, H, D)
        return self._output(attended.flatten(1))

    def _normed(self, queries_and_keys: Tensor) -> Tensor:
        """The heads (T, H + G, D) after their norms, where the model has any."""
        if not self._norms:
            return queries_and_keys
        parts = queries_and_keys[:, : self._spec.num_heads], queries_and_keys[:, self._spec.num_heads :]
        return torch.cat([norm(part) for norm, part in zip(self._norms, parts, strict=True)], dim=1)


class _HeadNorm:
    """The RMS norm of heads (T, heads, D), over as many neighbouring numbers of a token as it has weights."""

    def __init__(self, norm: QueryKeyNorm, weight: Tensor, ops: Ops) -> None:
        self._eps = norm.eps
        self._weight = weight
        self._ops = ops

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, len(self._weight))
        return self._ops.rms_norm(rows, self._weight, self._eps).view(x.shape)


def _bias(parameter: Parameter) -> Parameter:
    return parameter._replace(role=f"{parameter.role}_bias")
