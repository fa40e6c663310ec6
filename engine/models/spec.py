"""All that the decoder needs to know of a model, as data.

Owns `ModelSpec` and its parts; they come from a checkpoint by `engine/models/hf.py`, which sets their limits. A model
of a known kind is one value of this. A new mixer is one more member of `Mixer`, and one module that computes it. No
code that computes ever asks for a model's name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearScaling:
    """All angles divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow angles divided by `factor`, fast ones kept, smooth between (Llama 3.1's rope_type "llama3").

    An angle's speed is counted in turns within `original_context` tokens: up to `low_freq_factor` turns is slow, from
    `high_freq_factor` turns on is fast.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """Slow angles divided by `factor`, fast ones kept, between them by the pair's number (YaRN, arXiv 2309.00071).

    An angle is fast that turns `fast_turns` times within `original_context` tokens, slow that turns `slow_turns` times;
    `whole_pairs`: the two limits are moved outwards to a pair of that speed or beyond.
    """

    factor: float
    fast_turns: float
    slow_turns: float
    original_context: int
    whole_pairs: bool


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: pair i of D/2 turns by theta ** (-2 i / D) a position, and grows by `magnitude`."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    magnitude: float = 1.0


@dataclass(frozen=True)
class QueryKeyNorm:
    """An RMS norm of queries and one of keys before they are rotated: each head by itself, or all heads together."""

    eps: float
    per_head: bool = True


@dataclass(frozen=True)
class GroupedQuery:
    """Attention of H query heads over G key-value heads (arXiv 2305.13245); H = G is the usual, G = 1 multi-query."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    bias: bool = False  # on query, key and value
    output_bias: bool = False
    query_key_norm: QueryKeyNorm | None = None
    window: int | None = None  # positions seen, the own one included; None: all before it
    sinks: bool = False  # one for each head, as in `Ops.attention`

    @property
    def rotary_size(self) -> int:
        """How much of a head is rotated."""
        return self.head_size

    @property
    def num_cached(self) -> int:
        """How many numbers the cache keeps of a token."""
        return 2 * self.num_kv_heads * self.head_size


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are products of a latent of `latent_size` numbers for each token.

    A head's query and key have a plain part, and a rotated one whose key all heads share. The queries come from a
    latent of their own where `query_latent_size` is not None. The latents are normalised.
    """

    num_heads: int
    latent_size: int
    query_latent_size: int | None
    plain_size: int
    rotary_size: int
    value_size: int
    scale: float  # of the scores
    norm_eps: float

    @property
    def num_cached(self) -> int:
        """How many numbers the cache keeps of a token: its latent and the rotated key."""
        return self.latent_size + self.rotary_size


@dataclass(frozen=True)
class Dense:
    """One feed-forward for every token."""

    intermediate: int


@dataclass(frozen=True)
class Clamp:
    """The experts' gate is that of `Ops.clamped_swiglu`."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Mixture:
    """`num_chosen` of `num_experts` for each token, beside one shared expert where `shared_intermediate` is not 0.

    `score`, `renormalise`, `scale` and the groups are those of `Ops.route`. The router's bias is a part of its logits;
    the balancing one is a part of the choice alone, and is `Ops.route`'s.
    With `shared_gate` each token counts the shared expert by the sigmoid of one more product.
    """

    num_experts: int
    num_chosen: int
    intermediate: int
    shared_intermediate: int = 0
    shared_gate: bool = False
    score: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_chosen: int = 1
    router_bias: bool = False
    balancing_bias: bool = False
    expert_bias: bool = False  # on gate and up
    expert_output_bias: bool = False  # on down
    clamp: Clamp | None = None
    held: range | None = None  # the experts that are here; None: all. The others' part of the sum is another rank's

    @property
    def experts(self) -> range:
        """The numbers of the experts that are here."""
        return range(self.num_experts) if self.held is None else self.held


Mixer = GroupedQuery | Latent
FeedForward = Dense | Mixture


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what mixes tokens, then what works on each alone."""

    mixer: Mixer
    feed_forward: FeedForward


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model: embedding, layers over one residual stream with a norm before each branch, norm, head.

    `draft_layers` are for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, 2.2), numbered behind the others. The
    model is whole without them.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    rope: Rope
    tied_embeddings: bool  # the head is the embedding
    context_max: int
    eos_token_ids: tuple[int, ...] = ()
    draft_layers: tuple[LayerSpec, ...] = ()
