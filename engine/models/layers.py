"""What every decoder is made of: matrices in a weight format.

Owns the step from a stored tensor to what a backend multiplies by. Chooses no format and reads no file.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.models.parameters import Parameter, Tensors
from engine.quant import DENSE_FORMATS, FORMATS, Kept, WeightFormat, keep, stack_rows
from engine.ranks import ALONE, Ranks
from kernels.ops import AttentionBatch, Normed, Ops, WeightKernel
from kernels.weights import DEQUANTIZE

AUTO = "auto"


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

    def __init__(self, layout: str, kernel: WeightKernel, weight: Any, bias: Tensor | None = None) -> None:
        self.layout = layout
        self.kernel = kernel
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Normed) -> Tensor:
        """The outputs (T, out) of x (T, in)."""
        y = self.kernel.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Weights:
    """Takes parameters as they are kept and gives them back ready to compute with, in memory of their own.

    The layers' matrices get the weight format `format`, the head that format's `head`; routers, norms and biases get
    `dtype`: they are small, and the model is most sensitive to them. With AUTO a matrix stays as the checkpoint keeps
    it, and floats get `dtype`. An embedding stays as it is kept: few of its rows are read in a step, and get `dtype`
    then.
    """

    tensors: Tensors
    ops: Ops
    format: str  # of FORMATS, or AUTO
    dtype: torch.dtype  # of activations: fp32 or bf16
    device: torch.device
    ranks: Ranks = ALONE  # whose part of the model the tensors are

    def tensor(self, parameter: Parameter) -> Tensor:
        """The parameter in the activations' dtype."""
        return self.tensors.take(parameter).floats().to(self.device, self.dtype, copy=True)

    def norm(self, parameter: Parameter, layouts: Collection[str]) -> Any:
        """A norm's weight as `Ops.add_rms_norm` takes it. `layouts`: of all the matrices that multiply its output."""
        return self.ops.prepare_norm(self.tensor(parameter), layouts)

    def exact(self, parameter: Parameter) -> Tensor:
        """The parameter in fp32, whatever the activations' dtype: it decides between numbers that are all but equal."""
        return self.tensors.take(parameter).floats().to(self.device, torch.float32, copy=True)

    def rows(self, parameter: Parameter) -> Tensor:
        """The parameter as it is kept, or in the activations' dtype where that is shorter."""
        kept = self.tensors.take(parameter).floats()
        return kept.to(self.device, min(kept.dtype, self.dtype, key=lambda dtype: dtype.itemsize))

    def projection(self, *fused: Parameter, bias: Sequence[Parameter] = (), order: Tensor | None = None) -> Projection:
        """The matrices one below the other, in the weight format: one multiplication gives all their outputs.

        `order`: which of the outputs comes first, second and so on, where not all stay in their places.
        Raises ModelError, with the parameters' names, where the format cannot hold them.
        """
        try:
            matrices = [self._keep(self.tensors.take(parameter), self.format) for parameter in fused]
        except ValueError as error:
            raise ModelError(f"{' + '.join(map(str, fused))}: {error}{self.ranks.note}") from error
        matrix = stack_rows(matrices, self._dense)
        return self._project(matrix if order is None else matrix.rows(order), bias)

    def head(self, matrix: Kept) -> Projection:
        """The output head (V, C): every step reads all of it, as much as the rest of a small model."""
        return self._project(self._keep(matrix, AUTO if self.format == AUTO else FORMATS[self.format].head), ())

    def dense_projection(self, matrix: Tensor, bias: Sequence[Parameter] = ()) -> Projection:
        """The matrix (out, in) in the activations' dtype, whatever the weight format."""
        return self._project(keep(Kept.plain(matrix), self._dense), bias)

    @property
    def _dense(self) -> WeightFormat:
        return FORMATS[DENSE_FORMATS[self.dtype]]

    def _keep(self, stored: Kept, name: str) -> Kept:
        stored = stored.to(self.device)
        if name == AUTO:
            return keep(stored, self._dense) if stored.layout == "plain" else stored
        return keep(stored, FORMATS[name])

    def _project(self, matrix: Kept, bias: Sequence[Parameter]) -> Projection:
        kernel = self._kernel(matrix.layout)
        weight = kernel.prepare(matrix.parts)
        biases = [self.tensor(parameter) for parameter in bias]
        return Projection(matrix.layout, kernel, weight, torch.cat(biases) if biases else None)

    def _kernel(self, layout: str) -> WeightKernel:
        """How the backend multiplies by the layout: where it cannot, it unpacks at load and multiplies as dense."""
        if kernel := self.ops.weights.get(layout):
            return kernel
        dense, unpack, pack = self.ops.weights[self._dense.layout], DEQUANTIZE[layout], self._dense.quantize
        return WeightKernel(lambda parts: dense.prepare(pack(unpack(parts))), dense.linear, dense.stack)


class Embedding:
    """A vector (C,) for each token of the vocabulary, of which each rank has some."""

    def __init__(self, weights: Weights, num_tokens: int) -> None:
        """`num_tokens`: how many each rank has, but for the last."""
        self._ranks = weights.ranks
        self._first = self._ranks.rank * num_tokens
        self._dtype = weights.dtype
        matrix = weights.rows(Parameter("embedding"))
        nothing = matrix.new_zeros(1, matrix.shape[1])
        self._rows = torch.cat([nothing, matrix, nothing])  # what is another rank's adds nothing to the sum

    @property
    def matrix(self) -> Tensor:
        """What is here of (V, C), as it is kept."""
        return self._rows[1:-1]

    def __call__(self, token_ids: Tensor) -> Tensor:
        """For token_ids (T,): (T, C)."""
        rows = (token_ids - (self._first - 1)).clamp_(0, len(self._rows) - 1)
        return self._ranks.sum(self._rows[rows].to(self._dtype))


class SwiGlu:
    """A dense feed-forward: down(silu(gate x) * up x), gate and up in one multiplication."""

    def __init__(self, weights: Weights, layer: int, role: str = "feed_forward") -> None:
        self._ops = weights.ops
        self._gate_up = weights.projection(Parameter(f"{role}.gate", layer), Parameter(f"{role}.up", layer))
        self._down = weights.projection(Parameter(f"{role}.down", layer))
        self.layouts = {self._gate_up.layout}  # of what multiplies its input

    def __call__(self, x: Normed) -> Tensor:
        """What x (T, C) adds to the residual stream (T, C)."""
        return self._down(self._ops.swiglu(self._gate_up(x)))
