"""How much faster the CPU table is than the definition, op by op: `python -m benchmarks.kernels_cpu [op ...]`.

Owns the cases. Each line is a ratio of two times taken alternately in one run, the definition's over the table's,
because the memory bandwidth of shared machines drifts by a third within minutes. The least of several times, since
whatever disturbs only adds. On a busy machine OMP_NUM_THREADS=1 gives steadier ratios. The definition multiplies by
weights that it has widened to fp32, so a line below 1 of any other format means slower than that, at a half to an
eighth of its memory.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.quant import FORMATS
from kernels import reference
from kernels.backends import pick
from kernels.ops import AttentionBatch, Ops, SamplingRow

NUM_ROUNDS_MIN = 5
CASE_BUDGET_S = 0.4  # some ten rounds of most cases, the whole run in about a minute
NUM_COPIES = 4  # of weights and caches, used in turn: in a model, other layers' pass between two uses of one

Call = Callable[[int], object]  # with the copy to use
TABLES = [reference.OPS, pick("cpu")]
MULTIPLIED = [name for name, kept in FORMATS.items() if kept.layout in TABLES[-1].weights]


def main() -> None:
    """Prints a line for each case of the ops named on the command line, or of all."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for op in sys.argv[1:] or CASES:
        for what, call_of in CASES[op]():
            slow, fast = measure([call_of(table) for table in TABLES])
            print(f"{op:12} {what:46} {slow / fast:7.2f} x   {fast * 1e6:9.0f} us", flush=True)


def measure(calls: Sequence[Call]) -> list[float]:
    """Seconds of the quickest run of each, after one to warm up."""
    best = [math.inf] * len(calls)
    for call in calls:
        call(0)
    end = time.perf_counter() + CASE_BUDGET_S
    num_rounds = 0
    while num_rounds < NUM_ROUNDS_MIN or time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call(num_rounds % NUM_COPIES)
            best[i] = min(best[i], time.perf_counter() - start)
        num_rounds += 1
    return best


Case = tuple[str, Callable[[Ops], Call]]


def linear() -> Iterator[Case]:
    """Dense products of a small model's shape and a middling one's."""
    for size_in, size_out in ((576, 1536), (1024, 4096)):
        for name in MULTIPLIED:
            parts = [FORMATS[name].quantize(torch.randn(size_out, size_in) * 0.02) for _ in range(NUM_COPIES)]
            for num_rows in (1, 4, 16, 64, 256):
                x = torch.randn(num_rows, size_in).to(activations(name))
                yield f"{name} {size_in} x {size_out}, {num_rows} rows", linear_call(name, parts, x)


def linear_call(name: str, parts: list[Mapping[str, Tensor]], x: Tensor) -> Callable[[Ops], Call]:
    """Binds a case of `linear`."""

    def call_of(ops: Ops) -> Call:
        kernel = ops.weights[FORMATS[name].layout]
        weights = [kernel.prepare(p) for p in parts]
        return lambda i: kernel.linear(x, weights[i])

    return call_of


def activations(name: str) -> torch.dtype:
    """The dtype that goes with a weight format."""
    return torch.float32 if name == "fp32" else torch.bfloat16


def attention() -> Iterator[Case]:
    """Decodes, drafts, prefills and what a step mixes; sequences are (query tokens, context length)."""
    for dtype in (torch.float32, torch.bfloat16):
        for what, sequences in {
            "decode, 1 of 256": [(1, 256)],
            "decode, 1 of 1,024": [(1, 1024)],
            "decode, 16 of 256": [(1, 256)] * 16,
            "decode, 16 of 1,024": [(1, 1024)] * 16,
            "decode, 16 of 64 to 1,024": [(1, 64 * (i + 1)) for i in range(16)],
            "3 drafts, 4 of 512": [(4, 512)] * 4,
            "prefill of 256": [(256, 256)],
            "chunk of 128 at 512, 7 decodes": [(128, 512), *[(1, 256)] * 7],
        }.items():
            yield f"{what}, {str(dtype).removeprefix('torch.')}", attention_call(sequences, dtype)


def attention_call(sequences: list[tuple[int, int]], dtype: torch.dtype) -> Callable[[Ops], Call]:
    """Binds a case of `attention`: 9 query heads and 3 key-value heads of 64, blocks of 16."""
    num_blocks = [math.ceil(length / 16) for _, length in sequences]
    caches = [torch.randn(2, sum(num_blocks), 16, 3, 64).to(dtype) for _ in range(NUM_COPIES)]
    places = torch.split(torch.randperm(sum(num_blocks)), num_blocks)
    starts = [0, *accumulate(queries for queries, _ in sequences)]
    block_tables = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)
    query = torch.randn(starts[-1], 9, 64).to(dtype)
    batch = AttentionBatch(block_tables, starts, [length for _, length in sequences], torch.empty(0, dtype=torch.int64))
    return lambda ops: lambda i: ops.attention(query, caches[i][0], caches[i][1], batch, 0.125)


def experts() -> Iterator[Case]:
    """Many small experts of which most are chosen, and few large ones."""
    for num_experts, num_chosen, inner, outer in ((8, 7, 128, 576), (8, 2, 2048, 1024)):
        for name in MULTIPLIED:
            gate_up, down = (
                [FORMATS[name].quantize(torch.randn(shape) * 0.02) for _ in range(num_experts)]
                for shape in ((2 * inner, outer), (outer, inner))
            )
            for num_tokens in (1, 16, 256):
                x = torch.randn(num_tokens, outer).to(activations(name))
                routed = [
                    reference.route(torch.randn(num_tokens, num_experts), num_chosen, "softmax", True)
                    for _ in range(NUM_COPIES)
                ]
                what = f"{name} {num_chosen} of {num_experts}, {outer} x {inner}, {num_tokens} tokens"
                yield what, experts_call(name, gate_up, down, x, routed)


def experts_call(
    name: str,
    gate_up: list[Mapping[str, Tensor]],
    down: list[Mapping[str, Tensor]],
    x: Tensor,
    routed: list[tuple[Tensor, Tensor]],
) -> Callable[[Ops], Call]:
    """Binds a case of `experts`."""

    def call_of(ops: Ops) -> Call:
        kernel = ops.weights[FORMATS[name].layout]
        prepared = [kernel.stack([kernel.prepare(parts) for parts in matrices]) for matrices in (gate_up, down)]
        return lambda i: ops.experts(x, *routed[i], prepared[0], prepared[1], kernel.linear, ops.swiglu)

    return call_of


def sample() -> Iterator[Case]:
    """The k-th likeliest token has 1 / k^1.5 of the likeliest's probability, about as in a model, in random places."""
    vocab_size = 49_152
    plain = SamplingRow(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.0)
    kinds = {
        "greedy": replace(plain, temperature=0.0),
        "temperature": plain,
        "top-k 50": replace(plain, top_k=50),
        "top-p 0.9": replace(plain, top_p=0.9),
        "top-k 50, top-p 0.9": replace(plain, top_k=50, top_p=0.9),
    }
    falling = -1.5 * torch.arange(1, vocab_size + 1).log()
    for num_rows in (1, 16):
        logits = torch.stack([falling[torch.randperm(vocab_size)] for _ in range(num_rows)])
        for what, kind in kinds.items():
            yield f"{num_rows} rows, {what}", sample_call(logits, [kind] * num_rows)
        yield f"{num_rows} rows, greedy, against argmax", argmax_call(logits, [kinds["greedy"]] * num_rows)
    yield "16 rows, mixed", sample_call(logits, [list(kinds.values())[i % len(kinds)] for i in range(16)])


def sample_call(logits: Tensor, kinds: list[SamplingRow]) -> Callable[[Ops], Call]:
    """Binds a case of `sample`, with fresh uniforms for each copy."""
    rows = [[replace(kind, uniform=torch.rand(()).item()) for kind in kinds] for _ in range(NUM_COPIES)]
    return lambda ops: lambda i: ops.sample(logits, rows[i])


def argmax_call(logits: Tensor, rows: list[SamplingRow]) -> Callable[[Ops], Call]:
    """As `sample_call`, with torch's argmax in the definition's place."""
    return lambda ops: lambda _: logits.argmax(dim=1) if ops.name == "reference" else ops.sample(logits, rows)


def elementwise() -> Iterator[Case]:
    """What stands between the products."""
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in (1, 16, 256):
            x, weight = torch.randn(num_tokens, 576).to(dtype), torch.randn(576).to(dtype)
            gate_up = torch.randn(num_tokens, 3072).to(dtype)
            suffix = f"{num_tokens} tokens, {str(dtype).removeprefix('torch.')}"
            yield f"rms_norm, {suffix}", rms_norm_call(x, weight)
            yield f"swiglu, {suffix}", swiglu_call(gate_up)


def rms_norm_call(x: Tensor, weight: Tensor) -> Callable[[Ops], Call]:
    """Binds a case of `rms_norm`."""
    return lambda ops: lambda _: ops.rms_norm(x, weight, 1e-5)


def swiglu_call(gate_up: Tensor) -> Callable[[Ops], Call]:
    """Binds a case of `swiglu`."""
    return lambda ops: lambda _: ops.swiglu(gate_up)


CASES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "linear": linear,
    "attention": attention,
    "experts": experts,
    "sample": sample,
    "elementwise": elementwise,
}

if __name__ == "__main__":
    main()
