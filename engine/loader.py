"""From a Hugging Face folder (`config.json` and safetensors) to a decoder in memory.

Owns the check of everything that comes from the folder: all of it is known to fit, from the headers alone, before the
first byte of a weight is read. Never runs code from a checkpoint: pickled weights are not read at all.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from engine.errors import ModelError
from engine.models import ARCHITECTURES, Architecture, Decoder, ModelSpec
from engine.models.hf import GenerationConfig, token_ids
from engine.models.layers import AUTO, Weights
from engine.models.parameters import Parameter, Shapes, parameters
from engine.models.parts import Cut, cut, part_of
from engine.quant import DENSE_FORMATS, FORMATS, Kept
from engine.ranks import ALONE, Ranks
from engine.schemes import FLOATS, Plain, Scheme, Source, Stored, Wanted, scheme_of
from engine.shards import DTYPES, Shard, open_shard
from kernels.ops import Ops

T = TypeVar("T")
Progress = Callable[[int, int], None]  # bytes done, bytes in all

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
CONFIG_BYTES_MAX = 1 << 20  # the longest published one, with a thousand labels, has 100 kB
INDEX_BYTES_MAX = 64 << 20  # a name of 70 characters for each of half a million tensors
SHARDS_MAX = 1024  # the largest published checkpoints have 200; each holds a file open while we read

RECOMPUTED = ".rotary_emb.inv_freq"  # a buffer that Llama checkpoints of 2023 carry along


class _Index(Struct):
    weight_map: dict[str, str]  # tensor name -> file


def load(
    path: Path,
    ops: Ops,
    *,
    weights: str,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    ranks: Ranks = ALONE,
    draft_heads: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """The model of the folder `path`, its layers' matrices in the weight format `weights`, computing in `dtype`.

    Of several ranks each calls this, and has its part of the model; no more than that is ever in memory, but for one
    matrix at a time.

    `weights` is one of `FORMATS`, made here from whatever the folder holds, or AUTO: as the folder holds them, floats
    in `dtype`. `draft_heads`: with the first layer for multi-token prediction. `progress` hears of each parameter.
    Raises ModelError for whatever is wrong with the folder or the settings, EngineMisconfigured as `open_checkpoint`.
    """
    if weights not in (AUTO, *FORMATS):
        raise ModelError(f"weights {weights!r} is not one of {', '.join((AUTO, *FORMATS))}")
    if dtype not in DENSE_FORMATS:
        raise ModelError(f"dtype {dtype} is not one of {', '.join(map(str, DENSE_FORMATS))}")
    with open_checkpoint(path, ranks, progress, draft_heads=draft_heads) as (spec, checkpoint):
        return Decoder(spec, Weights(checkpoint, ops, weights, dtype, torch.device(device), ranks))


@contextmanager
def open_checkpoint(
    path: Path, ranks: Ranks = ALONE, progress: Progress | None = None, *, draft_heads: bool | None = False
) -> Iterator[tuple[ModelSpec, "Checkpoint"]]:
    """What the folder's model is, and its tensors, all of them checked. Raises ModelError as `load` does.

    `draft_heads`: with its first layer for multi-token prediction, of one rank alone; None: if the folder has it.
    Raises EngineMisconfigured where the ranks cannot share the model.
    """
    architecture, whole, scheme = _understand(path)
    if draft_heads and not whole.draft_layers:
        raise ModelError(f"{path} has no layer for multi-token prediction, and draft_heads is set: unset it")
    with ExitStack() as files:
        shards = [files.enter_context(open_shard(file)) for file in _shard_files(path)]
        checkpoint = Checkpoint(architecture, scheme, shards, ranks, progress)
        drafting = replace(whole, draft_layers=whole.draft_layers[:1])
        if draft_heads is None:
            draft_heads = checkpoint.has(Parameter("draft.merge", len(whole.layers)), drafting)
        spec = drafting if draft_heads else replace(whole, draft_layers=())
        checkpoint.check(spec, whole)
        yield spec, checkpoint


def read_spec(path: Path) -> ModelSpec:
    """What the folder's model is, without its weights. Raises ModelError as `load` does."""
    return replace(_understand(path)[1], draft_layers=())


def read_config(path: Path) -> dict[str, Any]:
    """The folder's `config.json` as it stands. Raises ModelError where there is none."""
    return _read_json(path / CONFIG, dict[str, Any], CONFIG_BYTES_MAX)


def _understand(path: Path) -> tuple[Architecture, ModelSpec, Scheme]:
    config = read_config(path)
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ModelError(f"{path}: the architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
    spec = architecture.spec_from_config(config)
    generation = path / "generation_config.json"
    if generation.exists():  # it may name more tokens that end an answer, and has the last word
        ids = token_ids(_read_json(generation, GenerationConfig, CONFIG_BYTES_MAX).eos_token_id)
        spec = replace(spec, eos_token_ids=ids) if ids else spec
    return architecture, spec, scheme_of(config)


class Checkpoint:
    """The tensors of open shards, as this rank's part of our parameters: the decoder's `Tensors`."""

    def __init__(
        self,
        architecture: Architecture,
        scheme: Scheme,
        shards: Sequence[Shard],
        ranks: Ranks = ALONE,
        progress: Progress | None = None,
    ) -> None:
        self._architecture = architecture
        self._scheme = scheme
        self._ranks = ranks
        self._shards = {name: shard for shard in shards for name in shard.entries}
        self._entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
        self._sources: dict[Parameter, Source] = {}
        self._cuts: dict[Parameter, Cut] = {}  # of those that the rank has a part of
        self._progress = progress
        self._bytes_total = self._bytes_done = 0

    def has(self, parameter: Parameter, spec: ModelSpec) -> bool:
        """Whether the files have the parameter, if the model has it at all."""
        source = self._sources_of(parameters(spec)).get(parameter)
        return source is not None and all(stored.name in self._entries for stored in source.tensors.values())

    def check(self, spec: ModelSpec, whole: ModelSpec) -> None:
        """From now on `take` gives every parameter of the rank's part of the model.

        `whole`: the same model with all layers for multi-token prediction that may be there.
        Raises ModelError for a tensor that is missing, misshapen, of a type that we do not read, or there without need.
        """
        shapes, parts = parameters(spec), parameters(part_of(spec, self._ranks))
        self._sources = self._sources_of(shapes)
        for source in self._sources.values():
            for stored in source.tensors.values():
                self._verify(stored)
        for parameter, shape in parts.items():
            self._bytes_total += self._bytes_of(self._sources[parameter])
            if shape != shapes[parameter]:
                self._cuts[parameter] = cut(shapes[parameter], shape, self._ranks)
        self._refuse_surplus(whole)

    def _sources_of(self, shapes: Shapes) -> dict[Parameter, Source]:
        num_alike = Counter((parameter.role, parameter.layer) for parameter in shapes)
        return {
            parameter: self._source(parameter, shape, num_alike[parameter.role, parameter.layer])
            for parameter, shape in shapes.items()
        }

    def _source(self, parameter: Parameter, shape: tuple[int, ...], num_alike: int) -> Source:
        architecture = self._architecture
        name, packed = architecture.tensor_name(parameter), architecture.packed(parameter)
        wanted = Wanted(parameter, shape, name, packed, num_alike)
        return self._scheme.source(wanted, self._entries) or Plain().source(wanted, self._entries)

    def _verify(self, stored: Stored) -> None:
        """Raise ModelError unless the tensor is there as it should be."""
        there = self._entries.get(stored.name)
        if there is None:
            raise ModelError(f"tensor {stored.name} is missing: the download may be incomplete")
        if there.shape != stored.shape:
            raise ModelError(f"tensor {stored.name} has the shape {there.shape}, config.json makes it {stored.shape}")
        if there.dtype not in stored.dtypes:
            raise ModelError(f"tensor {stored.name} is of type {there.dtype}, not one of {', '.join(stored.dtypes)}")

    def _refuse_surplus(self, whole: ModelSpec) -> None:
        sources = self._sources_of(parameters(whole)).values()
        known = {stored.name for source in sources for stored in source.tensors.values()}
        copies = [Parameter("head")] if whole.tied_embeddings else []  # of the embedding
        for layer in range(len(whole.layers), len(whole.layers + whole.draft_layers)):
            copies += [Parameter("draft.embedding", layer), Parameter("draft.head", layer)]
        known |= set(map(self._architecture.tensor_name, copies))
        unused = [name for name in self._entries if name not in known]
        if surplus := [name for name in unused if not self._is_ignored(name)]:
            raise ModelError(
                f"tensor {min(surplus)} and {len(surplus) - 1} others belong to no part of the model that config.json "
                "describes: it would not be the model that was trained"
            )

    def _is_ignored(self, name: str) -> bool:
        """Whether the tensor changes nothing."""
        if name.endswith(self._scheme.ignored_zeros) and self._entries[name].dtype in FLOATS:
            return not self._shards[name].read(name).any()
        return name.endswith((RECOMPUTED, *self._scheme.ignored))

    def _bytes_of(self, source: Source) -> int:
        """What is read for a parameter, as far as it is its own."""
        entries = [self._entries[stored.name] for stored in source.tensors.values()]
        num_experts = 1 if source.expert is None else entries[0].shape[0]
        return sum(prod(one.shape) * DTYPES[one.dtype].itemsize for one in entries) // num_experts // source.share

    def num_bytes(self, parameter: Parameter) -> int:
        """What the parameter takes in the files."""
        return self._bytes_of(self._sources[parameter])

    def take(self, parameter: Parameter) -> Kept:
        """The rank's part of the parameter as the files have it, in memory of its own.

        Raises ModelError where a file ends too early, holds numbers that make no sense, or has what cannot be cut so.
        """
        source, wanted = self._sources[parameter], self._cuts.get(parameter)
        try:
            kept = source.unpack({part: self._read(stored, source, wanted) for part, stored in source.tensors.items()})
            kept = kept.cut(wanted) if wanted and not source.is_as_kept else kept
        except ValueError as error:
            name = next(iter(source.tensors.values())).name
            raise ModelError(f"tensor {name}: {error}{self._ranks.note}") from error
        self._bytes_done += self._bytes_of(source)
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)
        return kept

    def _read(self, stored: Stored, source: Source, wanted: Cut | None) -> Tensor:
        shard = self._shards[stored.name]
        if source.expert is not None:
            return shard.read_one(stored.name, source.expert)
        return shard.read_cut(stored.name, wanted) if wanted and source.is_as_kept else shard.read(stored.name)


def _shard_files(path: Path) -> list[Path]:
    """The folder's weight files: those that the index names, or the only one."""
    index_file = path / INDEX
    if not index_file.exists():
        return [path / "model.safetensors"]
    names = sorted(set(_read_json(index_file, _Index, INDEX_BYTES_MAX).weight_map.values()))
    if len(names) > SHARDS_MAX:
        raise ModelError(f"{index_file}: {len(names)} files are more than {SHARDS_MAX}")
    for name in names:
        if Path(name).name != name:  # "../../etc/shadow", "/dev/zero": a checkpoint reads its own folder alone
            raise ModelError(f"{index_file}: {name!r} is not a file of this folder")
    return [path / name for name in names]


def _read_json(file: Path, kind: type[T], bytes_max: int) -> T:
    try:
        if file.stat().st_size > bytes_max:
            raise ModelError(f"{file} is longer than {bytes_max} bytes")
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: {error}") from error
