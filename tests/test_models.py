"""The decoder computes what transformers computes, however a sequence is cut into steps."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from engine.loader import load
from engine.models import ARCHITECTURES, Decoder, KVCache
from engine.quant import FORMATS
from kernels.reference import OPS
from tests.parity import (
    ARCHITECTURE_SHAPES,
    BF16_ERROR_MAX,
    BLOCK_SIZE,
    ERROR_MAX,
    NUM_BLOCKS,
    SEED,
    TOKENS,
    cache_for,
    logits,
    median_error,
    model_logits,
    relative_error,
    rounded,
    step,
)
from tests.tiny_models import SHAPES, VOCAB_SIZE, tiny, transformers_logits


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)  # so small that a second thread only waits
    # With seeds 3 and 4 a token in one of the shapes has two experts of all but equal score, which bf16 swaps.
    return tiny(request.param, tmp_path_factory.mktemp("model"), SEED)


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    assert relative_error(model_logits(checkpoint, OPS, "fp32"), transformers_logits(checkpoint, TOKENS)) < ERROR_MAX


@pytest.mark.parametrize("weights", [name for name in FORMATS if name != "fp32"])
@pytest.mark.parametrize("name", ARCHITECTURE_SHAPES)
def test_in_another_format_they_are_those_of_its_weights(tmp_path: Path, name: str, weights: str) -> None:
    checkpoint = tiny(name, tmp_path, SEED)
    ours, exact = model_logits(checkpoint, OPS, weights), transformers_logits(checkpoint, TOKENS)
    assert relative_error(ours, transformers_logits(rounded(checkpoint, weights), TOKENS)) < ERROR_MAX
    assert relative_error(ours, exact) > 10 * ERROR_MAX, "the format was not used"


@pytest.mark.parametrize("cut", [[1] * 23, [5, 9, 1, 8], [22, 1]], ids=["token by token", "chunks", "prefill, decode"])
def test_a_sequence_cut_into_steps_has_the_logits_of_one_step(checkpoint: Path, cut: list[int]) -> None:
    model = load_fp32(checkpoint)
    remaining = iter(TOKENS)
    chunks = [list(islice(remaining, length)) for length in cut]
    whole, in_steps = logits(model, [TOKENS]), logits(model, chunks)
    assert relative_error(in_steps, whole) < ERROR_MAX


def test_the_head_sees_only_the_rows_that_were_asked_for(checkpoint: Path) -> None:
    model = load_fp32(checkpoint)
    rows = [22, 4]
    assert relative_error(step(model, cache_for(model), 0, TOKENS, rows), logits(model, [TOKENS])[rows]) < 1e-6
    assert step(model, cache_for(model), 0, TOKENS, []).shape == (0, VOCAB_SIZE)


def test_the_cache_takes_the_bytes_it_says(checkpoint: Path) -> None:
    """And no more: latent attention keeps one tensor for a layer, of which the values are a view."""
    model = load_fp32(checkpoint)
    cache = cache_for(model)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in cache.keys + cache.values}
    announced = KVCache.bytes_per_block(model.spec, BLOCK_SIZE, model.dtype)
    assert sum(storage.nbytes() for storage in storages.values()) == NUM_BLOCKS * announced


def test_bf16_stays_near_fp32(checkpoint: Path) -> None:
    exact = logits(load_fp32(checkpoint), [TOKENS])
    in_bf16 = logits(load(checkpoint, OPS, weights="bf16", dtype=torch.bfloat16), [TOKENS])
    assert median_error(in_bf16, exact) < BF16_ERROR_MAX
    assert in_bf16.dtype == torch.float32


def load_fp32(checkpoint: Path) -> Decoder:
    return load(checkpoint, OPS, weights="fp32", dtype=torch.float32)


def test_the_readme_names_every_architecture() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert [name for name in ARCHITECTURES if f"`{name}`" not in readme] == []


def test_every_published_architecture_has_a_shape(tmp_path: Path) -> None:
    configs = [tiny(name, tmp_path, SEED) / "config.json" for name in ARCHITECTURE_SHAPES]
    there = {json.loads(config.read_text())["architectures"][0] for config in configs}
    assert there == set(ARCHITECTURES) - {"SmolLM2MoeForCausalLM"}  # our own: tests/test_demo_model.py
