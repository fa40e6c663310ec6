"""How far the decoder's logits are from transformers' on tiny random checkpoints: the measure, and a table of it.

`python -m tests.parity` prints a line for each architecture and weight format; it ends with 1 where one is out of
bounds. The tests use the same functions. In a quantized format the model is compared with transformers on a checkpoint
whose matrices are what the format makes of them: the format's own loss is not an error of the model.
"""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.loader import load
from engine.models import ARCHITECTURES, Decoder, KVCache
from engine.models.layers import Projection, Weights
from engine.models.parameters import Parameter
from engine.quant import FORMATS
from kernels.backends import pick
from kernels.ops import AttentionBatch, Ops
from kernels.reference import OPS
from tests.tiny_models import SHAPES, VOCAB_SIZE, tiny, transformers_logits

SEED = 7
TOKENS = torch.randint(VOCAB_SIZE, (23,), generator=torch.Generator().manual_seed(7)).tolist()
BLOCK_SIZE = 4  # so that 23 tokens fill five blocks and a part
NUM_BLOCKS = 8
BLOCK_TABLE = torch.tensor([6, 2, 7, 1, 4, 3])  # out of order, with gaps: the table is read, not assumed

ARCHITECTURE_SHAPES = [name for name in SHAPES if "," not in name]  # the plain shape of each

# The promise is 1e-4. Two ways of summing in fp32 differ by about 1e-6.
ERROR_MAX = 1e-5
# bf16 keeps 8 bits, so a rounding is up to 0.4 %, and the dozens of one forward pass add up to a few percent. Of the
# median over tokens: two experts of all but equal score may change places, which is worse, but rare.
BF16_ERROR_MAX = 0.05
# The CPU table rounds what it multiplies by a quantized matrix to int8 of the row's largest, which keeps a bit less.
INT8_ERROR_MAX = 0.1
CPU_ERROR_MAX = {"fp32": ERROR_MAX, "bf16": BF16_ERROR_MAX}


def main() -> int:
    """Print the table; 0 where all of it is within bounds."""
    torch.set_num_threads(1)
    print("Errors against transformers, and their bounds: of the definition of every op, then of the CPU's table.")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURE_SHAPES:
            checkpoint = tiny(name, Path(folder), SEED)
            for weights in FORMATS:
                theirs = transformers_logits(rounded(checkpoint, weights), TOKENS)
                error = relative_error(model_logits(checkpoint, OPS, weights), theirs)
                on_cpu = median_error(model_logits(checkpoint, pick("cpu"), weights), theirs)
                cpu_max = CPU_ERROR_MAX.get(weights, INT8_ERROR_MAX)
                is_within = error <= ERROR_MAX and on_cpu <= cpu_max
                failures += not is_within
                errors = f"{error:.1e} <= {ERROR_MAX:.0e}   cpu {on_cpu:.1e} <= {cpu_max:.0e}"
                print(f"{name:12} {weights:10} {errors}{'' if is_within else '   OUT OF BOUNDS'}", flush=True)
    print(f"{failures} out of bounds")
    return min(failures, 1)


def model_logits(checkpoint: Path, ops: Ops, weights: str) -> Tensor:
    """Ours (T, V) for TOKENS in one step, computing in fp32."""
    return logits(load(checkpoint, ops, weights=weights, dtype=torch.float32), [TOKENS])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def median_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of a token's difference, as a share of its logits' norm: the median over tokens."""
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median())


def logits(model: Decoder, chunks: Sequence[list[int]], cache_dtype: torch.dtype | None = None) -> Tensor:
    """The logits (T, V) of one sequence computed chunk by chunk through one cache, by default in the model's dtype."""
    cache, outputs, start = cache_for(model, cache_dtype), [], 0
    for chunk in chunks:
        outputs.append(step(model, cache, start, chunk, range(len(chunk))))
        start += len(chunk)
    return torch.cat(outputs)


def step(model: Decoder, cache: KVCache, start: int, tokens: list[int], rows: Sequence[int]) -> Tensor:
    """The logits (R, V) after the tokens at `rows`, of a sequence of which `start` tokens are in the cache."""
    positions = torch.arange(start, start + len(tokens))
    batch = AttentionBatch(
        block_tables=BLOCK_TABLE[None],
        query_starts=[0, len(tokens)],
        context_lens=[start + len(tokens)],
        slots=BLOCK_TABLE[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
    )
    return model.forward(torch.tensor(tokens), positions, batch, cache, torch.tensor(rows, dtype=torch.int64))


def cache_for(model: Decoder, dtype: torch.dtype | None = None) -> KVCache:
    """A cache full of NaN: whatever is read before it was written shows."""
    cache = KVCache.allocate(model.part, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype or model.dtype)
    for tensor in cache.keys:
        tensor.view(torch.uint8).fill_(0xFF)  # NaN in every format; in int8 it is the scale's
    for tensor in (*cache.values, *([] if cache.states is None else [cache.states])):
        tensor.view(torch.uint8).fill_(0xFF)
    return cache


def rounded(checkpoint: Path, weights: str) -> Path:
    """A copy of the folder beside it, with each matrix that is kept in a format replaced by what that makes of it."""
    copy = checkpoint.with_name(f"{checkpoint.name}-{weights}")
    shutil.copytree(checkpoint, copy)
    config = msgspec.json.decode((copy / "config.json").read_bytes())
    architecture = ARCHITECTURES[config["architectures"][0]]
    tensors = load_file(copy / "model.safetensors")
    head, embedding = (architecture.tensor_name(Parameter(role)) for role in ("head", "embedding"))
    tensors[head] = _as_kept(tensors.get(head, tensors[embedding]), FORMATS[weights].head)
    for parameter in kept_in_a_format(checkpoint):
        tensor, packed = tensors[architecture.tensor_name(parameter)], architecture.packed(parameter)
        matrix = packed.part(tensor[parameter.expert]) if packed and parameter.expert is not None else tensor
        matrix.copy_(_as_kept(matrix, weights))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    # The rounded head is no longer the embedding, which is not rounded.
    (copy / "config.json").write_bytes(msgspec.json.encode(config | {"tie_word_embeddings": False}))
    return copy


def _as_kept(matrix: Tensor, weights: str) -> Tensor:
    return FORMATS[weights].dequantize(FORMATS[weights].quantize(matrix.contiguous())).to(matrix.dtype)


def kept_in_a_format(checkpoint: Path) -> list[Parameter]:
    """The matrices, but for the head, that a model takes in the weight format when it is loaded."""
    kept: list[Parameter] = []
    project = Weights.projection

    def projection(weights: Weights, *fused: Parameter, **named: Any) -> Projection:
        kept.extend(fused)
        return project(weights, *fused, **named)

    with mock.patch.object(Weights, "projection", projection):
        load(checkpoint, OPS, weights="fp32", dtype=torch.float32)
    return kept


if __name__ == "__main__":
    sys.exit(main())
