"""What each format of weights and cache costs the demo model in quality, on this machine's CPU.

Owns the table in docs/quality.md, `python -m benchmarks.quality`; `... int8 int4/fp8` measures int8 weights, then int4
weights with a cache of fp8. All read the same text, `benchmarks/texts/`, with activations in fp32; weights and cache in
fp32 are what the others are compared with. Perplexities of so little text differ by some 0.5 % when anything is rounded
otherwise, since a router that is near a tie chooses other experts; the divergence is the steadier figure. Three to ten
minutes on one thread, 3 GB of memory.
"""

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from engine.loader import load
from engine.models import Decoder, KVCache
from engine.quant import FORMATS
from kernels.backends import pick
from kernels.cache import CACHE_DTYPES
from kernels.ops import AttentionBatch
from worker.folders import model_folder
from worker.text import load_tokenizer

DEMO_MODEL = "smollm2-moe"
TEXTS = Path(__file__).parent / "texts"  # as our own files once were: what is compared must not move
NAMES = ("prose.md", "code.py.txt", "law.txt")
TOKENS_MAX = 6000
BLOCK_SIZE = 16
EXACT = "fp32"  # the measure of the others
CACHES = ("bf16", "fp8", "int8")
ROWS = [name for name in FORMATS if name != EXACT] + [f"{EXACT}/{cache}" for cache in CACHES]


def main() -> None:
    """Prints a line for each pair of formats as soon as it is known."""
    torch.set_grad_enabled(False)
    folder, ops = model_folder(DEMO_MODEL), pick("cpu")
    tokenizer = load_tokenizer(folder)
    texts = [torch.tensor(tokenizer.encode((TEXTS / name).read_text(), TOKENS_MAX)) for name in NAMES]
    print(f"{DEMO_MODEL} on the table {ops.name}, {sum(map(len, texts)):,} tokens of {', '.join(NAMES)}")
    print("| weights | cache | perplexity | above fp32 | equal greedy tokens | divergence, nats |")
    print("|---|---|---|---|---|---|", flush=True)
    expected: Tensor | None = None
    exact = 0.0
    for name in [EXACT, *(sys.argv[1:] or ROWS)]:
        start = time.perf_counter()
        weights, _, cache = name.partition("/")
        model = load(folder, ops, weights=weights, dtype=torch.float32)
        dtype = CACHE_DTYPES[cache or EXACT]
        scores = torch.cat([log_probabilities(model, tokens, dtype) for tokens in texts])
        expected = scores if expected is None else expected
        following = torch.cat([tokens[1:] for tokens in texts])
        perplexity = float(scores.gather(1, following[:, None]).mean().neg().exp())
        exact = exact or perplexity
        equal = (scores.argmax(1) == expected.argmax(1)).float().mean()
        above = f"{100 * (perplexity / exact - 1):.1f} %"
        print(f"| {weights} | {cache or EXACT} | {perplexity:.2f} | {above} |", end="")
        print(f" {100 * equal:.1f} % | {divergence(expected, scores):.4f} |", end="")
        print(f" {time.perf_counter() - start:.0f} s", flush=True)


def log_probabilities(model: Decoder, tokens: Tensor, cache_dtype: torch.dtype) -> Tensor:
    """(T - 1, V) fp32: what the model expects at each position but the first of the text `tokens` (T,)."""
    num_tokens = len(tokens)
    table = torch.arange(1, 1 + math.ceil(num_tokens / BLOCK_SIZE))
    position = torch.arange(num_tokens)
    slots = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
    batch = AttentionBatch(table[None], [0, num_tokens], [num_tokens], slots)
    cache = KVCache.allocate(model.spec, len(table) + 1, BLOCK_SIZE, cache_dtype)
    return model.forward(tokens, position, batch, cache, position[:-1]).float().log_softmax(-1)


def divergence(expected: Tensor, scores: Tensor) -> float:
    """Kullback and Leibler's, of two (T, V) of log-probabilities: the mean over the rows, in nats."""
    total = 0.0
    for first in range(0, len(expected), 64):  # in pieces for the memory's sake
        p, q = expected[first : first + 64], scores[first : first + 64]
        total += float((p.exp() * (p - q)).sum())
    return total / len(expected)


if __name__ == "__main__":
    main()
