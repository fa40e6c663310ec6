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

# Bits of a weight as a device's backend keeps it, by layout, its scales apart. Others are unpacked.
LOADED_BITS: Mapping[str, Mapping[str, int]] = {
    "cpu": {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4},
    "cuda": {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "fp8": 8, "mxfp4": 4},
}
# The groups of int4 that have a scale and a zero of their own, the largest that divides the weight's.
INT4_GROUPS = {"cpu": (64, 32), "cuda": (128, 64, 32)}
SCALE_BITS = {"int4": 32, "fp8": 32, "mxfp4": 32}  # of a group

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
        bits = _bits(spec, shapes, checkpoint, weights, where.type)
        loaded_bytes = _loaded_bytes(spec, shapes, bits, LOADED_BITS[where.type][DENSE_FORMATS[dtype]])
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


def _bits(spec: ModelSpec, shapes: Shapes, checkpoint: Checkpoint, weights: str, device: str) -> Mapping[str, float]:
    """What a weight takes in memory, by role, of those that have a format: by the first matrix of each."""
    if weights not in (AUTO, *FORMATS):
        raise ModelError(f"weights {weights!r} is not one of {', '.join((AUTO, *FORMATS))}")
    bits: dict[str, float] = {}
    for parameter, shape in shapes.items():
        if parameter.role in bits or not has_format(parameter, shape):
            continue
        if weights == AUTO:
            kept = checkpoint.take(parameter)
            bits[parameter.role] = _bits_of(kept.layout, shape[1], kept.num_groups, device)
        else:
            made = FORMATS[weights]
            bits[parameter.role] = _bits_of(made.layout, shape[1], made.num_groups(shape[1]), device)
    head = DENSE_FORMATS[activation_dtype(torch.device(device))] if weights == AUTO else FORMATS[weights].head
    if weights != AUTO or spec.tied_embeddings:
        bits["head"] = _bits_of(FORMATS[head].layout, spec.hidden_size, 1, device)
    return bits


def _bits_of(layout: str, num_in: int, num_groups: int, device: str) -> float:
    """Of a weight whose rows are in groups, the scales included where there are more than one for a row."""
    bits = LOADED_BITS[device]
    if layout not in bits:
        return bits[DENSE_FORMATS[activation_dtype(torch.device(device))]]
    group = -(-num_in // num_groups)
    if layout == "int4":
        group = next(size for size in INT4_GROUPS[device] if group % size == 0)
    return bits[layout] + (SCALE_BITS.get(layout, 0) / group if num_groups > 1 else 0)


def _loaded_bytes(spec: ModelSpec, shapes: Shapes, bits: Mapping[str, float], dense_bits: int) -> int:
    total = sum(prod(shape) * bits.get(parameter.role, dense_bits) for parameter, shape in shapes.items())
    if spec.tied_embeddings:  # the head is a second copy of the embedding, laid out to be multiplied by
        total += spec.vocab_size * spec.hidden_size * bits["head"]
    return int(total) // 8
