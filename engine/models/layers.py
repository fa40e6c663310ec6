"""What every decoder is made of: matrices in a weight format.

Owns the step from a stored tensor to what a backend multiplies by. Chooses no format and reads no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.parameters import Parameter, Tensors
from engine.quant import FORMATS
from kernels.ops import AttentionBatch, Ops, WeightKernel

DENSE_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class StepInputs:
    """What a layer's mixer works with beside its input: the same for all layers."""

    cos: Tensor  # (T, D/2) fp32
    sin: Tensor  # (T, D/2) fp32
    batch: AttentionBatch
    key_caches: Sequence[Tensor]  # per layer (N, B, G, D)
    value_caches: Sequence[Tensor]


class Projection:
    """One matrix (out, in) as its backend likes it, and its bias."""

    def __init__(self, kernel: WeightKernel, weight: Any, bias: Tensor | None = None) -> None:
        self.kernel = kernel
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (T, out) of x (T, in)."""
        y = self.kernel.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Weights:
    """Takes parameters as they are kept and gives them back ready to compute with, in memory of their own.

    The layers' matrices get the weight format `format`, the head that format's `head`; embeddings, routers, norms and
    biases keep `dtype`: they are small, or read one row at a time, and the model is most sensitive to them.
    """

    tensors: Tensors
    ops: Ops
    format: str  # of FORMATS
    dtype: torch.dtype  # of activations: fp32 or bf16
    device: torch.device

    def tensor(self, parameter: Parameter) -> Tensor:
        """The parameter in the activations' dtype."""
        return self.tensors.take(parameter).to(self.device, self.dtype, copy=True)

    def projection(self, *fused: Parameter, bias: Sequence[Parameter] = (), order: Tensor | None = None) -> Projection:
        """The matrices one below the other, in the weight format: one multiplication gives all their outputs.

        `order`: which of the outputs comes first, second and so on, where not all stay in their places.
        Raises ModelError, with the parameters' names, where the format cannot hold them.
        """
        matrix = torch.cat([self.tensors.take(parameter) for parameter in fused])  # (out, in)
        matrix = matrix if order is None else matrix[order]
        try:
            return self._project(self.format, matrix, bias)
        except ValueError as error:
            raise ModelError(f"{' + '.join(map(str, fused))}: {error}") from error

    def head(self, matrix: Tensor) -> Projection:
        """The output head (V, C): every step reads all of it, as much as the rest of a small model."""
        return self._project(FORMATS[self.format].head, matrix, ())

    def dense_projection(self, matrix: Tensor, bias: Sequence[Parameter] = ()) -> Projection:
        """The matrix (out, in) in its own dtype, whatever the weight format."""
        return self._project(DENSE_FORMATS[matrix.dtype], matrix, bias)

    def _project(self, name: str, matrix: Tensor, bias: Sequence[Parameter]) -> Projection:
        kernel = self._kernel(name)
        weight = kernel.prepare(FORMATS[name].quantize(matrix.to(self.device)))
        return Projection(kernel, weight, torch.cat([self.tensor(parameter) for parameter in bias]) if bias else None)

    def _kernel(self, name: str) -> WeightKernel:
        """How the backend multiplies by the format: where it cannot, it unpacks at load and multiplies as dense."""
        if kernel := self.ops.weights.get(name):
            return kernel
        dense_name = DENSE_FORMATS[self.dtype]
        dense, unpack, pack = self.ops.weights[dense_name], FORMATS[name].dequantize, FORMATS[dense_name].quantize
        return WeightKernel(prepare=lambda parts: dense.prepare(pack(unpack(parts))), linear=dense.linear)


class SwiGlu:
    """A dense feed-forward: down(silu(gate x) * up x), gate and up in one multiplication."""

    def __init__(self, weights: Weights, layer: int, role: str = "feed_forward") -> None:
        self._ops = weights.ops
        self._gate_up = weights.projection(Parameter(f"{role}.gate", layer), Parameter(f"{role}.up", layer))
        self._down = weights.projection(Parameter(f"{role}.down", layer))

    def __call__(self, x: Tensor) -> Tensor:
        """What x (T, C) adds to the residual stream (T, C)."""
        return self._down(self._ops.swiglu(self._gate_up(x)))
