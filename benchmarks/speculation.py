"""What drafts bring on real text: `python -m benchmarks.speculation [--weights int8]`, or `make speculation`.

Owns three tables. The first is c(q): a step with q tokens for each sequence, in steps with one, which is what verifying
q - 1 drafts costs on this machine and with these weights. The second is what each drafter is like when it must draft:
how many of its drafts are kept, what one pass of it costs in steps, and how much faster the whole is, in turn with
plain decoding. The third is what the engine makes of it, which drafts where that pays by what it has learned. The demo
model on prose and code that do not move (`benchmarks/texts/`), on code to be copied, as when a file is edited, and on
noise of thirty tokens, in which much looks as if it came again and next to nothing does. Greedily but for the noise;
for one sequence and for eight. Some fifteen minutes; on a machine that others use too, one thread and its processor
time tell more: `--shared`.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.metering import Meter
from engine.types import Request, Sampling, Work
from worker.folders import model_folder
from worker.text import Tokenizer, load_tokenizer

DEMO_MODEL = "smollm2-moe"
TEXTS = Path(__file__).parent / "texts"  # as our own files once were: what is compared must not move
PROMPT_TOKENS = 320
OUTPUT_TOKENS = 96
BATCHES = (1, 8)
QUERIES = (1, 2, 3, 5, 9)  # tokens of a sequence in a step: one, and so many drafts less one
ROUNDS = 5
PLAIN = "plain"  # which the others are compared with
TABLES: dict[str, dict[str, Any]] = {"forced": {"drafts_max": 2, "draft_cost": 0.0}, "chosen": {"drafts_max": 8}}
NOISE_TOKENS = 30
NOISE = "noise"


@dataclass(frozen=True)
class Run:
    """One pass of the same prompts."""

    seconds: float
    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    drafting_s: float
    num_computed: int  # by a drafter


def drafters(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of each. The draft model is the demo model in int4; plain decoding twice shows what is noise."""
    return {
        "plain again": {"drafts_max": 0},
        "n-gram": {},
        "itself, 1 expert of 7": {"draft_experts": 1},
        "itself, 4 experts of 7": {"draft_experts": 4},
        "the same in int4": {"draft_model": folder, "draft_weights": "int4"},
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int8", help="a format: fp32, bf16, int8, int4")
    parser.add_argument("--shared", action="store_true", help="one thread, and its processor time")
    parser.add_argument("--texts", nargs="*", help="only these")
    parser.add_argument("--sequences", nargs="*", type=int, default=BATCHES, help="so many at once")
    parser.add_argument("--drafters", nargs="*", help="only those whose names begin so")
    parser.add_argument("--tables", nargs="*", default=["costs", "forced", "chosen"], help="only these")
    asked = parser.parse_args()
    folder = model_folder(DEMO_MODEL)
    kinds = texts(load_tokenizer(folder))
    kinds = {name: prompts for name, prompts in kinds.items() if not asked.texts or name in asked.texts}
    config = EngineConfig(weights=asked.weights, cache_tokens=16 * 1024, drafts_max=0, threads=int(asked.shared))
    clock = time.process_time_ns if asked.shared else time.perf_counter_ns

    def started(config: EngineConfig) -> Core:
        core = build(config, folder)
        core.meter = Meter(clock)
        return core

    plain = started(config)
    if "costs" in asked.tables:
        costs(plain)
    for table in (table for table in TABLES if table in asked.tables):
        engines = {
            name: started(replace(config, **TABLES[table] | own))
            for name, own in drafters(folder).items()
            if not asked.drafters or name.startswith(tuple(asked.drafters))
        }
        print(f"\n{table}, {TABLES[table]['drafts_max']} at most\n")
        gains({PLAIN: plain, **engines}, kinds, asked.sequences)


def costs(core: Core) -> None:
    """c(q), from prompts of q tokens behind a cached prefix: the same work as q - 1 drafts."""
    print(f"| sequences | {' | '.join(f'c({q})' for q in QUERIES)} |\n|---|{'---|' * len(QUERIES)}")
    for num in BATCHES:
        times = [median(step_s(core, num, q, number) for number in range(7)) for q in QUERIES]
        print(f"| {num} | {' | '.join(f'{one / times[0]:.2f}' for one in times)} |", flush=True)


def step_s(core: Core, num: int, num_queries: int, number: int) -> float:
    """A step in which each of `num` sequences computes so many tokens, behind 256 that are cached."""
    salt = f"{num_queries}-{number}"
    prefixes = [tuple(range(100 + 300 * index, 356 + 300 * index)) for index in range(num)]
    for tail in ((), tuple(range(50, 50 + num_queries))):
        for index, prefix in enumerate(prefixes):
            ask(core, (*prefix, *tail), 1, salt=f"{salt}-{index}")
        last = run(core)
    assert last.num_steps == 1
    return last.seconds


def gains(engines: dict[str, Core], kinds: dict[str, list[tuple[int, ...]]], batches: Sequence[int]) -> None:
    """What each drafter does."""
    print("| text | sequences | drafter | kept | tokens a step, each | a pass, in steps | faster |")
    print("|---|---|---|---|---|---|---|")
    for name, prompts in kinds.items():
        for num in batches:
            passes = [
                {
                    drafter: one_pass(engines[drafter], prompts[:num], number, name)
                    for drafter in in_turn(engines, number)
                }
                for number in range(ROUNDS)
            ]
            for drafter in engines:
                if drafter != PLAIN:
                    print(f"| {name} | {num} | {drafter} | {line(num, passes, drafter)} |", flush=True)


def in_turn(engines: dict[str, Core], number: int) -> list[str]:
    """Each begins a round: who comes first finds the processor in another state than who comes last."""
    names = list(engines)
    return names[number % len(names) :] + names[: number % len(names)]


def line(num: int, passes: list[dict[str, Run]], drafter: str) -> str:
    """The figures of one drafter: counts of the last pass, by when it has learned, and medians of times."""
    last, plain = passes[-1][drafter], passes[-1][PLAIN]
    kept = f"{last.num_accepted / last.num_drafted:.0%} of {last.num_drafted}" if last.num_drafted else "none tried"
    plain_step_s = plain.seconds / plain.num_steps
    each_s = last.drafting_s / last.num_computed * num if last.num_computed else 0.0
    faster = sorted(one[PLAIN].seconds / one[drafter].seconds for one in passes)
    spread = f"{median(faster):.2f} ({faster[0]:.2f} to {faster[-1]:.2f})"
    return f"{kept} | {last.num_tokens / last.num_steps / num:.2f} | {each_s / plain_step_s:.2f} | {spread}"


def one_pass(core: Core, prompts: Sequence[Sequence[int]], number: int, name: str) -> Run:
    """All prompts at once."""
    for prompt in prompts:
        ask(core, prompt, OUTPUT_TOKENS, f"{name}-{len(prompts)}-{number}", set(prompt) if name == NOISE else ())
    return run(core)


def ask(core: Core, prompt: Sequence[int], num_tokens: int, salt: str, among: set[int] | tuple[()] = ()) -> None:
    """The request waits for its turn. It finds cached prefixes of the same salt alone.

    `among`: its answer is of these tokens, drawn nearly evenly.
    """
    number = next(_ids)
    sampling = Sampling(
        tokens_max=num_tokens,
        tokens_min=num_tokens,
        temperature=5.0 if among else 0.0,
        seed=number,
        logit_bias=tuple((token, 100.0) for token in among),
    )
    core.submit(Request(id=number, prompt=tuple(prompt), sampling=sampling, cache_salt=salt))


_ids = count()  # of requests


def run(core: Core) -> Run:
    """All that was asked is answered."""
    num_steps, began_ns, usages, drafting = core.stats().num_steps, core.meter.now_ns(), [], []
    while core.has_work:
        result = core.step()
        usages += [finished.usage for finished in result.finished]
        drafting += [charge for charge in result.charges if charge.work is Work.DRAFTED]
    return Run(
        seconds=(core.meter.now_ns() - began_ns) / 1e9,
        num_tokens=sum(usage.num_output for usage in usages),
        num_steps=core.stats().num_steps - num_steps,
        num_drafted=sum(usage.num_drafted for usage in usages),
        num_accepted=sum(usage.num_accepted for usage in usages),
        drafting_s=sum(charge.device_ns for charge in drafting) / 1e9,
        num_computed=sum(charge.num_tokens for charge in drafting),
    )


def texts(tokenizer: Tokenizer) -> dict[str, list[tuple[int, ...]]]:
    """Eight prompts of each kind."""
    prose = cut(tokenizer, "prose.md", "operations.md", "log.md", "readme.md")
    code = cut(tokenizer, "code.py.txt", "partition.py.txt", "scheduler.py.txt", "sequence.py.txt")
    copied = [prompt[:128] * 2 + prompt[:64] for prompt in code]
    dice = random.Random(1)
    noise = [tuple(dice.choices(range(100, 100 + NOISE_TOKENS), k=PROMPT_TOKENS)) for _ in range(max(BATCHES))]
    return {"prose": prose, "code": code, "code copied": copied, NOISE: noise}


def cut(tokenizer: Tokenizer, *names: str) -> list[tuple[int, ...]]:
    """Two pieces of each text, of PROMPT_TOKENS."""
    pieces: list[tuple[int, ...]] = []
    for name in names:
        tokens = tokenizer.encode((TEXTS / name).read_text(), 100_000)
        pieces += [tokens[start : start + PROMPT_TOKENS] for start in (0, PROMPT_TOKENS)]
    return pieces


if __name__ == "__main__":
    main()
