"""Whole models from end to end: what users feel, and how far it is from what memory allows.

Owns the questions: time to the first token, tokens a second by the number of sequences, what graphs and overlap bring,
how much of a step the device waits for the host, and what verifying drafts costs. Random weights at true shapes; one
model after the other, so that one is in memory at a time.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import torch
from msgspec import structs
from torch import Tensor

from benchmarks.gpu.measure import DEVICE, DRY, measure
from benchmarks.gpu.random_model import MIXTRAL_8X7B, QWEN3_30B, TINY, random_model
from benchmarks.gpu.report import Figure, Report
from engine.batch import Batch, build_batch, none_drawn
from engine.build import Model, engine_of
from engine.config import EngineConfig
from engine.core import Core
from engine.models.spec import ModelSpec
from engine.sequence import nobodys
from engine.types import Request, Sampling
from kernels.triton import OPS


@dataclass(frozen=True)
class Plan:
    """What is asked of one model."""

    name: str
    spec: ModelSpec
    config: EngineConfig
    context: int  # tokens in the cache of a sequence that decodes
    num_tokens: int  # that each decodes
    sequences: Sequence[int]
    compared: Sequence[int]  # with and without graphs and overlap
    prompts: Sequence[int]
    verified: Sequence[tuple[int, int]]  # sequences, tokens of each


_CONFIG = EngineConfig(device="cuda", sequences_max=256, tokens_per_step_max=8192, context_max=9216, drafts_max=0)
_SERVED = Plan(
    "",
    TINY,
    _CONFIG,
    context=1024,  # the guide's rooflines have it too
    num_tokens=64,
    sequences=(1, 8, 32, 64, 128, 256),
    compared=(1, 64),
    prompts=(128, 1024, 8192),
    verified=[(num, queries) for num in (1, 8, 32) for queries in (2, 4, 8)],
)
PLANS = [
    replace(_SERVED, name="Qwen3-30B-A3B int4", spec=QWEN3_30B),
    replace(_SERVED, name="Mixtral 8x7B int4", spec=MIXTRAL_8X7B),
]
DRY_PLAN = Plan(
    "tiny int4",
    TINY,
    EngineConfig(sequences_max=2, tokens_per_step_max=16, cache_tokens=160, drafts_max=0),
    context=5,
    num_tokens=2,
    sequences=(2,),
    compared=(1,),
    prompts=(4,),
    verified=[(1, 2)],
)


def run(report: Report, end: float) -> None:
    """The report has each model's figures, as far as they could begin before `end`, by time.monotonic."""
    for plan in [DRY_PLAN] if DRY else PLANS:
        with _naming(report, plan.name):
            _Bench(report, plan, end).run()
        gc.collect()  # recordings and what they record refer to each other
        if not DRY:
            torch.cuda.empty_cache()


@contextmanager
def _naming(report: Report, what: str) -> Iterator[None]:
    """What fails is named, and the rest runs. Without a GPU it is a failure like any other."""
    try:
        yield
    except Exception as error:
        if DRY:
            raise
        report.left_out.append(f"{what}: {type(error).__name__}: {error}")


@dataclass
class _Bench:
    report: Report
    plan: Plan
    end: float
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _ids: Iterator[int] = field(default_factory=count)

    def run(self) -> None:
        began_s = time.perf_counter()
        self.random = random_model(self.plan.spec, OPS, DEVICE)
        self.model = Model.of(self.plan.config, self.random.decoder, self.random.ops)
        self._tell("weights made, the largest step computed", time.perf_counter() - began_s, "s")
        self._tell("tokens of cache", self.model.num_blocks * self.plan.config.block_size, "")
        began_s = time.perf_counter()
        self.replaying = self._engine(self.plan.config)
        self._tell("graphs recorded", time.perf_counter() - began_s, "s")
        questions: list[tuple[str, Callable[[], None]]] = [
            *((f"first token of {length}", partial(self.first_token, length)) for length in self.plan.prompts),
            *((f"{num} sequences", partial(self.decode, num)) for num in self.plan.sequences),
            *((f"graphs and overlap, {num} sequences", partial(self.compare, num)) for num in self.plan.compared),
            *(
                (f"{num} x {queries} verified", partial(self.verify, num, queries))
                for num, queries in self.plan.verified
            ),
        ]
        for what, ask in questions:
            if time.monotonic() > self.end:
                self.report.left_out.append(f"{self.plan.name}, {what}: no time left")
                continue
            with _naming(self.report, f"{self.plan.name}, {what}"):
                ask()

    # ------------------------------------------------------------------------------------------------------- questions

    def first_token(self, length: int, num: int = 5) -> None:
        """Of a prompt that nobody has seen, with the engine to itself. The first one compiles, and does not count."""
        times = []
        for _ in range(1 + (1 if DRY else num)):
            began_s = time.perf_counter()
            self._submit(self.replaying, length, 1)
            while not self.replaying.step().tokens:
                pass
            times.append(time.perf_counter() - began_s)
            self._drain(self.replaying)
        self._tell(f"first token, prompt of {length}", 1e3 * statistics.median(times[1:]), "ms")

    def decode(self, num: int) -> None:
        """Tokens a second, and the share of what reading the experts that were hit, and the rest, allows."""
        step_s = self._step_s(self.replaying, num)
        num_hit = self._experts_hit(num)
        bound_s = self.random.step_bytes(num, self.plan.context, num_hit) / self.report.bytes_per_s
        self._tell(f"{num} sequences, {num_hit:.1f} experts hit", num / step_s, "tokens/s", bound_s / step_s)

    def compare(self, num: int) -> None:
        """Steps with graphs or without, in turn or ahead; and how much of the best the device does not compute."""
        device_s = measure([partial(self.model.forward, self._batch(num, 1))])
        self._tell(f"{num} sequences, the device alone", 1e3 * device_s, "ms a step")
        for graphs in ("graphs", "no graphs"):
            config = self.plan.config if graphs == "graphs" else replace(self.plan.config, graphs="off")
            for overlap in ("off", "on"):
                core = self.replaying if graphs == "graphs" else self._engine(config)
                core._overlap = overlap == "on"
                step_s = self._step_s(core, num)
                self._tell(f"{num} sequences, {graphs}, overlap {overlap}", 1e3 * step_s, "ms a step")
        core = self.replaying
        hidden_s = self._step_s(core, num) - device_s
        self._tell(f"{num} sequences, host not hidden, sampling with it", 1e3 * hidden_s, "ms a step")

    def verify(self, num: int, queries: int) -> None:
        """What a step costs in which each sequence has so many tokens, by the device, in steps of one token each."""
        one_s = measure([partial(self.model.forward, self._batch(num, 1))])
        many_s = measure([partial(self.model.forward, self._batch(num, queries))])
        self._tell(f"{num} sequences x {queries} tokens verified", many_s / one_s, "steps")

    # --------------------------------------------------------------------------------------------------------- the rest

    def _tell(self, what: str, value: float, unit: str, share: float | None = None) -> None:
        self.report.figures.append(Figure(f"{self.plan.name}, {what}", value, unit, share))
        of_bound = "" if share is None else f" {share:6.1%} of the bound"
        print(f"{self.plan.name}, {what:44} {value:10.4g} {unit}{of_bound}", flush=True)

    def _engine(self, config: EngineConfig) -> Core:
        is_replayed = DRY and config.graphs == "auto"
        core = engine_of(config, self.model, capture=_compute_again if is_replayed else None)
        core.meter.start()
        return core

    def _submit(self, core: Core, length: int, num_tokens: int) -> None:
        prompt = tuple(self._random.choices(range(self.plan.spec.vocab_size), k=length))
        core.submit(Request(id=next(self._ids), prompt=prompt, sampling=Sampling(tokens_max=num_tokens)))

    def _drain(self, core: Core) -> None:
        while core.has_work:
            core.step()

    def _step_s(self, core: Core, num: int) -> float:
        """The median step in which `num` sequences decode a token each."""
        num_tokens = self.plan.num_tokens
        for _ in range(num):
            self._submit(core, self.plan.context - num_tokens // 2, num_tokens)
        times = []
        while core.has_work:
            began_s = time.perf_counter()
            result = core.step()
            if len(result.tokens) == num == sum(charge.num_tokens for charge in result.charges):
                times.append(time.perf_counter() - began_s)
        return statistics.median(times)

    def _experts_hit(self, num: int) -> float:
        """Of a layer, on average, in a step of so many sequences."""
        chosen: list[Tensor] = []
        self.random.watch.chosen = chosen
        self.model.forward(self._batch(num, 1))
        self.random.watch.chosen = None
        return statistics.mean(len(set(experts.flatten().tolist())) for experts in chosen)

    def _batch(self, num: int, queries: int) -> Batch:
        """The last tokens of sequences of the context, in blocks of their own."""
        config = self.plan.config
        each = -(-(self.plan.context + queries) // config.block_size)
        if num * each > self.model.num_blocks:
            raise ValueError(f"the cache has {self.model.num_blocks} blocks, and {num * each} are needed")
        shares = []
        for place in range(num):
            sequence = nobodys(self.plan.context + queries - 1, list(range(place * each, (place + 1) * each)))
            sequence.num_computed = self.plan.context - 1
            sequence.tokens = self._random.choices(range(self.plan.spec.vocab_size), k=len(sequence.tokens))
            shares.append(structs.replace(sequence.share(queries), num_rows=queries))
        return build_batch(shares, config.block_size, none_drawn(torch.device(DEVICE)))


def _compute_again(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Stands for CUDA's graphs where there are none."""
    return compute
