"""Which drafter the settings ask for, and the model that it may need.

Owns the checks that a model can draft for another. Four are there: prompt lookup, the model itself with fewer experts,
its layer for multi-token prediction, and a model of its own.
"""

from collections.abc import Callable

from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig
from engine.drafting import Drafter
from engine.errors import EngineMisconfigured
from engine.loader import load
from engine.lookup import PromptLookup
from engine.model_drafter import DraftCache, ModelDrafter, OwnCache, SharedCache
from engine.models.decoder import Decoder, KVCache
from engine.models.spec import Mixture
from kernels.ops import Ops


def forward_into(decoder: Decoder, cache: KVCache) -> Callable[[Batch], Tensor]:
    """The decoder over this cache: a batch's logits (R, V)."""

    def forward(batch: Batch) -> Tensor:
        return decoder.forward(batch.token_ids, batch.positions, batch.attention, cache, batch.rows)

    return forward


def draft_into(decoder: Decoder, cache: KVCache) -> Callable[[Batch], Tensor]:
    """The decoder's layer for multi-token prediction over this cache: a batch's logits (R, V)."""

    def draft(batch: Batch) -> Tensor:
        return decoder.draft(batch.token_ids, batch.positions, batch.attention, cache, batch.rows)

    return draft


def load_draft_model(config: EngineConfig, target: Decoder, ops: Ops) -> Decoder | None:
    """The model that drafts, where the settings name one.

    Raises ModelError where its checkpoint cannot be used, EngineMisconfigured where it speaks of other tokens.
    """
    if not config.draft_model:
        return None
    draft = load(config.draft_model, ops, weights=config.draft_weights, dtype=target.dtype, device=target.device)
    if draft.spec.vocab_size != target.spec.vocab_size:
        raise EngineMisconfigured(
            f"the draft model {config.draft_model} has a vocabulary of {draft.spec.vocab_size} tokens, the model one "
            f"of {target.spec.vocab_size}: only a model with the same vocabulary can draft for it"
        )
    return draft


def make_drafter(
    config: EngineConfig,
    target: Decoder,
    cache: KVCache,
    draft_model: Decoder | None,
    own_cache: KVCache | None,
    ops: Ops,
) -> Drafter:
    """A drafter for a model with this cache. Raises EngineMisconfigured where it has no experts to leave out."""

    def drafts(forward: Callable[[Batch], Tensor], kept: DraftCache, context_max: int) -> ModelDrafter:
        return ModelDrafter(
            forward,
            ops,
            kept,
            block_size=config.block_size,
            device=target.device,
            tokens_max=config.tokens_per_step_max,
            context_max=context_max,
        )

    context_max = target.spec.context_max
    if draft_model and own_cache:
        forward = forward_into(draft_model, own_cache)
        return drafts(forward, OwnCache(config.block_size), draft_model.spec.context_max)
    if config.draft_experts:
        _check_experts(config.draft_experts, target)
        return drafts(forward_into(target.with_experts(config.draft_experts), cache), SharedCache(), context_max)
    if config.draft_heads:
        return drafts(draft_into(target, cache), OwnCache(config.block_size, shift=1), context_max)
    return PromptLookup()


def _check_experts(num_chosen: int, target: Decoder) -> None:
    feed_forwards = [layer.feed_forward for layer in target.spec.layers]
    most = max((one.num_chosen for one in feed_forwards if isinstance(one, Mixture)), default=1)
    if num_chosen >= most:
        raise EngineMisconfigured(
            f"draft_experts is {num_chosen}; the model chooses {most} experts for each token, and drafts with fewer"
        )
