"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1) over a cache of latents.

Owns the projections and how they are taken apart. All heads' keys and values are products of one latent vector for each
token, so the latent is all that is cached, with one rotated key that the heads share. The products never run over the
cache: the keys' matrix is multiplied into the queries and the values' into the result ("absorbed"), so that `attention`
sees one key-value head whose values are the first part of its keys.
"""

import torch
from torch import Tensor

from engine.models.layers import StepInputs, Weights
from engine.models.parameters import Parameter
from engine.models.spec import Latent
from kernels.ops import Normed


class LatentAttention:
    """The attention of one layer."""

    def __init__(self, spec: Latent, weights: Weights, layer: int) -> None:
        self._spec = spec
        self._ops = weights.ops
        self._layer = layer
        self._query = _Query(spec, weights, layer)
        self._down = weights.projection(
            Parameter("latent.down", layer), order=_halves_from_pairs(1, spec.latent_size, spec.rotary_size)
        )
        self.layouts = self._query.layouts | {self._down.layout}  # of what multiplies its input
        self._norm = weights.tensor(Parameter("latent.norm", layer))  # (R,)
        up = weights.tensor(Parameter("latent.up", layer)).view(spec.num_heads, -1, spec.latent_size)
        self._key_up = up[:, : spec.plain_size].contiguous()  # (H, plain, R)
        self._value_up = up[:, spec.plain_size :].mT.contiguous()  # (H, R, Dv)
        self._output = weights.projection(Parameter("attention.output", layer))

    def __call__(self, x: Normed, step: StepInputs) -> Tensor:
        """What x (T, C) adds to the residual stream (T, C). The step's latents are in the cache afterwards."""
        H, R = self._spec.num_heads, self._spec.latent_size
        key_cache, value_cache = step.key_caches[self._layer], step.value_caches[self._layer]
        query, down = self._query(x), self._down(x)  # (T, H, plain + rotary), (T, R + rotary)
        latent = self._ops.rms_norm(down[:, :R].contiguous(), self._norm, self._spec.norm_eps)  # (T, R)
        unrotated = torch.cat([query[..., self._spec.plain_size :], down[:, None, R:]], dim=1)
        rotated = self._ops.rotary(unrotated, step.cos, step.sin)  # (T, H + 1, rotary): queries, then the shared key
        self._ops.write_kv(latent[:, None], rotated[:, H:], value_cache, key_cache[..., R:], step.batch.slots)
        plain = query[..., : self._spec.plain_size].transpose(0, 1) @ self._key_up  # (H, T, R)
        absorbed = torch.cat([plain.transpose(0, 1), rotated[:, :H]], dim=-1)  # (T, H, R + rotary)
        attended = self._ops.attention(absorbed, key_cache, value_cache, step.batch, self._spec.scale)  # (T, H, R)
        values = attended.transpose(0, 1) @ self._value_up  # (H, T, Dv)
        return self._output(values.transpose(0, 1).flatten(1))


class _Query:
    """The queries of all heads, by way of a latent of their own where the model has one."""

    def __init__(self, spec: Latent, weights: Weights, layer: int) -> None:
        self._spec = spec
        self._ops = weights.ops
        order = _halves_from_pairs(spec.num_heads, spec.plain_size, spec.rotary_size)
        self._down = self._norm = None
        if spec.query_latent_size:
            self._down = weights.projection(Parameter("latent.query_down", layer))
            self._norm = weights.tensor(Parameter("latent.query_norm", layer))
        role = "latent.query_up" if spec.query_latent_size else "latent.query"
        self._up = weights.projection(Parameter(role, layer), order=order)
        self.layouts = {(self._down or self._up).layout}

    def __call__(self, x: Normed) -> Tensor:
        """For x (T, C): (T, H, plain + rotary)."""
        if self._down is not None and self._norm is not None:
            x = self._ops.rms_norm(self._down(x), self._norm, self._spec.norm_eps)
        query = self._up(x)
        return query.view(len(query), self._spec.num_heads, -1)


def _halves_from_pairs(num_heads: int, plain_size: int, rotary_size: int) -> Tensor:
    """The order of a matrix's rows in which its rotary parts are as `Ops.rotary` has them.

    DeepSeek turns the rows (2 i, 2 i + 1) of a rotary part together, `Ops.rotary` (i, i + half). Queries and keys are
    reordered alike, so their products stay.
    """
    rotary = torch.arange(rotary_size).view(-1, 2).t().flatten()
    head = torch.cat([torch.arange(plain_size), plain_size + rotary])
    return (torch.arange(num_heads)[:, None] * len(head) + head).flatten()
