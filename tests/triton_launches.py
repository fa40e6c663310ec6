"""Launches of the Triton table at the shapes of published models, for the compile-only checks.

Owns the shapes. Tensors are on torch's meta device: they have a shape, a type and no memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.cache import row_size
from kernels.ops import AttentionBatch, HeadNorms, SamplingRow
from kernels.triton import OPS, attention, cache, elementwise, logprobs, norms, products, route, sample
from kernels.triton.heads import rotate_and_write
from kernels.triton.weights import INT4_DEPTHS, Matrices


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of a shape and type alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(hidden_size: int, layout: str) -> None:
    x, weight = tensor(8, hidden_size), tensor(hidden_size)
    norms.rms_norm(x, weight, 1e-6)
    norms.add_rms_norm(x, x, norms.prepare_norm(weight, [layout]), 1e-6)


@dataclass(frozen=True)
class Heads:
    """The attention of one model."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int = 0  # 0: the head size


MIXTRAL = Heads(32, 8, 128)
QWEN3 = Heads(32, 4, 128)
GPT_OSS = Heads(64, 8, 64)
V2_LITE = Heads(16, 1, 576, 512)  # latent attention, its weights absorbed: the value is the first part of the key


def before_attention(heads: Heads, dtype: torch.dtype = torch.bfloat16, *, has_norms: bool = False) -> None:
    H, G, D = heads.num_heads, heads.num_kv_heads, heads.head_size
    qkv, angles = tensor(8, H + 2 * G, D), tensor(8, D // 2, dtype=torch.float32)
    kept = tensor(1024, 16, G, row_size(D, dtype), dtype=dtype)
    head_norms = HeadNorms(tensor(D), tensor(D), 1e-6) if has_norms else None
    rotate_and_write(qkv, head_norms, angles, angles, kept, kept, tensor(8, dtype=torch.int64))


def latents() -> None:
    """DeepSeek-V2-Lite's, whose queries' rotary parts are few columns of each head."""
    angles = tensor(8, 32, dtype=torch.float32)
    rotated = elementwise.rotary(tensor(8, 17, 64), angles, angles)
    kept = tensor(1024, 16, 1, 576)
    slots = tensor(8, dtype=torch.int64)
    cache.write_kv(tensor(8, 1, 512), rotated[:, 16:], kept[..., :512], kept[..., 512:], slots)


def swiglu(intermediate: int) -> None:
    elementwise.swiglu(tensor(8, 2 * intermediate))


def attend(
    heads: Heads,
    num_queries: int,
    *,
    block_size: int = 16,
    window: int | None = None,
    has_sinks: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One sequence of 4,096 tokens, `num_queries` of them new."""
    query = tensor(num_queries, heads.num_heads, heads.head_size)
    keys = tensor(1024, block_size, heads.num_kv_heads, row_size(heads.head_size, dtype), dtype=dtype)
    values = keys[..., : heads.value_size] if heads.value_size else tensor(*keys.shape, dtype=dtype)
    table = tensor(1, 4096 // block_size, dtype=torch.int64)
    batch = AttentionBatch(table, [0, num_queries], [4096], tensor(num_queries, dtype=torch.int64))
    attention.attention(query, keys, values, batch, 0.1, window, tensor(heads.num_heads) if has_sinks else None)


@dataclass(frozen=True)
class Mixture:
    """The experts of one model."""

    hidden: int
    intermediate: int
    num_experts: int
    num_chosen: int
    has_shared: bool = False


MIXTRAL_EXPERTS = Mixture(4096, 14336, 8, 2)
QWEN3_EXPERTS = Mixture(2048, 768, 128, 8)
V2_LITE_EXPERTS = Mixture(2048, 1408, 64, 6, has_shared=True)
GPT_OSS_EXPERTS = Mixture(2880, 2880, 32, 4)


def matrices(format: str, num: int, num_out: int, num_in: int) -> Matrices:
    match format:
        case "bf16":
            values = tensor(num, num_out, num_in)
            scales = values
        case "int8":
            values, scales = tensor(num, num_out, num_in, dtype=torch.int8), tensor(num, num_out, dtype=torch.float32)
        case "int4" | "int4-g128" | "mxfp4":
            depth = next(depth for depth in INT4_DEPTHS if num_in % depth == 0)
            values = tensor(num, num_in // depth, num_out, depth // 8, dtype=torch.int32)
            groups = depth // (128 if format == "int4-g128" else 32)
            scales = tensor(num, num_in // depth, num_out, groups, dtype=torch.int32)
        case "fp8" | "fp8-blocks":
            values = tensor(num, num_out, num_in, dtype=torch.float8_e4m3fn)
            shape = (num, num_in // 128, num_out) if format == "fp8-blocks" else (num, num_out)
            scales = tensor(*shape, dtype=torch.float32)
    return Matrices(format.partition("-")[0], values, scales, num_out, num_in)


def mix(mixture: Mixture, format: str, num_tokens: int, *, is_clamped: bool = False) -> None:
    """The feed-forward of one layer; GPT-OSS's gate comes with biases."""
    gate_up = matrices(format, mixture.num_experts, 2 * mixture.intermediate, mixture.hidden)
    down = matrices(format, mixture.num_experts, mixture.hidden, mixture.intermediate)
    chosen = tensor(num_tokens, mixture.num_chosen, dtype=torch.int64)
    chosen_weights = tensor(num_tokens, mixture.num_chosen, dtype=torch.float32)
    x = tensor(num_tokens, mixture.hidden)
    activation = partial(OPS.clamped_swiglu, alpha=1.702, limit=7.0) if is_clamped else elementwise.swiglu
    biases = [tensor(mixture.num_experts, one.num_out) if is_clamped else None for one in (gate_up, down)]
    shared = tensor(num_tokens, mixture.hidden) if mixture.has_shared else None
    routed = x, chosen_weights, chosen, gate_up, down
    products.experts(*routed, products.linear, activation, biases[0], biases[1], shared)


def multiply(format: str, num_tokens: int, num_out: int, num_in: int) -> None:
    """One dense matrix."""
    products.linear(tensor(num_tokens, num_in), matrices(format, 1, num_out, num_in))


def choose(vocab_size: int) -> None:
    row = SamplingRow(temperature=1.0, top_k=20, top_p=0.9, min_p=0.0, uniform=0.5)
    sample.sample(tensor(2, vocab_size, dtype=torch.float32), [row, row])


def tell_logprobs(vocab_size: int) -> None:
    logprobs.logprobs(tensor(2, vocab_size, dtype=torch.float32), tensor(2, dtype=torch.int64), 20)


LAUNCHES: Mapping[str, Callable[[], object]] = {
    "norms, Qwen3-30B-A3B": partial(norm, 2048, "int4"),
    "norms, GPT-OSS": partial(norm, 2880, "mxfp4"),
    "norms, rounded too, Qwen3-30B-A3B": partial(norm, 2048, "fp8"),
    "norms, rounded too, DeepSeek-V3": partial(norm, 7168, "fp8"),
    "rotate and write, Qwen3-30B-A3B": partial(before_attention, QWEN3, has_norms=True),
    "rotate and write, GPT-OSS": partial(before_attention, GPT_OSS),
    "rotate and write fp8, Qwen3-30B-A3B": partial(before_attention, QWEN3, torch.float8_e4m3fn, has_norms=True),
    "rotate and write int8, Qwen3-30B-A3B": partial(before_attention, QWEN3, torch.int8, has_norms=True),
    "latents, DeepSeek-V2-Lite": latents,
    "swiglu, Mixtral": partial(swiglu, 14336),
    "decode, Qwen3-30B-A3B": partial(attend, QWEN3, 1),
    "decode, GPT-OSS": partial(attend, GPT_OSS, 1, window=128, has_sinks=True),
    "decode, DeepSeek-V2-Lite": partial(attend, V2_LITE, 1),
    "drafts, Qwen3-30B-A3B": partial(attend, QWEN3, 4),
    "many drafts, Qwen3-30B-A3B": partial(attend, QWEN3, 8),
    "drafts, DeepSeek-V2-Lite": partial(attend, V2_LITE, 4),
    "decode, Qwen3-30B-A3B, fp8": partial(attend, QWEN3, 1, dtype=torch.float8_e4m3fn),
    "decode, Qwen3-30B-A3B, int8": partial(attend, QWEN3, 1, dtype=torch.int8),
    "decode, DeepSeek-V2-Lite, fp8": partial(attend, V2_LITE, 1, dtype=torch.float8_e4m3fn),
    "drafts, Qwen3-30B-A3B, fp8": partial(attend, QWEN3, 4, dtype=torch.float8_e4m3fn),
    "many drafts, Qwen3-30B-A3B, fp8": partial(attend, QWEN3, 8, dtype=torch.float8_e4m3fn),
    "prompt, Qwen3-30B-A3B, fp8": partial(attend, QWEN3, 512, dtype=torch.float8_e4m3fn),
    "prompt, Qwen3-30B-A3B, int8": partial(attend, QWEN3, 512, dtype=torch.int8),
    "prompt, Mixtral": partial(attend, MIXTRAL, 512),
    "prompt, Qwen3-30B-A3B, blocks of 64": partial(attend, QWEN3, 512, block_size=64),
    "prompt, GPT-OSS": partial(attend, GPT_OSS, 512, has_sinks=True),
    "int4 experts of 1 token, Qwen3-30B-A3B": partial(mix, QWEN3_EXPERTS, "int4", 1),
    "int4 experts of 1 token in groups of 128, Qwen3-30B-A3B": partial(mix, QWEN3_EXPERTS, "int4-g128", 1),
    "int4 experts of 32 tokens, Qwen3-30B-A3B": partial(mix, QWEN3_EXPERTS, "int4", 32),
    "int4 experts of 64 tokens, Mixtral": partial(mix, MIXTRAL_EXPERTS, "int4", 64),
    "int4 experts of 512 tokens, Mixtral": partial(mix, MIXTRAL_EXPERTS, "int4", 512),
    "int8 experts of 8 tokens, DeepSeek-V2-Lite": partial(mix, V2_LITE_EXPERTS, "int8", 8),
    "int8 experts of 512 tokens, Mixtral": partial(mix, MIXTRAL_EXPERTS, "int8", 512),
    "bf16 experts of 8 tokens, DeepSeek-V2-Lite": partial(mix, V2_LITE_EXPERTS, "bf16", 8),
    "bf16 experts of 512 tokens, Mixtral": partial(mix, MIXTRAL_EXPERTS, "bf16", 512),
    "bf16 experts of 8 tokens, GPT-OSS": partial(mix, GPT_OSS_EXPERTS, "bf16", 8, is_clamped=True),
    "mxfp4 experts of 8 tokens, GPT-OSS": partial(mix, GPT_OSS_EXPERTS, "mxfp4", 8, is_clamped=True),
    "fp8 experts of 1 token, Qwen3-30B-A3B": partial(mix, QWEN3_EXPERTS, "fp8-blocks", 1),
    "fp8 experts of 64 tokens in blocks, Mixtral": partial(mix, MIXTRAL_EXPERTS, "fp8-blocks", 64),
    "fp8 experts of 1024 tokens in blocks, Mixtral": partial(mix, MIXTRAL_EXPERTS, "fp8-blocks", 1024),
    "route, Qwen3-30B-A3B": partial(route.route, tensor(8, 128), 8, "softmax", True),
    "route, DeepSeek-V3": partial(
        route.route, tensor(8, 256), 8, "sigmoid", True, 2.5, 8, 4, tensor(256, dtype=torch.float32)
    ),
    "route, DeepSeek-V2": partial(route.route, tensor(8, 160), 6, "softmax", False, 16.0, 8, 3),
    "sample, Qwen3-30B-A3B": partial(choose, 151_936),
    "logprobs, Qwen3-30B-A3B": partial(tell_logprobs, 151_936),
    "int4 matrix, 1 token": partial(multiply, "int4", 1, 5120, 2048),
    "int4 matrix, 512 tokens": partial(multiply, "int4", 512, 5120, 2048),
    "int8 matrix, 512 tokens": partial(multiply, "int8", 512, 5120, 2048),
}
