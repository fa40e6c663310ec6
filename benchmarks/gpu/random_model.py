"""A published model's shapes with random weights, made on the device: no files, and no time to quantize.

Owns the shapes and the numbers. Every expert gets the same codes in memory of its own, so that reading them costs what
it should; embedding and routers are random, so that tokens go where they like.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.models.decoder import Decoder
from engine.models.layers import AUTO, Weights
from engine.models.parameters import Parameter, has_format, parameters
from engine.models.spec import GroupedQuery, LayerSpec, Mixture, ModelSpec, QueryKeyNorm, Rope
from engine.quant import FORMATS, Kept
from kernels.ops import Ops

FORMAT = "int4-g128"


def mixture(
    hidden: int, layers: int, mixer: GroupedQuery, feed_forward: Mixture, vocab_size: int, context_max: int
) -> ModelSpec:
    """A decoder of equal layers."""
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=(LayerSpec(mixer, feed_forward),) * layers,
        norm_eps=1e-6,
        rope=Rope(theta=1e6),
        tied_embeddings=False,
        context_max=context_max,
    )


QWEN3_30B = mixture(
    2048,
    48,
    GroupedQuery(32, 4, 128, query_key_norm=QueryKeyNorm(1e-6)),
    Mixture(num_experts=128, num_chosen=8, intermediate=768),
    vocab_size=151_936,
    context_max=40_960,
)
MIXTRAL_8X7B = mixture(
    4096,
    32,
    GroupedQuery(32, 8, 128),
    Mixture(num_experts=8, num_chosen=2, intermediate=14_336),
    vocab_size=32_000,
    context_max=32_768,
)
TINY = mixture(
    128,
    1,
    GroupedQuery(2, 1, 64, query_key_norm=QueryKeyNorm(1e-6)),
    Mixture(num_experts=4, num_chosen=2, intermediate=128),
    vocab_size=96,
    context_max=64,
)


class RandomTensors:
    """A decoder's `Tensors`."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._shapes = parameters(spec)
        self._device = device
        self._made: dict[tuple[str, tuple[int, ...]], Kept] = {}

    def take(self, parameter: Parameter) -> Kept:
        """As a checkpoint in FORMAT would have it."""
        shape = self._shapes[parameter]
        if len(shape) == 1:
            return Kept.plain(torch.ones(shape, device=self._device))
        if not has_format(parameter, shape):
            return Kept.plain(torch.randn(shape, device=self._device, dtype=torch.bfloat16) / shape[1] ** 0.5)
        layout = FORMATS[FORMATS[FORMAT].head if parameter.role == "head" else FORMAT].layout
        if (layout, shape) not in self._made:
            self._made[layout, shape] = self._codes(layout, *shape)
        return self._made[layout, shape]

    def _codes(self, layout: str, num_out: int, num_in: int) -> Kept:
        """Uniform codes whose products keep the size of their inputs."""
        device, deviation = self._device, 1 / math.sqrt(num_in)
        if layout == "int8":
            codes = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, device=device)
            return Kept("int8", {"q": codes, "scale": torch.full((num_out,), deviation / 73, device=device)})
        codes = torch.randint(0, 256, (num_out, num_in // 2), dtype=torch.uint8, device=device)
        scale = torch.full((num_out, FORMATS[FORMAT].num_groups(num_in)), deviation / 4.6, device=device).bfloat16()
        return Kept("int4", {"q": codes, "scale": scale, "zero": scale / 2})  # 0 .. 15, less 8, are -0.5 on average


@dataclass
class Watch:
    """Hears of the experts that are chosen, (T, K) in each layer, while it has a list for them."""

    chosen: list[Tensor] | None = None


@dataclass(frozen=True)
class RandomModel:
    """A decoder, and what one step of it must read."""

    spec: ModelSpec
    decoder: Decoder
    ops: Ops
    watch: Watch

    def step_bytes(self, num_sequences: int, context: int, num_hit: float) -> float:
        """Of a decode that chooses `num_hit` experts a layer: weights once, and all keys and values."""
        feed_forward, mixer = self.spec.layers[0].feed_forward, self.spec.layers[0].mixer
        assert isinstance(feed_forward, Mixture)
        experts = _bytes([(layer.feed_forward._gate_up, layer.feed_forward._down) for layer in self.decoder._layers])
        embedding = _bytes(self.decoder._embedding)
        cached = mixer.num_cached * self.decoder.dtype.itemsize * len(self.spec.layers)
        weights = _bytes(self.decoder) - embedding - experts * (1 - num_hit / feed_forward.num_experts)
        return weights + num_sequences * context * cached


def random_model(spec: ModelSpec, ops: Ops, device: str) -> RandomModel:
    """The model on the device."""
    watch = Watch()

    def route(logits: Tensor, *how: Any, **named: Any) -> tuple[Tensor, Tensor]:
        weights, experts = ops.route(logits, *how, **named)
        if watch.chosen is not None:
            watch.chosen.append(experts)
        return weights, experts

    watched = replace(ops, route=route)
    weights = Weights(RandomTensors(spec, device), watched, AUTO, torch.bfloat16, torch.device(device))
    return RandomModel(spec, Decoder(spec, weights), watched, watch)


def _bytes(root: object) -> int:
    """Of all tensors that can be reached, each once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        here = waiting.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, Tensor):
            storage = here.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(here, dict):
            waiting += here.values()
        elif isinstance(here, list | tuple):
            waiting += here
        elif type(here).__module__.startswith(("engine.", "kernels.")):
            waiting.append(vars(here))
    return sum(storages.values())
