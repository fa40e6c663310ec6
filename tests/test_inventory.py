"""What a model takes of a machine is told before it is loaded, and is what it then takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.convert import convert
from engine.errors import EngineMisconfigured, ModelError
from engine.inventory import LOADED_BITS, Inventory, _bits_of, take_inventory
from engine.loader import load
from engine.ranks import ALONE, Ranks
from kernels.backends import pick
from tests.published import published, published_mxfp4
from tests.tiny_models import tiny_deepseek_v2, tiny_deepseek_v3, tiny_mixtral, tiny_qwen2_moe, with_draft_layer
from worker.cli import main

MEMORY = 1_000_000_000

NO_KERNELS = "no C++ kernels here: torch's keep int4 twice, and others where nobody can look"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    wide = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}  # so that padding does not count
    return tiny_mixtral(tmp_path_factory.mktemp("mixtral"), 1, **wide)


def inventory(
    folder: Path, weights: str = "auto", cache: str = "auto", device: str = "cpu", num_ranks: int = 1, **more: Any
) -> Inventory:
    return take_inventory(
        folder, weights=weights, cache=cache, device=device, memory_bytes=MEMORY, num_ranks=num_ranks, **more
    )


def loaded_bytes(found: Inventory) -> int:
    """Of one that is alone."""
    (part,) = found.parts
    return part.loaded_bytes


def test_every_tensor_is_a_part_of_something(mixtral: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors").values()
    kinds = inventory(mixtral).kinds
    assert sum(kind.parameters for kind in kinds) == sum(tensor.numel() for tensor in tensors)
    assert sum(kind.bytes for kind in kinds) == sum(tensor.nbytes for tensor in tensors)
    assert [kind.name for kind in kinds] == ["embedding", "head", "norms", "router", "experts", "attention"]
    by_name = {kind.name: kind.parameters for kind in kinds}
    assert by_name["experts"] == 2 * 4 * 3 * 256 * 512
    assert by_name["router"] == 2 * 4 * 256
    assert by_name["norms"] == 5 * 256


def test_of_a_mixture_the_chosen_experts_are_active(mixtral: Path) -> None:
    there = inventory(mixtral)
    idle = 2 * (4 - 2) * 3 * 256 * 512  # layers, experts that are not chosen, matrices
    assert there.active_parameters == sum(kind.parameters for kind in there.kinds) - idle


@pytest.mark.parametrize("make", [tiny_qwen2_moe, tiny_deepseek_v2])
def test_other_parts_have_their_names(tmp_path: Path, make: Any) -> None:
    names = {kind.name for kind in inventory(make(tmp_path)).kinds}
    assert names >= {"shared experts", "experts", "router", "attention", "norms"}
    assert ("feed-forward" in names) == (make is tiny_deepseek_v2)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4", "int4-g128", "fp8", "fp8-blocks", "mxfp4"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_take_in_memory_what_is_told(mixtral: Path, tmp_path: Path, weights: str, tied: bool) -> None:
    folder = (
        tiny_mixtral(tmp_path, 1, hidden_size=256, intermediate_size=512, tie_word_embeddings=True) if tied else mixtral
    )
    if pick("cpu").name != "cpu":
        pytest.skip(NO_KERNELS)
    assert loaded_bytes(inventory(folder, weights)) == pytest.approx(bytes_in_memory(folder, weights), rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_kept_in_bf16_stays_so(tmp_path: Path, tied: bool) -> None:
    if pick("cpu").name != "cpu":
        pytest.skip(NO_KERNELS)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}
    long = tiny_mixtral(tmp_path, 1, tie_word_embeddings=tied, **sizes)
    half = shutil.copytree(long, tmp_path / "half")
    tensors = load_file(long / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, half / "model.safetensors")
    in_half, in_full = (bytes_in_memory(folder, "int8") for folder in (half, long))
    assert in_full - in_half == pytest.approx(4096 * 256 * 2, rel=0.01)
    assert loaded_bytes(inventory(half, "int8")) == pytest.approx(in_half, rel=0.02)


@pytest.mark.parametrize(("num_ranks", "experts"), [(2, "sharded"), (3, "whole")])
@pytest.mark.parametrize("weights", ["auto", "int4-g128"])
def test_so_does_what_each_rank_has_of_them(tmp_path: Path, num_ranks: int, experts: str, weights: str) -> None:
    if pick("cpu").name != "cpu":
        pytest.skip(NO_KERNELS)
    sizes = {"hidden_size": 192, "intermediate_size": 384, "vocab_size": 500}  # 3 x 167: the last has less
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6}
    folder = tiny_mixtral(tmp_path, 1, tie_word_embeddings=num_ranks == 3, **sizes, **heads)
    there = inventory(folder, weights, num_ranks=num_ranks, experts=experts)
    everybodys = sum(kind.parameters for kind in there.kinds if kind.name in ("norms", "router"))
    again = (num_ranks - 1) * everybodys
    assert sum(part.parameters for part in there.parts) == sum(kind.parameters for kind in there.kinds) + again
    for rank, part in enumerate(there.parts):
        own = Ranks(rank, num_ranks, experts == "whole")
        assert part.loaded_bytes == pytest.approx(bytes_in_memory(folder, weights, own, 192), rel=0.02)


def bytes_in_memory(folder: Path, weights: str, rank: Ranks = ALONE, hidden_size: int = 256) -> int:
    """Of a rank's weights, but for the routers' padding in two layers: the kernels take blocks of 64 outputs."""
    model = load(folder, pick("cpu"), weights=weights, dtype=torch.float32, ranks=rank)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(model)}
    return sum(storages.values()) - 2 * (64 - 4) * hidden_size * 4


def tensors_of(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """All tensors that can be reached from an object of ours."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        inner: list[Any] = list(value)
    elif type(value).__module__.startswith(("engine.", "kernels.")) and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    else:
        return []
    return [tensor for one in inner for tensor in tensors_of(one, seen)]


def test_both_devices_have_kernels_for_every_layout_in_memory() -> None:
    if pick("cpu").name != "cpu":
        pytest.skip(NO_KERNELS)
    for name in ("cpu", "triton"):
        assert set(pick("cpu", name).weights) == set(LOADED_BITS), name


def test_four_bits_of_others_stay_four_bits(tmp_path: Path) -> None:
    folder, _ = published_mxfp4(tmp_path)
    on_cpu, on_gpu = inventory(folder), inventory(folder, device="cuda")
    experts = on_cpu.kinds[-2]
    assert 8 * experts.bytes / experts.parameters == pytest.approx(4.25, abs=0.6)  # with biases
    dense_bytes = 4 * sum(kind.parameters for kind in on_cpu.kinds if kind != experts)
    assert loaded_bytes(on_cpu) - dense_bytes == pytest.approx(4.5 / 8 * experts.parameters, rel=0.2)
    assert loaded_bytes(on_gpu) < loaded_bytes(on_cpu)


@pytest.mark.parametrize(
    ("layout", "group", "on_cpu", "on_gpu"),
    [
        ("int4", 32, 5, 5),
        ("int4", 64, 4.5, 4.5),
        ("int4", 128, 4.5, 4.25),
        ("fp8", 128, 8.25, 8.25),
        ("fp8", 4096, 8.25, 8),
        ("mxfp4", 32, 4.5, 5),
        ("int8", 4096, 8, 8),
    ],
)
def test_a_weight_takes_its_bits_and_its_scales(layout: str, group: int, on_cpu: float, on_gpu: float) -> None:
    actual = [_bits_of(layout, 4096, 4096 // group, device) for device in ("cpu", "cuda")]
    assert actual == [on_cpu, on_gpu]


def test_a_layer_that_drafts_is_told_apart(tmp_path: Path) -> None:
    folder = with_draft_layer(tiny_deepseek_v3(tmp_path), 0)
    without, with_it = inventory(folder), inventory(folder, draft_heads=True)
    assert with_it.kinds[:-1] == without.kinds
    assert with_it.kinds[-1].name == "draft layer"
    assert loaded_bytes(with_it) - loaded_bytes(without) == 4 * with_it.kinds[-1].parameters
    assert with_it.active_parameters == without.active_parameters
    assert with_it.cache_bytes_per_token > without.cache_bytes_per_token, "its keys and the states that it reads"
    with pytest.raises(EngineMisconfigured, match="draft_heads is set, and ranks is 2"):
        inventory(folder, num_ranks=2, draft_heads=True)
    with pytest.raises(ModelError, match="no layer for multi-token prediction"):
        inventory(tiny_mixtral(tmp_path, 1), draft_heads=True)


def test_what_others_quantized_is_told_as_we_keep_it(tmp_path: Path) -> None:
    folder, floats = published("awq", tmp_path)
    assert loaded_bytes(inventory(folder)) < loaded_bytes(inventory(floats)) / 3
    convert(folder, tmp_path / "new", "auto")
    assert loaded_bytes(inventory(tmp_path / "new")) == loaded_bytes(inventory(folder))


def test_the_cache_takes_what_the_weights_leave(mixtral: Path) -> None:
    token = 2 * 2 * 2 * 64  # layers, keys and values, heads, numbers of each
    for cache, size in [("auto", 4 * token), ("bf16", 2 * token), ("fp8", token), ("int8", token + 2 * 2 * 2 * 4)]:
        there = inventory(mixtral, "int8", cache)
        assert there.cache_bytes_per_token == size
        assert there.cache_tokens == (MEMORY - loaded_bytes(there)) // size
    tight = take_inventory(mixtral, weights="auto", cache="auto", device="cpu", memory_bytes=1000)
    assert tight.cache_tokens == 0


def test_ranks_share_a_host_and_have_a_gpu_each(mixtral: Path) -> None:
    for device in ("cpu", "cuda"):
        alone = loaded_bytes(inventory(mixtral, "int4", device=device))
        there = inventory(mixtral, "int4", "bf16", device, num_ranks=2)
        first, second = there.parts
        assert there.cache_bytes_per_token == 2 * 2 * 64 * 2  # layers, keys and values, one of two heads
        taken = first.loaded_bytes + second.loaded_bytes
        assert alone < taken < 1.1 * alone  # norms and routers twice
        left = (MEMORY - taken) // 2 if device == "cpu" else MEMORY - first.loaded_bytes
        assert first.cache_tokens == left // there.cache_bytes_per_token


def test_the_rank_with_the_least_room_decides(tmp_path: Path) -> None:
    there = inventory(tiny_mixtral(tmp_path, num_local_experts=3), num_ranks=2, experts="whole", device="cuda")
    first, second = there.parts
    assert second.parameters > first.parameters, "two experts of three"
    assert there.cache_tokens == second.cache_tokens < first.cache_tokens


def test_settings_that_cannot_be_are_named(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineMisconfigured, match="int3"):
        inventory(mixtral, cache="int3")
    with pytest.raises(ModelError, match="int3"):
        inventory(mixtral, weights="int3")
    with pytest.raises(EngineMisconfigured, match="latents"):
        inventory(tiny_deepseek_v2(tmp_path), cache="int8")
    with pytest.raises(EngineMisconfigured, match=r"can have 1, 2, 4 ranks"):
        inventory(mixtral, num_ranks=3)
    with pytest.raises(EngineMisconfigured, match=r"experts 'cut'"):
        inventory(mixtral, num_ranks=2, experts="cut")
    with pytest.raises(EngineMisconfigured, match=r"16 or less"):
        inventory(mixtral, num_ranks=17)
    with pytest.raises(EngineMisconfigured, match=r"device 'tpu'"):
        inventory(mixtral, device="tpu")


def test_a_format_that_a_part_cannot_have_is_refused_as_it_is_when_loaded(tmp_path: Path) -> None:
    folder = tiny_mixtral(tmp_path, 1, intermediate_size=96)
    inventory(folder, "int4")
    with pytest.raises(ModelError, match=r"expert\.down.*multiple of 32.*one of 2 ranks"):
        inventory(folder, "int4", num_ranks=2)
    inventory(folder, "int4", num_ranks=2, experts="whole")


def test_a_given_memory_goes_with_the_device_that_is_chosen(mixtral: Path) -> None:
    assert inventory(mixtral, device="auto").memory_bytes == MEMORY


def test_the_command_tells_it(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "model",
        "inspect",
        str(mixtral),
        "--weights",
        "int4",
        "--cache",
        "fp8",
        "--memory-gb",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engine"]["cache_tokens"] == inventory(mixtral, "int4", "fp8").cache_tokens
    assert told["refusal"] == ""
    assert main(asked) == 0
    table = capsys.readouterr().out
    assert f"{told['engine']['cache_tokens']:,}" in table
    assert "active for one token" in table
    assert main([*asked, "--ranks", "2", "--experts", "whole", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["engine"]["parts"]
    assert main([*asked, "--ranks", "2", "--experts", "whole"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for rank, part in enumerate(parts):
        megabytes = f"{part['loaded_bytes'] / 1e6:,.0f}"
        assert [str(rank), f"{part['parameters']:,}", megabytes, f"{part['cache_tokens']:,}"] in lines
    assert main(["model", "inspect", str(mixtral), "--ranks", "3"]) == 78
    assert "can have 1, 2, 4 ranks" in capsys.readouterr().err
    assert main(["model", "inspect", str(mixtral), "--cache", "int3"]) == 78
    assert "int3" in capsys.readouterr().err
