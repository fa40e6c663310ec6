"""How the engine behaves on this machine's CPU, beyond one figure: `python -m benchmarks.engine [--weights int8]`.

Owns six questions, each with its table: how throughput grows with the number of sequences, what a step costs besides
the model, what of it drafts add, what a shared prefix saves, how long a first token takes under load, and what a code
completion costs. On random weights of Mixtral's shape with 0.5 billion parameters, made on first use, and the engine
alone: no Kafka, no text. Some four minutes.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.cpu import checkpoints
from benchmarks.cpu.loads import SPECIAL_TOKENS, VOCAB_SIZE
from engine.blocks import BlockCache
from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.drafting import Drafting
from engine.lookup import PromptLookup
from engine.metering import Meter
from engine.runner import Runner
from engine.sampler import Drawn, sampling_rows
from engine.scheduler import Scheduler
from engine.sequence import Share, nobodys
from engine.types import Capacity, Request, Sampling, StepResult
from kernels.backends import pick
from kernels.ops import SamplingRow
from kernels.transfer import Returning

MODEL = "mixtral-0.5b"
CACHE_TOKENS = 32 * 1024
TOKENS_PER_STEP = 512  # the engine's default: what a running sequence waits for at most while a prompt is computed
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
ARRIVALS_S = 20.0  # how long requests keep coming
ROUNDS = 5  # of 200 steps each: enough that some of them find the processor free
LOADS = (0.5, 0.8)  # of the requests a second that the engine can serve
DOLLARS_PER_HOUR = 0.10  # two virtual cores on demand; spot machines cost a third of it
DOLLARS_PER_COMPLETION = 0.0003  # what a code completion may cost


@dataclass
class Bench:
    """One engine, and a supply of prompts that it has never seen."""

    core: Core
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _ids: Iterator[int] = field(default_factory=count)

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens at random."""
        return tuple(self._random.randrange(SPECIAL_TOKENS, VOCAB_SIZE) for _ in range(num_tokens))

    def submit(self, prompt: Sequence[int], num_tokens: int) -> int:
        """The request's id."""
        number = next(self._ids)
        sampling = Sampling(tokens_max=num_tokens, tokens_min=num_tokens)
        self.core.submit(Request(id=number, prompt=tuple(prompt), sampling=sampling))
        return number

    def run(self, clock: Callable[[], float] = time.perf_counter) -> list[tuple[StepResult, float]]:
        """All that was submitted is done: each step and how long it took."""
        steps = []
        while self.core.has_work:
            began_s = clock()
            result = self.core.step()
            steps.append((result, clock() - began_s))
        return steps

    # ------------------------------------------------------------------------------------------------------- questions

    def growth(self) -> None:
        """Throughput of decoding by the number of sequences."""
        print("\n| sequences | output tokens/s | ms a step |\n|---|---|---|")
        for _ in range(SEQUENCES[-1]):  # to warm up
            self.submit(self.prompt(16), 2)
        self.run()
        for num in SEQUENCES:
            for _ in range(num):
                self.submit(self.prompt(16), 24)
            decoded = [took_s for result, took_s in self.run() if len(result.tokens) == num and _is_decode(result)]
            print(f"| {num} | {num / median(decoded):.0f} | {1000 * median(decoded):.2f} |", flush=True)

    def prefix(self, num: int = 16, length: int = 768) -> None:
        """Sixteen requests behind one system prompt, with and without finding it in the cache."""
        shared = self.prompt(length)
        walls = []
        for system in (None, shared, shared):  # unshared; shared, computed once for all; shared, and known
            for _ in range(num):
                self.submit((system or self.prompt(length)) + self.prompt(32), 8)
            began_s = time.perf_counter()
            self.run()
            walls.append(time.perf_counter() - began_s)
        alone_s, first_s, known_s = walls
        print(
            f"\n{num} x ({length} + 32 tokens, 8 out): {alone_s:.2f} s each with a prompt of its own, {first_s:.2f} s "
            f"with one in common ({alone_s / first_s:.1f} times), {known_s:.2f} s once it is cached "
            f"({alone_s / known_s:.1f} times).",
            flush=True,
        )

    def waiting(self) -> None:
        """First tokens under load: requests of 128 + 32 tokens at random moments."""
        capacity = self._requests_per_s()
        print(f"\n{capacity:.2f} requests/s of 128 + 32 tokens are served at most.")
        print("| load | requests/s | first token, median | p99 |\n|---|---|---|---|")
        for load in LOADS:
            times = sorted(self._first_tokens_s(load * capacity))
            cuts = quantiles(times, n=100)
            print(f"| {load:.0%} | {load * capacity:.2f} | {median(times):.2f} s | {cuts[98]:.2f} s |", flush=True)

    def completion(self, length: int = 1024, typed: int = 32, num_tokens: int = 24, num: int = 16) -> None:
        """Code completion: a long prompt of which all but the newest tokens were there a keystroke ago."""
        files = [self.prompt(length) for _ in range(num)]
        for file in files:
            self.submit(file, 1)
        self.run()
        for file in files:
            self.submit((*file, *self.prompt(typed)), num_tokens)
        began_s = time.perf_counter()
        self.run()
        cost = (time.perf_counter() - began_s) / num / 3600 * DOLLARS_PER_HOUR
        print(
            f"\nA code completion ({length} tokens known, {typed} new, {num_tokens} out, {num} at once) costs "
            f"${cost:.7f} at ${DOLLARS_PER_HOUR:.2f} an hour: 1/{DOLLARS_PER_COMPLETION / cost:.0f} of "
            f"${DOLLARS_PER_COMPLETION}."
        )

    def _requests_per_s(self, num: int = 32) -> float:
        for _ in range(num):
            self.submit(self.prompt(128), 32)
        began_s = time.perf_counter()
        self.run()
        return num / (time.perf_counter() - began_s)

    def _first_tokens_s(self, requests_per_s: float) -> list[float]:
        """How long each request waited for its first token."""
        asked: dict[int, float] = {}
        answered: dict[int, float] = {}
        began_s = time.perf_counter()
        next_s = began_s + self._random.expovariate(requests_per_s)
        while (now_s := time.perf_counter()) < began_s + ARRIVALS_S or self.core.has_work:
            while next_s <= min(now_s, began_s + ARRIVALS_S):
                asked[self.submit(self.prompt(128), 32)] = next_s
                next_s += self._random.expovariate(requests_per_s)
            if not self.core.has_work:
                time.sleep(0.001)
                continue
            for token in self.core.step().tokens:
                answered.setdefault(token.request, time.perf_counter())
        return [answered[number] - asked_s for number, asked_s in asked.items()]


def _is_decode(result: StepResult) -> bool:
    return sum(charge.num_tokens for charge in result.charges) == len(result.tokens)


def overhead(num: int = 64) -> None:
    """What a step takes besides the model: planning, batching, committing, metering.

    In this thread's own processor time, of which every tenth step takes less: neighbours add to both, less to this.
    """
    bench = Bench(without_model(num))
    for _ in range(ROUNDS):
        for _ in range(num):
            bench.submit(bench.prompt(16), 200)
    took = [
        took_s for result, took_s in bench.run(time.thread_time) if len(result.tokens) == num and _is_decode(result)
    ]
    print(
        f"\nA step with {num} greedy sequences takes {1000 * quantiles(took, n=10)[0]:.2f} ms besides the model "
        f"(target: 0.3), the median {1000 * median(took):.2f}.",
        flush=True,
    )


def without_model(num_sequences: int) -> Core:
    """An engine whose model answers at once, with next to no vocabulary to choose from."""
    config, capacity = (
        EngineConfig(sequences_max=num_sequences),
        Capacity(cache_tokens=num_sequences * 256, context_max=256, vocab_size=VOCAB_SIZE, eos_token_ids=()),
    )
    blocks = BlockCache(capacity.cache_tokens // config.block_size, config.block_size)
    drafting = Drafting(PromptLookup(), blocks, drafts_max=0)
    runner = Runner(lambda batch: torch.zeros(len(batch.rows), 2), pick("cpu"), config.block_size, torch.device("cpu"))
    core = Core(Scheduler(config, blocks, 256), drafting, runner, Meter(), capacity)
    core.meter.start()
    return core


def choosing(num: int = 64) -> None:
    """What the host takes to say how each row is sampled, and to keep or reject each draft once all rows are."""
    print(f"\n{num} sequences, drafts of each: ms to say how, greedy and sampled; ms to keep or reject")
    for num_drafts in (0, 4, 8):
        greedy, sampled = ([drafted(temperature, num_drafts) for _ in range(num)] for temperature in (0.0, 1.0))
        tokens = torch.zeros(num * (1 + num_drafts), dtype=torch.int64)  # as drafted: all are kept
        drawn = Drawn(tokens, sampled, {}, Returning([tokens]), False)
        calls = partial(_rows, greedy), partial(_rows, sampled), drawn.accepted
        print(f"{num_drafts:8}", *(f"{1000 * _median_s(call):8.3f}" for call in calls), flush=True)


def _rows(shares: list[Share]) -> list[SamplingRow]:
    return [row for share in shares for row in sampling_rows(share)]


def drafted(temperature: float, num_drafts: int, length: int = 128) -> Share:
    """Of a sequence that decodes, with so many drafts behind its last token."""
    sequence = nobodys(length, [])
    sampling = Sampling(tokens_max=2 * length, temperature=temperature)
    sequence.request = Request(id=-1, prompt=(0,) * length, sampling=sampling)
    sequence.num_computed, sequence.drafts = length - 1, [0] * num_drafts
    return sequence.share(1 + num_drafts)


def _median_s(call: Callable[[], object], num: int = 200) -> float:
    times = []
    for _ in range(num):
        began_s = time.perf_counter()
        call()
        times.append(time.perf_counter() - began_s)
    return median(times)


def main() -> None:
    """Prints each table as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int8", help="a format: bf16, int8, int4")
    parser.add_argument("--home", type=Path, default=checkpoints.HOME, help="of the checkpoint")
    asked = parser.parse_args()
    folder = checkpoints.make(asked.home / "models", MODEL)
    config = EngineConfig(
        weights=asked.weights,
        cache_tokens=CACHE_TOKENS,
        tokens_per_step_max=TOKENS_PER_STEP,
        sequences_max=128,
        drafts_max=0,  # random weights repeat themselves as no text does
    )
    bench = Bench(build(config, folder))
    bench.core.meter.start()
    print(f"{MODEL} in {asked.weights} on {len(os.sched_getaffinity(0))} cores")
    for ask in (bench.growth, overhead, choosing, bench.prefix, bench.waiting, bench.completion):
        ask()


if __name__ == "__main__":
    main()
