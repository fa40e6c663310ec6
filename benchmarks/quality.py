"""What each weight format costs the demo model in quality, on this machine's CPU: `python -m benchmarks.quality`.

Owns the table in docs/quality.md. All formats read the same text, our own files, with activations in fp32; fp32 weights
are what the others are compared with. Perplexities of so little text differ by some 0.3 % when anything is rounded
otherwise, since a router that is near a tie chooses other experts; the divergence is the steadier figure. Three minutes
on one thread and 3 GB of memory.
"""

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from engine.loader import load
from engine.models import Decoder, KVCache
from kernels.backends import pick
from kernels.ops import AttentionBatch
from worker.config import model_folder
from worker.text import load_tokenizer

DEMO_MODEL = "smollm2-moe"
ROOT = Path(__file__).parents[1]
TEXTS = ("docs/architecture.md", "worker/service.py", "LICENSE")  # prose, code, law
CHARACTERS_MAX = 6000  # of each, about 1,400 tokens
TOKENS_MAX = 6000
BLOCK_SIZE = 16
FORMATS = ("fp32", "bf16", "int8", "int4")  # the first is the measure of the others


def main() -> None:
    """Prints a line for each format as soon as it is known."""
    torch.set_grad_enabled(False)
    folder, ops = model_folder(DEMO_MODEL), pick("cpu")
    tokenizer = load_tokenizer(folder)
    texts = [torch.tensor(tokenizer.encode((ROOT / name).read_text()[:CHARACTERS_MAX], TOKENS_MAX)) for name in TEXTS]
    print(f"{DEMO_MODEL} on the table {ops.name}, {sum(map(len, texts)):,} tokens of {', '.join(TEXTS)}")
    print("| weights | perplexity | equal greedy tokens | divergence, nats |\n|---|---|---|---|", flush=True)
    expected: Tensor | None = None
    for name in FORMATS:
        start = time.perf_counter()
        model = load(folder, ops, weights=name, dtype=torch.float32)
        scores = torch.cat([log_probabilities(model, tokens) for tokens in texts])
        expected = scores if expected is None else expected
        following = torch.cat([tokens[1:] for tokens in texts])
        perplexity = scores.gather(1, following[:, None]).mean().neg().exp()
        equal = (scores.argmax(1) == expected.argmax(1)).float().mean()
        print(f"| {name} | {perplexity:.2f} | {100 * equal:.1f} % | {divergence(expected, scores):.4f} |", end="")
        print(f" {time.perf_counter() - start:.0f} s", flush=True)


def log_probabilities(model: Decoder, tokens: Tensor) -> Tensor:
    """(T - 1, V) fp32: what the model expects at each position but the first of the text `tokens` (T,)."""
    num_tokens = len(tokens)
    table = torch.arange(1, 1 + math.ceil(num_tokens / BLOCK_SIZE))
    position = torch.arange(num_tokens)
    slots = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
    batch = AttentionBatch(table[None], [0, num_tokens], [num_tokens], slots)
    cache = KVCache.allocate(model.spec, len(table) + 1, BLOCK_SIZE, model.dtype)
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
