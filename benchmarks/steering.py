"""What steering costs a token: `python -m benchmarks.steering MODEL_FOLDER`, or without a folder the demo model's.

Owns the cases. Each is the choosing of 32 tokens, greedily, by `engine.sampler.accept` on the CPU table; they are taken
in turn, and the least of several times counts, since whatever disturbs only adds. A grammar's matcher stands in the
middle of a JSON string, which allows nearly all tokens, or where only a few are allowed.
"""

import asyncio
import json
import math
import sys
import time
from pathlib import Path

import torch

from engine.constraint import Constraint
from engine.sampler import draw
from engine.sequence import Sequence, Share
from engine.types import Request, Sampling
from kernels.backends import pick
from schemas.requests import JsonSchema, NamedSchema, OneOf
from worker.folders import models_folder
from worker.grammar import Grammars, source_of
from worker.text import Tokenizer, load_tokenizer

NUM_ROWS = 32
NUM_OUTPUT = 256  # tokens that have come: penalties look at each
NUM_ROUNDS = 40
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main() -> None:
    """Prints a line for each case: microseconds a token, and how many more than without steering."""
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else models_folder() / "smollm2-moe"
    tokenizer = load_tokenizer(folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    logits = torch.randn(NUM_ROWS, vocab_size)
    ops = pick("cpu")
    cases = _cases(tokenizer, vocab_size)
    best = dict.fromkeys(cases, math.inf)
    for _ in range(NUM_ROUNDS):
        for name, shares in cases.items():
            start = time.perf_counter()
            draw(ops, logits, shares).accepted()
            best[name] = min(best[name], time.perf_counter() - start)
    plain = best["nothing asked"]
    for name, seconds in best.items():
        print(f"{name:28} {seconds / NUM_ROWS * 1e6:8.1f} us a token  {(seconds - plain) / NUM_ROWS * 1e6:+8.1f} us")


def _cases(tokenizer: Tokenizer, vocab_size: int) -> dict[str, list[Share]]:
    grammars = Grammars(tokenizer, vocab_size, tuple(tokenizer.eos_token_ids))
    person = _compiled(grammars, JsonSchema(json_schema=NamedSchema(name="person", schema=SCHEMA)), "a schema of two")
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1300)}}
    _compiled(grammars, JsonSchema(json_schema=NamedSchema(name="wide", schema=wide)), "a schema of 1,300")
    choice = _compiled(grammars, OneOf(choices=["yes", "no"]), "a choice of two")
    biases = tuple((token, 1.0) for token in range(300))
    within = tokenizer.encode_piece('{"name": "A')
    return {
        "nothing asked": _shares(Sampling(tokens_max=999)),
        "300 biases": _shares(Sampling(tokens_max=999, logit_bias=biases)),
        "penalties, 256 tokens": _shares(Sampling(tokens_max=999, frequency_penalty=0.5, repetition_penalty=1.1)),
        "grammar, amid a JSON string": _shares(Sampling(tokens_max=999), person, within),
        "grammar, a choice of two": _shares(Sampling(tokens_max=999), choice, []),
    }


def _compiled(grammars: Grammars, response_format: JsonSchema | OneOf, name: str) -> Constraint:
    source, seconds = source_of(response_format), math.inf
    for _ in range(5):
        start = time.perf_counter()
        grammar = asyncio.run(grammars.compile(source))
        seconds = min(seconds, time.perf_counter() - start)
    print(f"compiled: {name:18} {seconds * 1e3:8.1f} ms")
    return grammar


def _shares(sampling: Sampling, constraint: Constraint | None = None, output: list[int] | None = None) -> list[Share]:
    """Sequences that are one token behind, all alike; the output stays as it is."""
    shares = []
    for number in range(NUM_ROWS):
        asked = Request(id=number, prompt=(5, 6, 7), sampling=sampling, constraint=constraint)
        sequence = Sequence(request=asked, choice=0, rank=(0, 0, 0), length_max=9999)
        sequence.tokens += list(range(10, 10 + NUM_OUTPUT)) if output is None else output
        sequence.reach(len(sequence.tokens) - 1)
        shares.append(sequence.share(1, first_logits=number))
    return shares


if __name__ == "__main__":
    main()
