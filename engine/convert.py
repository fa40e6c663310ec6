"""A checkpoint in a weight format, written once so that loading it is reading it.

Owns the folder that it writes: safetensors in the scheme of engine/schemes/own.py, an index, and last of all the
`config.json` that makes a model of it, so that what was interrupted is never loaded. Whatever else the source's folder
has for its tokenizer goes along.
"""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import ModelError
from engine.loader import CONFIG, INDEX, Checkpoint, Progress, open_checkpoint, read_config
from engine.models import ModelSpec
from engine.models.layers import AUTO
from engine.models.parameters import Parameter, has_format, parameters
from engine.quant import FORMATS, Kept, keep
from engine.schemes.own import METHOD, VERSION, tensor_names

SHARD_BYTES = 2 << 30  # a file's tensors are held in memory until it is written
COPIED_BYTES_MAX = 64 << 20  # the largest published tokenizer.json has 33 MB
COPIED = (".json", ".jinja", ".model", ".txt", ".md")  # tokenizer, chat template, generation config, licence


def convert(source: Path, target: Path, weights: str, progress: Progress | None = None) -> None:
    """`target` holds the model of the folder `source`, its matrices in the format `weights`, one of FORMATS or AUTO.

    It loads as the source does with these weights, to the bit. AUTO leaves matrices in the layouts in which they load.
    Raises ModelError where the source cannot be read or converted, or `target` holds anything already.
    """
    if weights not in (AUTO, *FORMATS):
        raise ModelError(f"weights {weights!r} is not one of {', '.join((AUTO, *FORMATS))}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} exists and is no empty folder")
    with open_checkpoint(source, progress=progress, draft_heads=None) as (spec, checkpoint):
        target.mkdir(parents=True, exist_ok=True)
        with _Shards(target) as shards:
            for parameter, kept in _converted(spec, checkpoint, weights):
                for name, tensor in tensor_names(parameter, kept):
                    shards.add(name, tensor)
    _copy_companions(source, target)
    config: dict[str, Any] = read_config(source)
    config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "weights": weights}
    config["tie_word_embeddings"] = spec.tied_embeddings and weights == AUTO
    (target / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def _converted(spec: ModelSpec, checkpoint: Checkpoint, weights: str) -> Iterator[tuple[Parameter, Kept]]:
    """All parameters as they are to be kept; also the head of a model that has none of its own, once it differs."""
    for parameter, shape in parameters(spec).items():
        stored = checkpoint.take(parameter)
        if parameter.role == "embedding" and spec.tied_embeddings and weights != AUTO:
            yield Parameter("head"), keep(stored, FORMATS[FORMATS[weights].head])
        if weights != AUTO and has_format(parameter, shape):
            stored = _keep(parameter, stored, FORMATS[weights].head if parameter.role == "head" else weights)
        yield parameter, stored


def _keep(parameter: Parameter, stored: Kept, weights: str) -> Kept:
    try:
        return keep(stored, FORMATS[weights])
    except ValueError as error:
        raise ModelError(f"{parameter}: {error}") from error


class _Shards(AbstractContextManager["_Shards"]):
    """Files of tensors and their index, in a folder. The index is there once all went well."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._num_bytes = 0
        self._files: dict[str, str] = {}  # by tensor name

    def add(self, name: str, tensor: Tensor) -> None:
        """The tensor is written with the others of its file."""
        if self._tensors and self._num_bytes + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # no two may share memory
        self._num_bytes += tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write()
            (self._folder / INDEX).write_bytes(msgspec.json.encode({"weight_map": self._files}))

    def _write(self) -> None:
        file = f"model-{len(set(self._files.values())) + 1:05}.safetensors"
        save_file(self._tensors, self._folder / file, metadata={"format": "pt"})
        self._files |= dict.fromkeys(self._tensors, file)
        self._tensors, self._num_bytes = {}, 0


def _copy_companions(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        is_ours = file.name == CONFIG or file.name.endswith(".index.json")
        if file.suffix in COPIED and not is_ours and file.is_file() and file.stat().st_size <= COPIED_BYTES_MAX:
            shutil.copyfile(file, target / file.name)
