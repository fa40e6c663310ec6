"""The table of operations that a backend is.

Owns the signatures. `kernels/reference.py` holds the definition of every entry in plain torch; another backend is that
table with some entries replaced (`dataclasses.replace`), so it is right before it has a single kernel. Nothing here is
global: two engines with two tables live in one process.

Letters: T tokens of the batch, S sequences, H query heads, G key-value heads, D head size, C hidden size,
I intermediate size, E experts, K chosen experts, N blocks, B block size, V vocabulary.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """Where the T tokens of a step stand: sequence s owns the rows query_starts[s] .. query_starts[s+1].

    Its rows are the last ones of its context: row j of sequence s stands at position
    context_lens[s] - (query_starts[s+1] - query_starts[s]) + j and attends to every position up to its own.
    The host copies let a backend plan without asking the device.
    """

    block_tables: Tensor  # (S, blocks of the longest context) int64, padded with 0
    query_starts: Sequence[int]  # S + 1
    context_lens: Sequence[int]  # S, including this step's tokens
    slots: Tensor  # (T,) int64: block * B + place in the block, where each token's key and value go
    plans: dict[Hashable, Any] = field(default_factory=dict)  # what a backend worked out at one layer, for the others


class Linear(Protocol):
    """x (T, in) times one prepared matrix (out, in), transposed: (T, out)."""

    def __call__(self, x: Tensor, weight: Any) -> Tensor:
        """The product, in x's number format."""
        ...


@dataclass(frozen=True)
class WeightKernel:
    """How a backend multiplies by one weight format: `prepare` once at load, `linear` at every step.

    `prepare` takes the format's parts by name (`engine/quant` documents them) and returns what `linear` likes best.
    """

    prepare: Callable[[Mapping[str, Tensor]], Any]
    linear: Linear


@dataclass(frozen=True)
class Ops:
    """One backend. Every function returns new tensors unless its name says write."""

    name: str

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x (T, C), weight (C,), eps) -> (T, C)."""

    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x, residual, weight, eps) -> (rms_norm(x + residual), x + residual)."""

    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (T, heads, D), cos (T, D/2), sin (T, D/2)) -> (T, heads, D): halves rotated, Llama's layout."""

    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """(key (T, G, D), value (T, G, D), key_cache (N, B, G, D), value_cache (N, B, G, D), slots (T,))."""

    attention: Callable[[Tensor, Tensor, Tensor, AttentionBatch, float], Tensor]
    """(query (T, H, D), key_cache, value_cache, batch, scale) -> (T, H, D); causal, over the block cache."""

    swiglu: Callable[[Tensor], Tensor]
    """(gate and up side by side (T, 2 I)) -> silu(gate) * up (T, I)."""

    route: Callable[[Tensor, int, str, bool], tuple[Tensor, Tensor]]
    """(logits (T, E), K, score, renormalise) -> (weights (T, K) fp32, experts (T, K) int64).

    score: "softmax" over the experts; "sigmoid" of each; "unit": the chosen count 1 each.
    """

    experts: Callable[
        [Tensor, Tensor, Tensor, Sequence[Any], Sequence[Any], Linear, Callable[[Tensor], Tensor]], Tensor
    ]
    """(x (T, C), weights (T, K), experts (T, K), gate_up, down, linear, activation) -> (T, C).

    gate_up[e] and down[e] are prepared matrices (2 I, C) and (C, I) of expert e, multiplied by `linear`.
    """

    sample: Callable[[Tensor, Sequence["SamplingRow"]], Tensor]
    """(logits (R, V) fp32, one SamplingRow for each row) -> token ids (R,) int64.

    -1 where a row has no largest finite logit: a NaN or infinity among them, or every token banned.
    """

    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    """(logits (R, V), chosen ids (R,), num_top) -> (chosen's (R,), ids of the likeliest (R, num_top), theirs).

    Natural logarithms of the model's own probabilities, before temperature; the likeliest first, the lower id on ties.
    """

    weights: Mapping[str, WeightKernel]
    """By weight format. A format without an entry is unpacked and multiplied: slow and right."""


@dataclass(frozen=True)
class SamplingRow:
    """How one row of logits becomes a token: temperature, then top-k, then top-p, then min-p, then the draw.

    `uniform` in [0, 1) is the row's whole randomness: the token is the first, in order of falling probability (equal
    ones by rising id), whose cumulative probability exceeds it. Temperature 0: the largest logit, the lowest id on
    ties.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float
    banned: tuple[int, ...] = ()  # token ids that may not be drawn (stop tokens before tokens_min)
