"""Every op in plain torch: the definition that all backends are compared with.

Owns what is right, not what is fast: sums, norms and softmaxes run in fp32 (the sampler in fp64), results take the
dtype of the input. Runs on any device, in fp32 and bf16, with any number of tokens including none. `OPS` is the table.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import weights
from kernels.ops import AttentionBatch, Linear, Ops, SamplingRow, WeightKernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divides x by its root mean square and multiplies by weight (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # (T, 1)
    return (x32 * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum is rounded to x's dtype first: the norm sees what the next layer's residual sees."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) by their angle (RoFormer, arXiv 2104.09864, in Llama's layout)."""
    first, second = x.float().chunk(2, dim=-1)  # (T, heads, D/2) each
    cos, sin = cos.float()[:, None], sin.float()[:, None]  # the same for all heads
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Each token's key and value stand in its slot, in the cache's dtype."""
    key_cache.view(-1, *key.shape[1:])[slots] = key.to(key_cache.dtype)
    value_cache.view(-1, *value.shape[1:])[slots] = value.to(value_cache.dtype)


def attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Softmax(query key^T scale) value of each sequence over its own blocks; slots past its context are never read."""
    outputs = [
        _attend(query[start:end], _context(key_cache, table, length), _context(value_cache, table, length), scale)
        for table, (start, end), length in zip(
            batch.block_tables, pairwise(batch.query_starts), batch.context_lens, strict=True
        )
    ]
    return torch.cat(outputs) if outputs else torch.empty_like(query)


def _context(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The cached keys or values of positions 0 .. length - 1: (length, G, D) fp32."""
    block_size = cache.shape[1]
    position = torch.arange(length, device=cache.device)
    return cache[block_table[position // block_size], position % block_size].float()


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The Q rows of query (Q, H, D) stand at the last Q of key's and value's positions; each sees up to its own."""
    num_queries, num_heads, _ = query.shape
    heads_per_group = num_heads // key.shape[1]
    key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))  # (length, H, D)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(len(key) - num_queries + 1)
    probabilities = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value).to(query.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def route(logits: Tensor, num_chosen: int, score: str, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The experts of the largest logits, by which all scores rise; the lower expert on ties.

    Raises ValueError for an unknown score.
    """
    logits = logits.float()
    experts = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]  # (T, K)
    chosen = _scores(logits, score).gather(-1, experts)
    return (chosen / chosen.sum(-1, keepdim=True) if renormalise else chosen), experts


def _scores(logits: Tensor, score: str) -> Tensor:
    match score:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "unit":
            return torch.ones_like(logits)
    raise ValueError(f'router score {score!r} is not one of "softmax", "sigmoid", "unit"')


def experts(
    x: Tensor,
    chosen_weights: Tensor,
    chosen: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    linear: Linear,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the chosen experts' outputs for each token, summed in fp32."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(gate_up)):
        tokens, places = torch.where(chosen == expert)
        if len(tokens):
            output = linear(activation(linear(x[tokens], gate_up[expert])), down[expert])  # (tokens of the expert, C)
            total.index_add_(0, tokens, output.float() * chosen_weights[tokens, places, None].float())
    return total.to(x.dtype)


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Row by row, by sorting: the words of `SamplingRow` as code."""
    tokens = [_sample_row(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _sample_row(logits: Tensor, row: SamplingRow) -> int:
    banned = torch.tensor(row.banned, dtype=torch.int64, device=logits.device)
    logits = logits.double().index_fill(0, banned, -torch.inf)
    if not torch.isfinite(logits.max()):
        return -1
    ordered, ids = logits.sort(descending=True, stable=True)  # equal logits stay in order of their ids
    if row.temperature == 0:
        return int(ids[0])
    mass = ((ordered - ordered[0]) / row.temperature).exp()  # relative to the likeliest token's
    if row.top_k:
        mass = mass[: row.top_k]
    mass_before = mass.cumsum(0) - mass
    mass = mass[(mass_before < row.top_p * mass.sum()) | (mass_before == 0)]  # the likeliest one always stays
    mass = mass[mass >= row.min_p]
    cumulative = mass.cumsum(0)
    return int(ids[(cumulative <= row.uniform * cumulative[-1]).sum()])  # uniform < 1: less than all, also if rounded


def logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """By a log-softmax over the whole vocabulary and a sort of it."""
    scores = logits.float().log_softmax(-1)  # (R, V)
    top = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return scores.gather(-1, chosen[:, None])[:, 0], top, scores.gather(-1, top)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies by weight^T in fp32, rounded once to x's dtype."""
    return functional.linear(x.float(), weight).to(x.dtype)


def _unpacked(dequantize: Callable[[weights.Parts], Tensor]) -> WeightKernel:
    """Unpack to fp32 once, multiply in fp32: right for every format, at four bytes a weight."""
    return WeightKernel(prepare=lambda parts: dequantize(parts).float(), linear=linear)


OPS = Ops(
    name="reference",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotary=rotary,
    write_kv=write_kv,
    attention=attention,
    swiglu=swiglu,
    route=route,
    experts=experts,
    sample=sample,
    logprobs=logprobs,
    weights={
        "fp32": _unpacked(weights.dequantize_dense),
        "bf16": _unpacked(weights.dequantize_dense),
        "int8": _unpacked(weights.dequantize_int8),
        "int4": _unpacked(weights.dequantize_int4),
    },
)
