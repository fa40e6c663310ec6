"""Tiny checkpoints in the layouts that others publish, and the same weights as floats.

Owns a writer for each layout, after its publisher's own packing code, and by plain loops: it shares nothing with the
readers in engine/schemes. Numbers are random codes, so that every code occurs.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import tiny_gpt_oss, tiny_mixtral

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map: which of eight neighbours each place of a word takes
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

Written = tuple[dict[str, Tensor], Tensor]  # tensors by the end of their names, and the weight (out, in) fp32


@dataclass(frozen=True)
class Layout:
    """One published layout: how a matrix of a shape is written, what config.json says, and what we keep it as."""

    write: Callable[[int, int], Written]
    config: dict[str, Any]
    kept: str
    shape: dict[str, Any] = field(default_factory=dict)  # of the model


def _words(fields: Tensor, bits: int) -> Tensor:
    """(rows, columns) -> (rows, columns * bits / 32) int32, the first in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(len(fields), -(-fields.shape[1] // per_word), dtype=torch.int64)
    for column in range(fields.shape[1]):
        words[:, column // per_word] |= fields[:, column].long() << (bits * (column % per_word))
    return (words & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def _integers(num_out: int, num_in: int, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (out, in), zero points and scales (out, groups)."""
    groups = -(-num_in // group)
    levels = torch.randint(1 << bits, (num_out, num_in))
    zero = torch.randint(1, 1 << bits, (num_out, groups))
    scale = (0.15 / (1 << bits - 2) * (0.5 + torch.rand(num_out, groups))).half()
    return levels, zero, scale


def _weight(levels: Tensor, zero: Tensor, scale: Tensor, group_of: Tensor) -> Tensor:
    return (levels - zero[:, group_of]).float() * scale.float()[:, group_of]


def _neighbours(num_in: int, group: int) -> Tensor:
    return torch.arange(num_in) // group


def _gptq(bits: int = 4, group: int = GROUP, offset: int = 1, order: bool = False) -> Callable[[int, int], Written]:
    def write(num_out: int, num_in: int) -> Written:
        size = num_in if group == -1 else group
        levels, zero, scale = _integers(num_out, num_in, size, bits)
        group_of = _neighbours(num_in, size)
        if order:
            assert num_in > size
            group_of = group_of[torch.randperm(num_in)]
        tensors = {
            "qweight": _words(levels, bits).t(),
            "qzeros": _words(zero.t() - offset, bits),
            "scales": scale.t(),
        }
        if offset:  # version 1 names the groups also where they are neighbours
            tensors["g_idx"] = group_of.int()
        return tensors, _weight(levels, zero, scale, group_of)

    return write


def _awq(num_out: int, num_in: int) -> Written:
    levels, zero, scale = _integers(num_out, num_in, GROUP, 4)

    def packed(fields: Tensor) -> Tensor:  # (rows, out)
        eights = fields.reshape(len(fields), -1, 8)[..., AWQ_ORDER]
        return _words(eights.reshape(len(fields), -1), 4)

    tensors = {"qweight": packed(levels.t()), "qzeros": packed(zero.t()), "scales": scale.t()}
    return tensors, _weight(levels, zero, scale, _neighbours(num_in, GROUP))


def _in_words(bits: int = 4, group: int = GROUP, symmetric: bool = True) -> Callable[[int, int], Written]:
    def write(num_out: int, num_in: int) -> Written:
        size = num_in if group == -1 else group
        levels, zero, scale = _integers(num_out, num_in, size, bits)
        tensors = {
            "weight_packed": _words(levels, bits),
            "weight_shape": torch.tensor([num_out, num_in]),
            "weight_scale": scale,
        }
        if symmetric:
            zero = torch.full_like(zero, 1 << bits - 1)
        else:
            tensors["weight_zero_point"] = _words(zero.t(), bits).t()
        return tensors, _weight(levels, zero, scale, _neighbours(num_in, size))

    return write


def _in_bytes(per_tensor: bool = False, symmetric: bool = True) -> Callable[[int, int], Written]:
    def write(num_out: int, num_in: int) -> Written:
        q = torch.randint(-128, 128, (num_out, num_in), dtype=torch.int8)
        scale = 0.002 * (0.5 + torch.rand((1,) if per_tensor else (num_out, 1))).bfloat16()
        zero = torch.zeros_like(scale) if symmetric else torch.randint(-20, 20, scale.shape)
        tensors = {"weight": q, "weight_scale": scale}
        if not symmetric:
            tensors["weight_zero_point"] = zero.to(torch.int8)
        return tensors, (q.float() - zero) * scale.float()

    return write


def _fp8(scale_name: str, shape_of: Callable[[int, int], tuple[int, ...]]) -> Callable[[int, int], Written]:
    def write(num_out: int, num_in: int) -> Written:
        codes = torch.randint(256, (num_out, num_in), dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        scale = 0.001 * (0.5 + torch.rand(shape_of(num_out, num_in)))
        by_weight = scale
        if scale.dim() == 2 and len(scale) < num_out:
            by_weight = torch.empty(num_out, num_in)
            for i, j in product(range(scale.shape[0]), range(scale.shape[1])):
                by_weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = scale[i, j]
        q = codes.view(torch.float8_e4m3fn)
        return {"weight": q, scale_name: scale}, q.float() * by_weight

    return write


def _blocks(num_out: int, num_in: int) -> tuple[int, ...]:
    return (-(-num_out // 128), -(-num_in // 128))


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it, with all its fields."""
    group = {
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": None,
            "num_bits": 8,
            "observer": "minmax",
            "observer_kwargs": {},
            "strategy": "channel",
            "symmetric": True,
            "type": "int",
        }
        | weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "format": layout,
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "damp_percent": 0.1}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
_DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_RAGGED = {"hidden_size": 160, "intermediate_size": 200, "head_dim": 40}  # two blocks of 128, the second not full
_FOUR = {"num_bits": 4, "strategy": "group", "group_size": GROUP}

LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(_gptq(), _GPTQ, "int4"),
    "gptq v2, a group for each row": Layout(
        _gptq(group=-1, offset=0), _GPTQ | {"group_size": -1, "checkpoint_format": "gptq_v2"}, "int4"
    ),
    "gptq, a last group that is shorter": Layout(
        _gptq(group=40, offset=0), _GPTQ | {"group_size": 40, "checkpoint_format": "gptq_v2"}, "plain"
    ),
    "gptq, by activation": Layout(_gptq(order=True), _GPTQ | {"desc_act": True}, "plain"),
    "gptq, 8 bits": Layout(_gptq(bits=8), _GPTQ | {"bits": 8}, "plain"),
    "awq": Layout(_awq, _AWQ, "int4"),
    "W4A16": Layout(_in_words(), _compressed("pack-quantized", **_FOUR), "int4"),
    "W4A16, asymmetric": Layout(
        _in_words(symmetric=False), _compressed("pack-quantized", **_FOUR, symmetric=False), "int4"
    ),
    "W8A16": Layout(_in_words(bits=8, group=-1), _compressed("pack-quantized"), "int8"),
    "W8A8": Layout(_in_bytes(), _compressed("int-quantized"), "int8"),
    "W8A8, a scale for all": Layout(
        _in_bytes(per_tensor=True), _compressed("int-quantized", strategy="tensor"), "int8"
    ),
    "W8A8, asymmetric": Layout(_in_bytes(symmetric=False), _compressed("int-quantized", symmetric=False), "plain"),
    "FP8": Layout(_fp8("weight_scale", lambda out, _: (out, 1)), _compressed("float-quantized", type="float"), "fp8"),
    "FP8, blocks": Layout(
        _fp8("weight_scale", _blocks),
        _compressed("float-quantized", type="float", strategy="block", block_structure=[128, 128]),
        "fp8",
        _RAGGED,
    ),
    "DeepSeek's blocks": Layout(_fp8("weight_scale_inv", _blocks), _DEEPSEEK, "fp8", _RAGGED),
    "fp8, a scale for all": Layout(
        _fp8("weight_scale", lambda *_: ()), {"quant_method": "fp8", "activation_scheme": "static"}, "fp8"
    ),
}


def published(name: str, tmp: Path, floats: Path | None = None) -> tuple[Path, Path]:
    """A model whose attention and experts are in the layout, and the same of floats: two folders.

    It is a Mixtral, unless there is one of `floats`, whose weights are replaced.
    """
    layout = LAYOUTS[name]
    floats = floats or tiny_mixtral(tmp, 1, **layout.shape)
    folder = shutil.copytree(floats, tmp / "published")
    tensors = load_file(floats / "model.safetensors")
    quantized = dict(tensors)
    torch.manual_seed(0)
    for matrix in [one for one in tensors if one.endswith("proj.weight") or ".experts." in one]:
        written, tensors[matrix] = layout.write(*tensors[matrix].shape)
        del quantized[matrix]
        module = matrix.removesuffix("weight")
        quantized |= {module + end: tensor for end, tensor in written.items()}
    write_weights(folder, quantized)
    write_weights(floats, tensors)
    set_config(folder, quantization_config=layout.config)
    return folder, floats


def published_mxfp4(tmp: Path) -> tuple[Path, Path]:
    """A GPT-OSS whose experts are in MXFP4, and the same of floats: two folders."""
    floats = tiny_gpt_oss(tmp, 1)
    folder = shutil.copytree(floats, tmp / "published")
    tensors = load_file(floats / "model.safetensors")
    quantized = dict(tensors)
    torch.manual_seed(0)
    for name in [one for one in tensors if one.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, num_in, num_out = tensors[name].shape
        blocks = torch.randint(256, (num_experts, num_out, num_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 126, (num_experts, num_out, num_in // 32), dtype=torch.uint8)
        del quantized[name]
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        table = torch.tensor(E2M1 + [-value for value in E2M1])
        weight = torch.empty(num_experts, num_out, num_in)
        for byte in range(16):
            exponent = 2.0 ** (scales.float() - 127)
            weight[..., 2 * byte :: 32] = table[(blocks[..., byte] % 16).long()] * exponent
            weight[..., 2 * byte + 1 :: 32] = table[(blocks[..., byte] // 16).long()] * exponent
        tensors[name] = weight.transpose(1, 2)
    write_weights(folder, quantized)
    write_weights(floats, tensors)
    set_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, floats


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
