"""What drafts bring on real text: `python -m benchmarks.speculation [--weights int8]`, or `make speculation`.

Owns two tables. The first is c(q): a step with q tokens for each sequence, in steps with one, which is what verifying
q - 1 drafts costs on this machine and with these weights. The second is what the drafter makes of it, for one sequence
and for eight: how many drafts are kept, how many tokens a step brings, and how much faster the whole is, in turn with
plain decoding. The demo model, greedily, on our own prose and code, and on code to be copied, as when a file is edited.
Some two minutes.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median

from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.types import Request, Sampling
from worker.config import model_folder
from worker.text import Tokenizer, load_tokenizer

DEMO_MODEL = "smollm2-moe"
ROOT = Path(__file__).parents[1]
PROMPT_TOKENS = 320
OUTPUT_TOKENS = 96
BATCHES = (1, 8)
DRAFTS_MAX = (0, 2, 4, 8)  # 0: plain decoding, which the others are compared with
QUERIES = (1, 2, 3, 5, 9)  # tokens of a sequence in a step: one, and so many drafts less one
ROUNDS = 3


@dataclass(frozen=True)
class Run:
    """One pass of the same prompts."""

    seconds: float
    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int8", help="a format: fp32, bf16, int8, int4")
    weights = parser.parse_args().weights
    folder = model_folder(DEMO_MODEL)
    tokenizer = load_tokenizer(folder)
    config = EngineConfig(weights=weights, cache_tokens=16 * 1024)
    engines = {num: build(replace(config, drafts_max=num), folder) for num in DRAFTS_MAX}
    for engine in engines.values():
        engine.meter.start()
    costs(engines[0])
    gains(engines, tokenizer)


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
        began_s = time.perf_counter()
        num_steps = run(core).num_steps
        took_s = time.perf_counter() - began_s
    assert num_steps == 1
    return took_s


def gains(engines: dict[int, Core], tokenizer: Tokenizer) -> None:
    """The drafter's table."""
    print("\n| text | sequences | drafts at most | kept | tokens a step, each | faster |\n|---|---|---|---|---|---|")
    for name, prompts in texts(tokenizer).items():
        for num in BATCHES:
            passes = [
                {most: one_pass(core, prompts[:num], str(number)) for most, core in engines.items()}
                for number in range(ROUNDS)
            ]
            for most, run in passes[0].items():
                faster = median(one[0].seconds / one[most].seconds for one in passes)
                kept = f"{run.num_accepted / run.num_drafted:.0%}" if run.num_drafted else "none tried"
                print(
                    f"| {name} | {num} | {most} | {kept} | {run.num_tokens / run.num_steps / num:.2f} | {faster:.2f} |"
                )


def one_pass(core: Core, prompts: Sequence[Sequence[int]], salt: str) -> Run:
    """All prompts at once."""
    for prompt in prompts:
        ask(core, prompt, OUTPUT_TOKENS, salt)
    return run(core)


def ask(core: Core, prompt: Sequence[int], num_tokens: int, salt: str) -> None:
    """The request waits for its turn. It finds cached prefixes of the same salt alone."""
    sampling = Sampling(tokens_max=num_tokens, tokens_min=num_tokens)
    core.submit(Request(id=next(_ids), prompt=tuple(prompt), sampling=sampling, cache_salt=salt))


_ids = count()  # of requests


def run(core: Core) -> Run:
    """All that was asked is answered."""
    num_steps, began_s, usages = core.stats().num_steps, time.perf_counter(), []
    while core.has_work:
        usages += [finished.usage for finished in core.step().finished]
    return Run(
        seconds=time.perf_counter() - began_s,
        num_tokens=sum(usage.num_output for usage in usages),
        num_steps=core.stats().num_steps - num_steps,
        num_drafted=sum(usage.num_drafted for usage in usages),
        num_accepted=sum(usage.num_accepted for usage in usages),
    )


def texts(tokenizer: Tokenizer) -> dict[str, list[tuple[int, ...]]]:
    """Eight prompts of each kind."""
    prose = cut(tokenizer, "docs/architecture.md", "docs/operations.md", "docs/log.md", "README.md")
    code = cut(tokenizer, "worker/service.py", "worker/partition.py", "engine/scheduler.py", "engine/sequence.py")
    return {"prose": prose, "code": code, "code copied": [prompt[:128] * 2 + prompt[:64] for prompt in code]}


def cut(tokenizer: Tokenizer, *names: str) -> list[tuple[int, ...]]:
    """Two pieces of each file, of PROMPT_TOKENS."""
    pieces: list[tuple[int, ...]] = []
    for name in names:
        tokens = tokenizer.encode((ROOT / name).read_text()[:8000], 100_000)
        pieces += [tokens[start : start + PROMPT_TOKENS] for start in (0, PROMPT_TOKENS)]
    return pieces


if __name__ == "__main__":
    main()
