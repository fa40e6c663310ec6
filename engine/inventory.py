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
from engine.errors import ModelError
from engine.loader import Checkpoint, open_checkpoint
from engine.models import ModelSpec
from engine.models.layers import AUTO
from engine.models.parameters import Parameter, Shapes, has_format, parameters
from engine.models.spec import Mixture
from engine.quant import DENSE_FORMATS, FORMATS

# Bits of a weight as backends keep it, by layout: int4 in groups of 32, whatever its groups were. Others are unpacked.
LOADED_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 5}

# What a parameter is a part of, by the beginning or the end of its role. The first that fits.
KINDS = {
    "embedding": ("embedding",),
    "head": ("head",),
    "norms": ("norm",),
    "router": ("router", "router_bias", "shared_gate"),
    "experts": ("expert.",),
    "shared experts": ("shared.",),
    "attention": ("attention.", "latent."),
    "feed-forward": ("feed_forward.",),
}


class Kind(Struct, frozen=True):
    """Parameters that do the same in every layer."""

    name: str
    parameters: int
    bytes: int  # in the checkpoint


class Inventory(Struct, frozen=True, kw_only=True):
    """A model in numbers, and what an engine with these settings needs for it."""

    kinds: tuple[Kind, ...]
    active_parameters: int  # that one token is computed with: of each mixture, the chosen experts
    weights: str
    loaded_bytes: int  # of weights in memory
    cache: str
    cache_bytes_per_token: int
    memory_bytes: int
    cache_tokens: int  # that fit into what the weights leave of the memory


def take_inventory(path: Path, *, weights: str, cache: str, device: str, memory_bytes: int | None) -> Inventory:
    """The folder's model, in an engine with these settings (`EngineConfig`'s) and this memory; None: what is free here.

    Raises ModelError where the folder cannot be loaded, EngineMisconfigured where the settings do not suit it.
    """
    where = torch.device(device) if memory_bytes else pick_device(device)
    memory_bytes = memory_bytes or free_memory_bytes(where)
    dtype = activation_dtype(where)
    with open_checkpoint(path) as (spec, checkpoint):
        shapes = parameters(spec)
        layouts = _layouts(spec, shapes, checkpoint, weights, DENSE_FORMATS[dtype])
        loaded_bytes = _loaded_bytes(spec, shapes, layouts, DENSE_FORMATS[dtype])
        cache_bytes = bytes_per_block(spec, 1, cache_dtype(cache, dtype))
        return Inventory(
            kinds=tuple(_kinds(shapes, checkpoint)),
            active_parameters=_active(spec, shapes),
            weights=weights,
            loaded_bytes=loaded_bytes,
            cache=cache,
            cache_bytes_per_token=cache_bytes,
            memory_bytes=memory_bytes,
            cache_tokens=max(0, memory_bytes - loaded_bytes) // cache_bytes,
        )


def _kinds(shapes: Shapes, checkpoint: Checkpoint) -> Iterable[Kind]:
    sizes, stored = Counter[str](), Counter[str]()
    for parameter, shape in shapes.items():
        sizes[_kind(parameter)] += prod(shape)
        stored[_kind(parameter)] += checkpoint.num_bytes(parameter)
    return [Kind(name, sizes[name], stored[name]) for name in KINDS if name in sizes]


def _kind(parameter: Parameter) -> str:
    role = parameter.role
    return next(name for name, of in KINDS.items() if role.startswith(of) or (name == "norms" and role.endswith(of)))


def _active(spec: ModelSpec, shapes: Shapes) -> int:
    total = 0
    for parameter, shape in shapes.items():
        mixture = None if parameter.layer is None else spec.layers[parameter.layer].feed_forward
        if parameter.expert is None or not isinstance(mixture, Mixture) or parameter.expert < mixture.num_chosen:
            total += prod(shape)
    return total


def _layouts(spec: ModelSpec, shapes: Shapes, checkpoint: Checkpoint, weights: str, dense: str) -> Mapping[str, str]:
    """The layout in which the matrices of each role are kept, by the first of them."""
    if weights not in (AUTO, *FORMATS):
        raise ModelError(f"weights {weights!r} is not one of {', '.join((AUTO, *FORMATS))}")
    layouts: dict[str, str] = {}
    for parameter, shape in shapes.items():
        if parameter.role in layouts or not has_format(parameter, shape):
            continue
        if weights == AUTO:
            stored = checkpoint.take(parameter).layout
            layouts[parameter.role] = dense if stored == "plain" else stored
        else:
            layouts[parameter.role] = FORMATS[weights].layout
    if weights != AUTO:
        layouts["head"] = FORMATS[FORMATS[weights].head].layout
    elif spec.tied_embeddings:
        layouts["head"] = dense
    return layouts


def _loaded_bytes(spec: ModelSpec, shapes: Shapes, layouts: Mapping[str, str], dense: str) -> int:
    def bits(role: str) -> int:
        return LOADED_BITS.get(layouts.get(role, dense), LOADED_BITS[dense])

    total = sum(prod(shape) * bits(parameter.role) for parameter, shape in shapes.items())
    if spec.tied_embeddings:  # the head is a second copy of the embedding, laid out to be multiplied by
        total += spec.vocab_size * spec.hidden_size * bits("head")
    return total // 8
