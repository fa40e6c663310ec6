"""A model whose every token is dictated by a few lines, and which finds out when the engine lies to it.

Stands where a decoder stands. Its cache holds, for each slot, the token and the position that were written there.
Logits are worked out from what it *reads back* through the block tables, so a wrong slot, a stale draft, a block given
away too early or a false prefix hit changes the tokens. `Script.tokens_of` says what they must be, without an engine.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import Batch
from engine.blocks import BlockCache
from engine.config import EngineConfig
from engine.core import Core
from engine.drafting import Drafter, Drafting
from engine.lookup import PromptLookup
from engine.metering import Meter
from engine.model_drafter import ModelDrafter, OwnCache, SharedCache
from engine.runner import Runner
from engine.sampler import uniform
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import Capacity, Request, Sampling
from kernels.reference import OPS

NOWHERE = -1  # a position that no token has: the slot was never written


@dataclass(frozen=True)
class Script:
    """The next token is a hash of the last `memory` tokens (of all: None), or one of three where a draw decides.

    A short memory over a small vocabulary soon repeats itself: then drafts are accepted.
    """

    vocab_size: int = 50
    memory: int | None = None
    poison: int | None = None  # behind this token every logit is NaN

    def logits_after(self, context: list[int]) -> np.ndarray:  # (V,) fp32
        if context[-1] == self.poison:
            return np.full(self.vocab_size, np.nan, dtype=np.float32)
        recent = context if self.memory is None else context[-self.memory :]
        seed = crc32(np.array(recent, dtype=np.int64).tobytes())
        logits = np.full(self.vocab_size, -30.0, dtype=np.float32)
        for rank in range(3):
            # Halves of e: under temperature 1 all three are drawn often.
            logits[(seed >> 9 * rank) % self.vocab_size] = 3.0 - rank / 2
        return logits

    def tokens_of(self, request: Request, choice: int = 0, context_max: int = 1 << 30) -> list[int]:
        """The output of one choice: the definition that the engine is held to."""
        sampling, context = request.sampling, list(request.prompt)
        length_max = min(len(context) + sampling.tokens_max, context_max)
        matcher = request.constraint.start() if request.constraint else None
        while len(context) < length_max:
            logits = self.logits_after(context).astype(np.float64)
            if np.isnan(logits).any():
                break
            possible = _unpacked(matcher.mask(), self.vocab_size) if matcher else None
            _steer(logits, sampling, request.prompt, context[len(request.prompt) :], possible)
            context.append(_choose(logits, sampling.temperature, uniform(sampling.seed, choice, len(context))))
            if context[-1] in sampling.stop_token_ids or (matcher and matcher.advance(context[-1])):
                break
        return context[len(request.prompt) :]


@dataclass(frozen=True)
class Erring(Script):
    """The same script, which is wrong behind one context of four: a draft model."""

    def logits_after(self, context: list[int]) -> np.ndarray:
        logits = super().logits_after(context)
        return np.roll(logits, 1) if crc32(np.array(context, dtype=np.int64).tobytes()) % 4 == 0 else logits


def _unpacked(mask: bytes, vocab_size: int) -> list[int]:
    return [token for token in range(min(vocab_size, 8 * len(mask))) if mask[token // 8] >> token % 8 & 1]


def _steer(
    logits: np.ndarray, sampling: Sampling, prompt: tuple[int, ...], output: list[int], possible: list[int] | None
) -> None:
    """The formula of engine/steering.py, token by token. `possible`: what a grammar allows."""
    for token in range(len(logits)):
        count = output.count(token)
        if count or token in prompt:
            logits[token] *= sampling.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        logits[token] -= sampling.frequency_penalty * count + (sampling.presence_penalty if count else 0)
        logits[token] += dict(sampling.logit_bias).get(token, 0)
    banned = set(sampling.stop_token_ids) if len(output) < sampling.tokens_min else set()
    if possible is not None:
        banned = set(range(len(logits))) - ((set(possible) - banned) or set(possible))
    logits[list(banned)] = -np.inf


def _choose(logits: np.ndarray, temperature: float, draw: float) -> int:
    order = np.argsort(-logits, kind="stable")
    if not temperature:
        return int(order[0])
    chances = np.exp((logits[order] - logits[order[0]]) / temperature)
    return int(order[np.searchsorted(chances.cumsum(), draw * chances.sum(), side="right")])


class ScriptedModel:
    """A script with a cache: what the runner calls to compute a batch."""

    def __init__(self, script: Script, num_blocks: int, block_size: int) -> None:
        self.script = script
        self.block_size = block_size
        self.tokens = np.zeros(num_blocks * block_size, dtype=np.int64)
        self.positions = np.full(num_blocks * block_size, NOWHERE, dtype=np.int64)

    def forward(self, batch: Batch) -> Tensor:
        slots = batch.attention.slots.numpy()
        assert len(set(slots.tolist())) == len(slots), "two tokens were sent to one slot"
        self.tokens[slots] = batch.token_ids.numpy()
        self.positions[slots] = batch.positions.numpy()
        wanted = set(batch.rows.tolist())
        logits = [
            self.script.logits_after(self._read(table, context_len - (stop - 1 - row)))
            for table, (start, stop), context_len in zip(
                batch.attention.block_tables.numpy(),
                pairwise(batch.attention.query_starts),
                batch.attention.context_lens,
                strict=True,
            )
            for row in range(start, stop)
            if row in wanted
        ]
        return torch.from_numpy(np.array(logits, dtype=np.float32).reshape(-1, self.script.vocab_size))

    def _read(self, table: np.ndarray, length: int) -> list[int]:
        places = np.arange(length)
        slots = table[places // self.block_size] * self.block_size + places % self.block_size
        assert (self.positions[slots] == places).all(), "the cache holds other positions than the engine believes"
        return list(self.tokens[slots].tolist())


class ScriptedHeads(ScriptedModel):
    """A layer for multi-token prediction: the state of a place is what the target wrote there, all it has read."""

    def __init__(self, script: Script, target: ScriptedModel) -> None:
        super().__init__(script, len(target.tokens) // target.block_size, target.block_size)
        self.target = target

    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        ends, tables = np.array(batch.attention.query_starts[1:]), batch.attention.block_tables.numpy()
        for row in batch.rows.tolist():
            place, table = int(batch.positions[row]) + 1, tables[np.searchsorted(ends, row, side="right")]
            # Its own state: as if the target had read its newest token. The target must write over that.
            slot = table[place // self.block_size] * self.block_size + place % self.block_size
            self.target.tokens[slot], self.target.positions[slot] = int(batch.token_ids[row]), place
        return logits

    def _read(self, table: np.ndarray, length: int) -> list[int]:
        """What a place knows by its state, and the token behind it; the places before must have had the same."""
        own, states = super()._read(table, length), self.target._read(table, length)
        assert own[:-1] == states[1:], "a token behind a place is not the next place's"
        return states + own[-1:]


def own_drafter(script: Script) -> "MakeDrafter":
    """A draft model that speaks by this script, with a cache of its own."""

    def make(target: ScriptedModel, config: EngineConfig) -> ModelDrafter:
        model = ScriptedModel(script, len(target.tokens) // target.block_size, target.block_size)
        return _model_drafter(model, OwnCache(config.block_size), config)

    return make


def shared_drafter(script: Script) -> "MakeDrafter":
    """One that speaks by this script, and writes into the target's cache."""

    def make(target: ScriptedModel, config: EngineConfig) -> ModelDrafter:
        model = copy.copy(target)
        model.script = script
        return _model_drafter(model, SharedCache(), config)

    return make


def heads_drafter(script: Script) -> "MakeDrafter":
    """A layer for multi-token prediction that speaks by this script."""

    def make(target: ScriptedModel, config: EngineConfig) -> ModelDrafter:
        return _model_drafter(ScriptedHeads(script, target), OwnCache(config.block_size, shift=1), config)

    return make


def _model_drafter(model: ScriptedModel, follower: OwnCache | SharedCache, config: EngineConfig) -> ModelDrafter:
    return ModelDrafter(
        model.forward,
        OPS,
        follower,
        block_size=config.block_size,
        device=torch.device("cpu"),
        tokens_max=config.tokens_per_step_max,
        context_max=1 << 12,
    )


MakeDrafter = Callable[[ScriptedModel, EngineConfig], Drafter]


def sequence_of(tokens: list[int], **sampling) -> Sequence:
    """A sequence with this prompt, as the scheduler makes it."""
    asked = Request(id=0, prompt=tuple(tokens), sampling=Sampling(**{"tokens_max": 100, **sampling}))
    return Sequence(request=asked, choice=0, rank=(0, 0, 0), length_max=len(tokens) + asked.sampling.tokens_max)


@dataclass
class ScriptedEngine:
    """A whole engine around a script, with its parts in reach."""

    core: Core
    scheduler: Scheduler
    blocks: BlockCache
    model: ScriptedModel


class Ticks:
    """A clock that has moved a little, never evenly, whenever it is read."""

    def __init__(self) -> None:
        self.now_ns = 1_000
        self.num_reads = 0

    def __call__(self) -> int:
        self.num_reads += 1
        self.now_ns += 1 + 7919 * self.num_reads % 1009
        return self.now_ns


_loop = {"overlap": False}


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["in turn", "overlapped"])
def both_loops(request):
    """All of a module that imports it runs with steps in turn, and with each planned while the one before runs."""
    _loop["overlap"] = request.param
    yield
    _loop["overlap"] = False


def scripted_engine(
    script: Script | None = None,
    *,
    context_max: int = 1 << 12,
    clock: Callable[[], int] | None = None,
    drafter: MakeDrafter | None = None,
    **settings,
) -> ScriptedEngine:
    """An engine of the named EngineConfig settings; a cache of 1024 tokens and no drafts unless they say otherwise."""
    script = script or Script()
    overlap = "on" if _loop["overlap"] and not settings.get("drafts_max") else "off"
    config = EngineConfig(**{"cache_tokens": 1024, "drafts_max": 0, "overlap": overlap, **settings})
    num_blocks = config.cache_tokens // config.block_size
    context_max = min(context_max, config.cache_tokens)
    model = ScriptedModel(script, num_blocks, config.block_size)
    drafts = drafter(model, config) if drafter else PromptLookup()
    blocks = BlockCache(num_blocks, config.block_size, drafts.num_seen_behind)
    scheduler = Scheduler(config, blocks, context_max)
    runner = Runner(model.forward, OPS, config.block_size, torch.device("cpu"))
    capacity = Capacity(
        cache_tokens=config.cache_tokens, context_max=context_max, vocab_size=script.vocab_size, eos_token_ids=()
    )
    drafting = Drafting(drafts, blocks, config.drafts_max or 0, config.draft_cost)
    core = Core(scheduler, drafting, runner, Meter(clock or Ticks()), capacity, overlap=config.overlap == "on")
    return ScriptedEngine(core, scheduler, blocks, model)
