"""What a checkpoint consists of, and how much of a machine it will take.

Owns the sums, from the headers. Reads one matrix of each role, to see how it is kept, and runs nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from msgspec import Struct

from engine.build import activation_dtype, bytes_per_block, cache_dtype, free_memory_bytes, pick_device
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.loader import Checkpoint, open_checkpoint
from engine.models import ModelSpec
from engine.models.layers import AUTO
from engine.models.parameters import Parameter, Shapes, has_format, parameters
from engine.models.parts import cut, part_of
from engine.models.spec import Mixture
from engine.quant import DENSE_FORMATS, FORMATS, Kept, keep
from engine.ranks import Ranks

# Bits of a weight as both devices' kernels keep it, by layout, its scales apart. Without C++ kernels a CPU takes more.
LOADED_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "fp8": 8, "mxfp4": 4}
# Groups that have a scale of their own, by device: the largest that divides the weight's, or else the weight's.
GROUPS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "cpu": {"int4": (64, 32), "fp8": (128,)},
    "cuda": {"int4": (128, 64, 32)},
}
# Of a group's scale, and its zero where there is one.
SCALE_BITS = {"cpu": {"int4": 32, "fp8": 32, "mxfp4": 16}, "cuda": {"int4": 32, "fp8": 32, "mxfp4": 32}}

# What a parameter is a part of, by the beginning or the end of its role. The first that fits.
KINDS = {
    "embedding": ("embedding",),
    "head": ("head",),
    "norms": ("norm",),
    "router": ("router", "router_bias", "router_balance", "shared_gate"),
    "experts": ("expert.",),
    "shared experts": ("shared.",),
    "attention": ("attention.", "latent."),
    "feed-forward": ("feed_forward.",),
}
DRAFT_LAYER = "draft layer"  # all that it has, but for the states that it keeps beside the cache


class Kind(Struct, frozen=True):
    """Parameters that do the same in every layer."""

    name: str
    parameters: int
    bytes: int  # in the checkpoint


class Part(Struct, frozen=True, kw_only=True):
    """What one rank has of the model; one that is alone has all of it."""

    parameters: int
    loaded_bytes: int  # of weights in memory
    cache_tokens: int  # that fit into what weights leave of its memory


class Inventory(Struct, frozen=True, kw_only=True):
    """A model in numbers, and what an engine with these settings needs for it."""

    kinds: tuple[Kind, ...]
    active_parameters: int  # that one token is computed with: of each mixture the chosen experts, no draft layer
    weights: str
    cache: str
    cache_bytes_per_token: int  # at each rank
    memory_bytes: int  # of the host, which its ranks share; of each GPU
    parts: tuple[Part, ...]  # by rank
    cache_tokens: int  # what the rank with the least room allows: all of them keep the same tokens


def take_inventory(
    path: Path,
    *,
    weights: str,
    cache: str,
    device: str,
    memory_bytes: int | None,
    num_ranks: int = 1,
    experts: str = "sharded",
    draft_heads: bool = False,
) -> Inventory:
    """The folder's model, in an engine with these settings (`EngineConfig`'s) and this memory; None: what is free here.

    Raises ModelError where the folder cannot be loaded, EngineMisconfigured where the settings do not suit it.
    """
    EngineConfig(ranks=num_ranks, experts=experts, draft_heads=draft_heads, drafts_max=int(draft_heads))  # as a worker
    where = _device(device, num_ranks, is_here=memory_bytes is None)
    memory_bytes = memory_bytes or _free_bytes(device, num_ranks)
    dtype = activation_dtype(where)
    ranks = [Ranks(rank, num_ranks, experts == "whole") for rank in range(num_ranks)]
    with open_checkpoint(path, ranks[0], draft_heads=draft_heads) as (spec, checkpoint):
        whole, shapes = parameters(spec), [_shapes(spec, rank) for rank in ranks]
        bits = _bits(spec, shapes[0], checkpoint, weights, where.type, ranks[0])
        dense_bits = LOADED_BITS[DENSE_FORMATS[dtype]]
        loaded = [_loaded_bytes(spec, own, bits, dense_bits) for own in shapes]
        cache_bytes = bytes_per_block(part_of(spec, ranks[0]), 1, cache_dtype(cache, dtype))
        nums_cached = [max(0, left) // cache_bytes for left in _left_bytes(memory_bytes, loaded, where)]
        return Inventory(
            kinds=tuple(_kinds(spec, whole, checkpoint)),
            active_parameters=_active(spec, whole),
            weights=weights,
            cache=cache,
            cache_bytes_per_token=cache_bytes,
            memory_bytes=memory_bytes,
            parts=tuple(
                Part(parameters=sum(map(prod, own.values())), loaded_bytes=num_bytes, cache_tokens=num_cached)
                for own, num_bytes, num_cached in zip(shapes, loaded, nums_cached, strict=True)
            ),
            cache_tokens=min(nums_cached),
        )


def _left_bytes(memory_bytes: int, loaded: list[int], device: torch.device) -> list[int]:
    """What each rank may give its cache, beside these weights."""
    if device.type == "cuda":
        return [memory_bytes - num_bytes for num_bytes in loaded]
    return [(memory_bytes - sum(loaded)) // len(loaded)] * len(loaded)


def _device(name: str, num_ranks: int, *, is_here: bool) -> torch.device:
    """Of rank 0. One that is not here can be asked about, too, if its memory is given."""
    if not is_here and name in GROUPS:
        return torch.device(name)
    return pick_device(name, 0, num_ranks)


def _free_bytes(device: str, num_ranks: int) -> int:
    """Of the host, or of the GPU that has the least."""
    return min(free_memory_bytes(pick_device(device, rank, num_ranks)) for rank in range(num_ranks))


def _shapes(spec: ModelSpec, rank: Ranks) -> Shapes:
    """What the rank has of each parameter."""
    whole = parameters(spec)
    return {
        parameter: tuple(map(len, cut(whole[parameter], shape, rank)))
        for parameter, shape in parameters(part_of(spec, rank)).items()
    }


def _kinds(spec: ModelSpec, shapes: Shapes, checkpoint: Checkpoint) -> Iterable[Kind]:
    sizes, stored = Counter[str](), Counter[str]()
    for parameter, shape in shapes.items():
        kind = _kind(spec, parameter)
        sizes[kind] += prod(shape)
        stored[kind] += checkpoint.num_bytes(parameter)
    return [Kind(name, sizes[name], stored[name]) for name in (*KINDS, DRAFT_LAYER) if name in sizes]


def _kind(spec: ModelSpec, parameter: Parameter) -> str:
    if parameter.layer is not None and parameter.layer >= len(spec.layers):
        return DRAFT_LAYER
    role = parameter.role
    return next(name for name, of in KINDS.items() if role.startswith(of) or (name == "norms" and role.endswith(of)))


def _active(spec: ModelSpec, shapes: Shapes) -> int:
    total = 0
    for parameter, shape in shapes.items():
        if _kind(spec, parameter) == DRAFT_LAYER:
            continue
        mixture = None if parameter.layer is None else spec.layers[parameter.layer].feed_forward
        if parameter.expert is None or not isinstance(mixture, Mixture) or parameter.expert < mixture.num_chosen:
            total += prod(shape)
    return total


def _bits(
    spec: ModelSpec, shapes: Shapes, checkpoint: Checkpoint, weights: str, device: str, rank: Ranks
) -> Mapping[str, float]:
    """What a weight takes in memory, by role, of those that have a format: by the first matrix of each.

    Ranks differ in how many matrices they have, and not in how those are kept.
    """
    if weights not in (AUTO, *FORMATS):
        raise ModelError(f"weights {weights!r} is not one of {', '.join((AUTO, *FORMATS))}")
    bits: dict[str, float] = {}
    for parameter, shape in shapes.items():
        if parameter.role in bits or not has_format(parameter, shape):
            continue
        try:
            # One row is kept as all of them are.
            kept = checkpoint.take(parameter) if weights == AUTO else keep(_row(shape[1]), FORMATS[weights])
        except ValueError as error:
            raise ModelError(f"{parameter}: {error}{rank.note}") from error
        bits[parameter.role] = _bits_of(kept.layout, shape[1], kept.num_groups, device)
    embedding = Parameter("embedding")
    kept_bits = 8 * checkpoint.num_bytes(embedding) // (spec.vocab_size * spec.hidden_size)
    bits["embedding"] = min(kept_bits, 8 * activation_dtype(torch.device(device)).itemsize)
    head = DENSE_FORMATS[activation_dtype(torch.device(device))] if weights == AUTO else FORMATS[weights].head
    if weights != AUTO or spec.tied_embeddings:
        bits["head"] = _bits_of(FORMATS[head].layout, spec.hidden_size, 1, device)
    return bits


def _bits_of(layout: str, num_in: int, num_groups: int, device: str) -> float:
    """Of a weight whose rows are in groups, the scales included where there are more than one for a row."""
    if layout == "plain":
        layout = DENSE_FORMATS[activation_dtype(torch.device(device))]
    own_group = -(-num_in // num_groups)
    group = next((size for size in GROUPS[device].get(layout, ()) if own_group % size == 0), own_group)
    scale_bits = SCALE_BITS[device].get(layout, 0) if group < num_in else 0
    return LOADED_BITS[layout] + scale_bits / group


def _loaded_bytes(spec: ModelSpec, shapes: Shapes, bits: Mapping[str, float], dense_bits: int) -> int:
    total = sum(prod(shape) * bits.get(parameter.role, dense_bits) for parameter, shape in shapes.items())
    if spec.tied_embeddings:  # the head is a second copy of the embedding, laid out to be multiplied by
        total += prod(shapes[Parameter("embedding")]) * bits["head"]
    return int(total) // 8


def _row(num_in: int) -> Kept:
    return Kept.plain(torch.zeros(1, num_in))
