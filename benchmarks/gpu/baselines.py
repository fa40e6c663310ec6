"""What others make of the same work, on the same inputs.

Owns the calls into torch's own kernels and into libraries that happen to be there. None of them is needed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kernels.triton.weights import Matrices

LIBRARIES = ("vllm", "flashinfer", "sglang", "flash_attn", "deep_gemm")
CALLED = ("vllm", "flash_attn")


def missing() -> Iterator[str]:
    """What is not compared with, and why."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            yield f"{name}: not installed here"
        elif name not in CALLED:
            yield f"{name}: installed, but nothing here calls it"


def experts(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Matrices, down: Matrices
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of experts in bf16: name and call."""

    def grouped() -> Tensor:
        expert, order = chosen.flatten().sort(stable=True)
        tokens = order // chosen.shape[1]
        ends = torch.searchsorted(expert, torch.arange(1, len(gate_up) + 1, device=x.device)).int()
        gate, up = functional.grouped_mm(x[tokens], gate_up.values.mT, offs=ends).chunk(2, -1)
        output = functional.grouped_mm(functional.silu(gate) * up, down.values.mT, offs=ends)
        weighted = output.float() * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, weighted).to(x.dtype)

    yield "torch's grouped_mm", grouped
    if importlib.util.find_spec("vllm"):
        fused_experts = importlib.import_module("vllm.model_executor.layers.fused_moe").fused_experts
        yield "vllm", lambda: fused_experts(x, gate_up.values, down.values, weights, chosen.int())


def experts_in_a_loop(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Matrices, down: Matrices) -> Tensor:
    """Of experts in bf16, as transformers has it: one after the other, by rows that are picked and added back.

    The host waits for each expert's number of tokens, so no graph can record it.
    """
    total = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, places = torch.where(chosen == expert)
        gate, up = functional.linear(x.index_select(0, tokens), gate_up.values[expert]).chunk(2, -1)
        output = functional.linear(functional.silu(gate) * up, down.values[expert])
        total.index_add_(0, tokens, output * weights[tokens, places, None].to(x.dtype))
    return total


def product(x: Tensor, weight: Matrices) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of one matrix in fp8 with a scale a row, by rows that are rounded already: name and call."""
    rows, scales = x.to(torch.float8_e4m3fn), torch.ones(len(x), 1, device=x.device)

    def scaled() -> Tensor:
        return torch._scaled_mm(rows, weight.values[0].t(), scales, weight.scales, out_dtype=torch.bfloat16)

    yield "torch's _scaled_mm, rows rounded before", scaled


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of contexts that lie in one piece: query (S, Q, H, D), key and value (S, length, G, D) bf16. Name and call.

    Causal where there is more than one query, which are then the whole context.
    """
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    is_causal = query.shape[1] > 1
    yield (
        "torch's, cache in one piece",
        lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True),
    )
    if importlib.util.find_spec("flash_attn"):
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
        yield (
            "flash_attn, cache in one piece",
            lambda: flash_attn_func(query, key, value, softmax_scale=scale, causal=is_causal),
        )


def sample(logits: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """By one draw without top-k and top-p: name and call."""
    yield (
        "torch's softmax and exponential noise",
        lambda: (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1),
    )


def logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """With ties in any order: name and call."""

    def by_topk() -> tuple[Tensor, Tensor, Tensor]:
        scores = logits.log_softmax(-1)
        top, ids = scores.topk(num_top)
        return scores.gather(1, chosen[:, None]), ids, top

    yield "torch's log_softmax and topk", by_topk
