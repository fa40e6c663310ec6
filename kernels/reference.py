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
from kernels.cache import FP8_MAX, by_slot, bytes_of, decode, encode, kept_size
from kernels.ops import AttentionBatch, HeadNorms, Linear, Ops, RotateAndWrite, SamplingRow, WeightKernel

ACTIVATION_GROUP = 64  # neighbours along `in` that share a scale: docs/decisions/0016-rows-quantized-on-cpu.md


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
    """Each token's key and value stand in its slot, as the cache keeps them."""
    for x, kept in ((key, key_cache), (value, value_cache)):
        by_slot(kept)[slots] = bytes_of(encode(x, kept.dtype))


def rotate_and_write_by(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor],
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None],
) -> RotateAndWrite:
    """The definition of `rotate_and_write`, from a table's own parts."""

    def rotate_and_write(
        heads: Tensor,
        norms: HeadNorms | None,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        num_groups = key_cache.shape[2]
        num_heads = heads.shape[1] - 2 * num_groups
        unrotated = heads[:, : num_heads + num_groups]
        if norms is not None:
            parts = (unrotated[:, :num_heads], norms.query), (unrotated[:, num_heads:], norms.key)
            unrotated = torch.cat([rms_norm(part.contiguous(), weight, norms.eps) for part, weight in parts], dim=1)
        rotated = rotary(unrotated, cos, sin)
        write_kv(rotated[:, num_heads:], heads[:, num_heads + num_groups :], key_cache, value_cache, slots)
        return rotated[:, :num_heads]

    return rotate_and_write


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax(query key^T scale) value of each sequence over its own blocks; slots past its context are never read.

    Windows as in Mistral (arXiv 2310.06825), sinks as in GPT-OSS (after arXiv 2309.17453).
    """
    outputs = []
    for table, (start, end), length in zip(
        batch.block_tables, pairwise(batch.query_starts), batch.context_lens, strict=True
    ):
        key, value = _context(key_cache, table, length), _context(value_cache, table, length)
        outputs.append(_attend(query[start:end], key, value, scale, window, sinks))
    return torch.cat(outputs) if outputs else query.new_empty(*query.shape[:2], kept_size(value_cache))


def _context(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The cached keys or values of positions 0 .. length - 1: (length, G, D) fp32."""
    block_size = cache.shape[1]
    position = torch.arange(length, device=cache.device)
    rows = bytes_of(cache)[block_table[position // block_size], position % block_size]
    return decode(rows.view(cache.dtype))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """The Q rows of query (Q, H, D) stand at the last Q of key's and value's positions; each sees up to its own."""
    num_queries, num_heads, _ = query.shape
    heads_per_group = num_heads // key.shape[1]
    key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))  # (length, H, D)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    position = torch.arange(len(key), device=query.device)
    distance = position[len(key) - num_queries :, None] - position  # (Q, length): how far back a position lies
    unseen = (distance < 0) | (distance >= (window or len(key)))
    scores = scores.masked_fill(unseen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, num_queries, 1)], dim=-1)
    probabilities = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", probabilities, value).to(query.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """GPT-OSS's gate (arXiv 2508.10925): a sharper sigmoid, bounded inputs, and up counted from 1."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(gate_up.dtype)


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
    """The experts of the largest logits, by which all scores rise; the lower expert, and the lower group, on ties.

    Groups as in DeepSeek-V2 (arXiv 2405.04434, 2.2.2); with a bias, which balances the experts' load, as in DeepSeek-V3
    (arXiv 2412.19437, 2.1.2). Raises ValueError for an unknown score.
    """
    logits = logits.float()
    scores = _scores(logits, score)
    ranks, num_best = (logits, 1) if bias is None else (scores + bias, 2)  # what the choice is by, and a group's of it
    eligible = _within_best_groups(ranks, num_groups, groups_chosen, num_best) if num_groups > 1 else ranks
    experts = eligible.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]  # (T, K)
    chosen = scores.gather(-1, experts)
    return scale * (chosen / chosen.sum(-1, keepdim=True) if renormalise else chosen), experts


def _within_best_groups(ranks: Tensor, num_groups: int, groups_chosen: int, num_best: int) -> Tensor:
    """The ranks (T, E), with -inf for the experts of all but the groups whose `num_best` best have the largest sum."""
    grouped = ranks.view(len(ranks), num_groups, -1)
    best = grouped.topk(min(num_best, grouped.shape[-1]), dim=-1).values.sum(-1)  # (T, groups)
    groups = best.sort(dim=-1, descending=True, stable=True).indices[:, :groups_chosen]
    excluded = torch.ones_like(best, dtype=torch.bool).scatter_(-1, groups, False)
    return ranks.masked_fill(excluded.repeat_interleave(ranks.shape[-1] // num_groups, dim=-1), -torch.inf)


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
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """The weighted sum of the chosen experts' outputs for each token, in fp32; rounded, what is shared is added."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(gate_up)):
        tokens, places = torch.where(chosen == expert)
        if len(tokens):
            inner = linear(x[tokens], gate_up[expert])  # (tokens of the expert, 2 I)
            inner = activation(inner if gate_up_bias is None else inner + gate_up_bias[expert])
            output = linear(inner, down[expert])  # (tokens of the expert, C)
            output = output if down_bias is None else output + down_bias[expert]
            total.index_add_(0, tokens, output.float() * chosen_weights[tokens, places, None].float())
    routed = total.to(x.dtype)
    return routed if shared is None else routed + shared


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Row by row, by sorting: the words of `SamplingRow` as code."""
    tokens = [_sample_row(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)]
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)


def _sample_row(logits: Tensor, row: SamplingRow) -> int:
    logits = logits.double()
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


def quantize_rows(x: Tensor) -> Tensor:
    """What a backend that multiplies integers makes of activations (T, in): 255 even levels for each group, in fp32.

    A group is 64 neighbours of a row, or what is left of it. Its levels reach from minus its largest magnitude to plus
    it. A group with anything not finite is all NaN.
    """
    padded = functional.pad(x.float(), (0, -x.shape[1] % ACTIVATION_GROUP))
    groups: Tensor = padded.unflatten(1, (-1, ACTIVATION_GROUP))  # type: ignore[no-untyped-call]  # (T, groups, 64)
    magnitude = groups.abs().amax(-1, keepdim=True)  # (T, groups, 1)
    per_level = torch.full_like(magnitude, 127.0) / magnitude  # `127 / magnitude` would round twice
    levels = (groups * torch.where(magnitude == 0, 0.0, per_level)).round()
    return (levels * (magnitude / 127.0)).flatten(1)[:, : x.shape[1]]


def quantize_rows_fp8(x: Tensor) -> Tensor:
    """What a backend that multiplies e4m3 makes of activations (T, in): e4m3 of each group, scaled to reach 448; fp32.

    A group is 128 neighbours of a row, or what is left of it: docs/decisions/0028-fp8-by-fp8-on-triton.md. A group with
    anything not finite is all NaN.
    """
    padded = functional.pad(x.float(), (0, -x.shape[1] % weights.FP8_GROUP))
    groups: Tensor = padded.unflatten(1, (-1, weights.FP8_GROUP))  # type: ignore[no-untyped-call]
    magnitude = groups.abs().amax(-1, keepdim=True)  # (T, groups, 1)
    per_level = torch.full_like(magnitude, FP8_MAX) / magnitude
    levels = (groups * torch.where(magnitude == 0, 0.0, per_level)).to(torch.float8_e4m3fn).float()
    return (levels * (magnitude / FP8_MAX)).flatten(1)[:, : x.shape[1]]


def _unpacked(dequantize: Callable[[weights.Parts], Tensor]) -> WeightKernel:
    """Unpack to fp32 once, multiply in fp32: right for every layout, at four bytes a weight."""
    return WeightKernel(prepare=lambda parts: dequantize(parts).float(), linear=linear)


OPS = Ops(
    name="reference",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotary=rotary,
    write_kv=write_kv,
    rotate_and_write=rotate_and_write_by(rms_norm, rotary, write_kv),
    attention=attention,
    swiglu=swiglu,
    clamped_swiglu=clamped_swiglu,
    route=route,
    experts=experts,
    sample=sample,
    logprobs=logprobs,
    weights={layout: _unpacked(dequantize) for layout, dequantize in weights.DEQUANTIZE.items()},
)
