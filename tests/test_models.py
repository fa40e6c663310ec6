"""The decoder computes what transformers computes, however a sequence is cut into steps."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.loader import load
from engine.models import Decoder, KVCache
from kernels.ops import AttentionBatch
from kernels.reference import OPS
from tests.tiny_models import VOCAB_SIZE, tiny_llama, tiny_mixtral, transformers_logits

BLOCK_SIZE = 4  # so that 23 tokens fill five blocks and a part
TOKENS = torch.randint(VOCAB_SIZE, (23,), generator=torch.Generator().manual_seed(7)).tolist()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # with heads of 16: one pair kept, two between, five scaled
}

Shape = tuple[Callable[..., Path], dict[str, Any]]
SHAPES: dict[str, Shape] = {
    "llama": (tiny_llama, {}),
    "llama, one key-value head, tied": (tiny_llama, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, heads wider than the hidden size": (
        tiny_llama,
        {"hidden_size": 42, "num_attention_heads": 6, "head_dim": 32},
    ),
    "llama, every head its own, biases": (tiny_llama, {"num_key_value_heads": 4, "attention_bias": True}),
    "llama, llama3 rope": (tiny_llama, {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (tiny_llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mixtral": (tiny_mixtral, {}),
    "mixtral, 8 experts, 3 chosen, tied": (
        tiny_mixtral,
        {"num_local_experts": 8, "num_experts_per_tok": 3, "tie_word_embeddings": True, "num_hidden_layers": 3},
    ),
    "mixtral, one chosen, odd hidden size": (
        tiny_mixtral,
        {
            "num_experts_per_tok": 1,
            "hidden_size": 37,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, shape = SHAPES[request.param]
    return make(tmp_path_factory.mktemp("model"), 3, **shape)


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    """Within 1e-5 of the largest logit: the promise is 1e-4, two ways of summing in fp32 differ by about 1e-6."""
    ours = logits(load_fp32(checkpoint), [TOKENS])
    assert relative_error(ours, transformers_logits(checkpoint, TOKENS)) < 1e-5


@pytest.mark.parametrize("cut", [[1] * 23, [5, 9, 1, 8], [22, 1]], ids=["token by token", "chunks", "prefill, decode"])
def test_a_sequence_cut_into_steps_has_the_logits_of_one_step(checkpoint: Path, cut: list[int]) -> None:
    model = load_fp32(checkpoint)
    remaining = iter(TOKENS)
    chunks = [list(islice(remaining, length)) for length in cut]
    whole, in_steps = logits(model, [TOKENS]), logits(model, chunks)
    assert relative_error(in_steps, whole) < 1e-5


def test_the_head_sees_only_the_rows_that_were_asked_for(checkpoint: Path) -> None:
    model = load_fp32(checkpoint)
    rows = [22, 4]
    assert relative_error(step(model, cache_for(model), 0, TOKENS, rows), logits(model, [TOKENS])[rows]) < 1e-6
    assert step(model, cache_for(model), 0, TOKENS, []).shape == (0, VOCAB_SIZE)


def test_bf16_stays_near_fp32(checkpoint: Path) -> None:
    """bf16 keeps 8 bits, so a rounding is up to 0.4 %, and the dozens of one forward pass add up to a few percent.

    Two experts of all but equal score may change places, which is worse, but rare: hence the median.
    """
    exact = logits(load_fp32(checkpoint), [TOKENS])
    rounded = logits(load(checkpoint, OPS, weights="bf16", dtype=torch.bfloat16), [TOKENS])
    error = (rounded - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 0.05
    assert rounded.dtype == torch.float32


def load_fp32(checkpoint: Path) -> Decoder:
    return load(checkpoint, OPS, weights="fp32", dtype=torch.float32)


def logits(model: Decoder, chunks: Sequence[list[int]]) -> Tensor:
    """The logits (T, V) of one sequence computed chunk by chunk through one cache."""
    cache, outputs, start = cache_for(model), [], 0
    for chunk in chunks:
        outputs.append(step(model, cache, start, chunk, range(len(chunk))))
        start += len(chunk)
    return torch.cat(outputs)


def step(model: Decoder, cache: KVCache, start: int, tokens: list[int], rows: Sequence[int]) -> Tensor:
    positions = torch.arange(start, start + len(tokens))
    batch = AttentionBatch(
        block_tables=BLOCK_TABLE[None],
        query_starts=[0, len(tokens)],
        context_lens=[start + len(tokens)],
        slots=BLOCK_TABLE[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
    )
    return model.forward(torch.tensor(tokens), positions, batch, cache, torch.tensor(rows, dtype=torch.int64))


BLOCK_TABLE = torch.tensor([6, 2, 7, 1, 4, 3])  # out of order, with gaps: the table is read, not assumed


def cache_for(model: Decoder) -> KVCache:
    """A cache full of NaN: whatever is read before it was written shows."""
    cache = KVCache.allocate(model.spec, num_blocks=8, block_size=BLOCK_SIZE, dtype=model.dtype)
    for tensor in cache.keys + cache.values:
        tensor.fill_(torch.nan)
    return cache


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
