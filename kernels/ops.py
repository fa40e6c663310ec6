"""The table of operations that a backend is.

Owns the signatures. `kernels/reference.py` holds the definition of every entry in plain torch; another backend is that
table with some entries replaced (`dataclasses.replace`), so it is right before it has a single kernel. Nothing here is
global: two engines with two tables live in one process.

Letters: T tokens of the batch, S sequences, H query heads, G key-value heads, D head size (Dv the
values', where it differs), C hidden size,
I intermediate size, E experts, K chosen experts, N blocks, B block size, V vocabulary.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

Normed: TypeAlias = Any
"""What a table's `add_rms_norm` gives: a tensor (T, C), or what its products take in the place of one."""


class Plan(Protocol):
    """What a backend worked out for a batch with `queries_max`, in tensors that stay where they are."""

    def update(self, batch: "AttentionBatch") -> bool:
        """The tensors say the same of another batch of as many sequences; False where they lack room for it."""
        ...


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
    # More than 0: the same launches are to serve other sequences, with so many queries each at most. Then the plans of
    # a backend that can do it are each a `Plan`, and those of one that cannot stay empty.
    queries_max: int = 0


class Linear(Protocol):
    """x (T, in) times one prepared matrix (out, in), transposed: (T, out)."""

    def __call__(self, x: Normed, weight: Any) -> Tensor:
        """The product, in x's number format."""
        ...


class Attention(Protocol):
    """Causal softmax attention over the block cache.

    query (T, H, D), key_cache (N, B, G, D), value_cache (N, B, G, Dv) -> (T, H, Dv). The caches may be views of wider
    ones: only their last dimension is contiguous. They are of any dtype of kernels/cache.py, which says how long
    rows of int8 are. `window`: a row sees that many positions, its own the last; None: all. `sinks` (H,): each head's
    softmax has one more term, exp(sink), that adds nothing to the output.
    """

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The values (T, H, Dv) that each row's heads attend to, in query's dtype."""
        ...


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each query's and each key's head."""

    query: Tensor  # (D,)
    key: Tensor  # (D,)
    eps: float


class RotateAndWrite(Protocol):
    """From a step's heads to what attention works on: heads (T, H + 2 G, D) are queries, keys and values.

    Queries and keys are normed where there are norms, and rotated as by `rotary`; keys and values go to their slots as
    by `write_kv`.
    """

    def __call__(
        self,
        heads: Tensor,
        norms: HeadNorms | None,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """The rotated queries (T, H, D)."""
        ...


class ClampedSwiGlu(Protocol):
    """gate * sigmoid(alpha * gate) * (up + 1), after both are clamped: gate to at most `limit`, up to within plus and
    minus `limit`.
    """

    def __call__(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Gate and up (T, 2 I) -> (T, I)."""
        ...


class Route(Protocol):
    """The choice of experts: logits (T, E) -> (weights (T, K) fp32, experts (T, K) int64).

    score: "softmax" over all experts; "sigmoid" of each; "unit": the chosen count 1 each. The weights are made to sum
    to 1 where `renormalise` says so, then multiplied by `scale`. With more than one group (of E / num_groups
    neighbouring experts), only those of the `groups_chosen` groups with the largest single logit can be chosen.

    With `bias` (E,) fp32 experts are chosen by score + bias instead, and groups by the sum of their two largest such;
    the weights are the scores all the same.
    """

    def __call__(
        self,
        logits: Tensor,
        num_chosen: int,
        score: str,
        renormalise: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        groups_chosen: int = 1,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Each token's experts, the first choice first, and their weights."""
        ...


class Experts(Protocol):
    """The routed feed-forwards: x (T, C), weights (T, K), experts (T, K) -> (T, C).

    gate_up[e] and down[e] are prepared matrices (2 I, C) and (C, I) of expert e, stacked, and multiplied by `linear`,
    with `activation` (T, 2 I) -> (T, I) between: the table's `swiglu`, a `partial` of its `clamped_swiglu` with alpha
    and limit by name, or any function, which no backend can fuse. gate_up_bias (E, 2 I) and down_bias (E, C), where
    there are any. A choice that is none of the E, because another rank has it, is E with the weight 0: nothing is
    computed for it.
    """

    def __call__(
        self,
        x: Normed,
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
        """The weighted sum of each token's chosen experts, and `shared` (T, C) where there is such."""
        ...


@dataclass(frozen=True)
class WeightKernel:
    """How a backend multiplies by one layout: `prepare` and `stack` once at load, `linear` at every step.

    `prepare` takes the layout's parts by name (`kernels/weights.py`) and returns what `linear` likes best.
    `stack` takes the prepared matrices of all experts, of one shape, and returns the same in the form that
    `Ops.experts` likes best.
    """

    prepare: Callable[[Mapping[str, Tensor]], Any]
    linear: Linear
    stack: Callable[[Sequence[Any]], Sequence[Any]] = list


def _as_it_is(weight: Tensor, _layouts: Collection[str]) -> Tensor:
    return weight


def _use_torch_threads(number: int) -> None:
    if number:
        torch.set_num_threads(number)


@dataclass(frozen=True)
class Ops:
    """One backend. Every function returns new tensors unless its name says write."""

    name: str

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x (T, C), weight (C,), eps) -> (T, C)."""

    add_rms_norm: Callable[[Tensor, Tensor, Any, float], tuple[Normed, Tensor]]
    """(x, residual, weight, eps) -> (rms_norm(x + residual), x + residual).

    The weight is (C,), and then the norm is a tensor, or what `prepare_norm` made of such.
    """

    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x (T, heads, D), cos (T, D/2), sin (T, D/2)) -> (T, heads, D): halves rotated, Llama's layout."""

    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """(key (T, G, D), value (T, G, Dv), key_cache (N, B, G, D), value_cache (N, B, G, Dv), slots (T,)).

    The caches are as in `Attention`.
    """

    rotate_and_write: RotateAndWrite

    attention: Attention

    swiglu: Callable[[Tensor], Tensor]
    """(gate and up side by side (T, 2 I)) -> silu(gate) * up (T, I)."""

    clamped_swiglu: ClampedSwiGlu

    route: Route

    experts: Experts

    sample: Callable[[Tensor, Sequence["SamplingRow"]], Tensor]
    """(logits (R, V) fp32, one SamplingRow for each row) -> token ids (R,) int64.

    -1 where a row has no largest finite logit: a NaN or plus infinity among them, or nothing but minus infinities.
    """

    logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    """(logits (R, V) fp32, chosen ids (R,), num_top) -> (chosen's (R,), ids of the likeliest (R, num_top), theirs).

    Natural logarithms of the model's own probabilities, before temperature; the likeliest first, the lower id on ties.
    """

    weights: Mapping[str, WeightKernel]
    """By layout. One without an entry is unpacked and multiplied: slow and right."""

    prepare_norm: Callable[[Tensor, Collection[str]], Any] = _as_it_is
    """(weight (C,), the layouts of what multiplies the norm's output) -> what `add_rms_norm` takes; once, at load.

    Where products of such a layout begin by rounding what they read, the norm can leave it rounded.
    """

    use_threads: Callable[[int], None] = _use_torch_threads
    """Divides the work of this process among so many processor threads; 0: as many as torch took at its start."""


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
