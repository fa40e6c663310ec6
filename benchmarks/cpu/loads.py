"""What all contenders are asked for, the same for each: greedy, end of sequence ignored, seeds fixed.

Standard library alone: every contender's own Python imports it.
"""

from random import Random

VOCAB_SIZE = 32_000  # of both checkpoints
SPECIAL_TOKENS = 3  # the lowest ids; no prompt has them

Prompt = list[int]
Load = list[tuple[Prompt, int]]  # each request's prompt and how many tokens to generate


def _prompt(random: Random, num_tokens: int) -> Prompt:
    return [random.randrange(SPECIAL_TOKENS, VOCAB_SIZE) for _ in range(num_tokens)]


def _same(random: Random, num_requests: int) -> Load:
    return [(_prompt(random, 128), 128) for _ in range(num_requests)]


def _mixed(random: Random) -> Load:
    return [(_prompt(random, random.randint(16, 512)), random.randint(16, 256)) for _ in range(32)]


LOADS: dict[str, Load] = {
    "A": _same(Random(1), 1),  # one stream: bound by the memory that weights are read from
    "B": _same(Random(2), 16),  # sixteen at once
    "C": _mixed(Random(3)),  # thirty-two at once, long and short: 7,893 tokens of prompts and 5,035 of output
}
TITLES = {"A": "one stream, 128 + 128 tokens", "B": "16 streams, 128 + 128", "C": "32 streams, mixed lengths"}
WARM_UP: Load = [(prompt[:32], 4) for prompt, _ in LOADS["B"]]
