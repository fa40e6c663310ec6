"""Whole models on the Triton table give the definition's logits: every op is called as the decoder calls it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.loader import load
from engine.models import KVCache
from kernels import reference
from kernels.ops import AttentionBatch, Normed, Ops
from kernels.triton import OPS, quantize
from tests import tiny_models, triton_interpreter
from tests.triton_memory import guarded

# bf16 rounds at each of some thirty steps in another order: 2^-9 each, and they add up as the square root.
TOLERANCE = 0.03


MODELS: list[Callable[[Path], Path]] = [
    tiny_models.tiny_mixtral,
    tiny_models.tiny_qwen3_moe,
    tiny_models.tiny_gpt_oss,
    tiny_models.tiny_deepseek_v2,
    tiny_models.tiny_deepseek_v3,
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_prompt_and_a_decode_give_the_definitions_logits(model: Callable[[Path], Path], tmp_path: Path) -> None:
    triton_interpreter.install()
    path = model(tmp_path)
    actual, expected = (logits(path, table) for table in (OPS, reference.OPS))
    assert (actual - expected).norm() <= TOLERANCE * expected.norm()


def test_so_does_a_draft_layer(tmp_path: Path) -> None:
    triton_interpreter.install()
    path = tiny_models.with_draft_layer(tiny_models.tiny_deepseek_v3(tmp_path))
    actual, expected = (logits(path, table, draft_heads=True) for table in (OPS, reference.OPS))
    assert len(actual) == 4
    assert ((actual - expected).norm(dim=1) <= TOLERANCE * expected.norm(dim=1)).all()


# A number that bf16's noise of 1 % moves across a step of e4m3 moves by a whole step, 9 % in the mean: that makes 3 %
# of it, the square root of the two's product, in each of some ten products.
FP8_TOLERANCE = 0.12


def test_with_fp8_weights_they_are_those_of_rounded_activations(tmp_path: Path) -> None:
    triton_interpreter.install()
    path = tiny_models.tiny_deepseek_v2(tmp_path)
    unpacked = reference.OPS.weights["fp8"]

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return unpacked.linear(reference.quantize_rows_fp8(x), weight).to(x.dtype)

    definition = replace(reference.OPS, weights={**reference.OPS.weights, "fp8": replace(unpacked, linear=linear)})
    actual, expected = (logits(path, table, "fp8-blocks") for table in (OPS, definition))
    assert (actual - expected).norm() <= FP8_TOLERANCE * expected.norm()


def test_no_product_rounds_what_a_norm_has_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_interpreter.install()
    given: list[Tensor] = []
    rounded: list[Tensor] = []
    alone = quantize.quantize

    def add_rms_norm(*arguments: Any) -> tuple[Normed, Tensor]:
        normed, total = OPS.add_rms_norm(*arguments)
        given.append(quantize.plain(normed))
        return normed, total

    def round_alone(x: Tensor) -> quantize.Rows:
        rounded.append(x)
        return alone(x)

    monkeypatch.setattr(quantize, "quantize", round_alone)
    logits(tiny_models.tiny_deepseek_v2(tmp_path), replace(OPS, add_rms_norm=add_rms_norm), "fp8-blocks")
    assert rounded, "attention's output, at least"
    assert not {id(x) for x in given} & {id(x) for x in rounded}


def logits(path: Path, ops: Ops, weights: str = "bf16", *, draft_heads: bool = False) -> Tensor:
    """After a prompt of 19 tokens, and after one more: (2, V). With those of the drafts behind each: (4, V)."""
    decoder = load(path, ops, weights=weights, dtype=torch.bfloat16, draft_heads=draft_heads)
    cache = KVCache.allocate(decoder.spec, 4, 8, torch.bfloat16)
    tokens = torch.arange(3, 23)
    table = torch.tensor([[2, 0, 3]])
    steps = []
    with torch.inference_mode(), guarded():
        for start, end in ((0, 19), (19, 20)):
            position = torch.arange(start, end)
            slots = table[0, position // 8] * 8 + position % 8
            batch, last = AttentionBatch(table, [0, end - start], [end], slots), torch.tensor([end - start - 1])
            steps.append(decoder.forward(tokens[start:end], position, batch, cache, last))
            if draft_heads:
                steps.append(decoder.draft(tokens[start:end] + 1, position, batch, cache, last))
    return torch.cat(steps)
