"""Several ranks compute together what one computes alone, each with its own part of the model and no more."""

from math import prod
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine import shards
from engine.convert import convert
from engine.errors import EngineMisconfigured, ModelError
from engine.loader import Checkpoint, load, open_checkpoint
from engine.models import Decoder, ModelSpec, moe
from engine.models.layers import Weights
from engine.models.parameters import Parameter, has_format, parameters
from engine.models.parts import cut, part_of
from engine.models.spec import GroupedQuery, LayerSpec, Mixture, QueryKeyNorm, Rope
from engine.quant import FORMATS, Kept, keep
from engine.ranks import Ranks
from kernels.reference import OPS
from tests.parity import ERROR_MAX, SEED, TOKENS, logits, relative_error
from tests.rank_threads import together
from tests.tiny_models import tiny, tiny_gpt_oss, tiny_mixtral

CHUNKS = [TOKENS[:14], TOKENS[14:]]  # so that the second reads the first's part of the cache

# A mixer and a feed-forward of each kind, and each of their options that a rank has a part of.
SHAPES = [
    "llama, one key-value head, tied",  # which all ranks have, as half of the ranks each of the two elsewhere
    "llama, every head its own, biases",
    "mixtral",
    "qwen2-moe",  # a shared expert with a gate, biases on queries
    "olmoe, shared keys, weights that sum to 1",  # norms over the heads of all ranks
    "gpt-oss",  # sinks, windows, biases everywhere
    "deepseek-v2",
    "deepseek-v2, as lite",
    "deepseek-v3",  # a bias in the choice of experts
]


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return tiny(request.param, tmp_path_factory.mktemp("model"), SEED)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Mixtral of which the halves fall into groups of 32, and some also into blocks of 128."""
    torch.set_num_threads(1)
    return tiny_mixtral(tmp_path_factory.mktemp("wide"), SEED, intermediate_size=256)


def by_ranks(checkpoint: Path, size: int, weights: str, *, whole_experts: bool = False) -> list[Tensor]:
    """Each rank's logits."""

    def work(ranks: Ranks) -> Tensor:
        return logits(load(checkpoint, OPS, weights=weights, dtype=torch.float32, ranks=ranks), CHUNKS)

    return together(size, work, whole_experts=whole_experts)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("whole_experts", [False, True], ids=["sharded", "whole"])
def test_ranks_together_have_the_logits_of_one(checkpoint: Path, size: int, whole_experts: bool) -> None:
    """But for the order of sums in fp32, which ERROR_MAX allows for."""
    alone = logits(load(checkpoint, OPS, weights="fp32", dtype=torch.float32), CHUNKS)
    first, *others = by_ranks(checkpoint, size, "fp32", whole_experts=whole_experts)
    assert relative_error(first, alone) < ERROR_MAX
    assert all(torch.equal(other, first) for other in others), "ranks that differ would route differently"


class _Assembled:
    """The model of floats that stands for what the ranks keep together."""

    def __init__(self, checkpoints: list[Checkpoint], spec: ModelSpec, ranks: list[Ranks], weights: str) -> None:
        self._checkpoints = checkpoints
        self._shapes = parameters(spec)
        self._parts = [(rank, parameters(part_of(spec, rank))) for rank in ranks]
        self._weights = weights

    def take(self, parameter: Parameter) -> Kept:
        shape = self._shapes[parameter]
        whole = torch.full(shape, torch.nan)
        name = FORMATS[self._weights].head if parameter.role == "head" else self._weights
        for checkpoint, (ranks, parts) in zip(self._checkpoints, self._parts, strict=True):
            if parameter in parts:
                kept = checkpoint.take(parameter)
                kept = keep(kept, FORMATS[name]) if has_format(parameter, shape) else kept
                where = cut(shape, parts[parameter], ranks)
                whole[tuple(slice(one.start, one.stop) for one in where)] = kept.floats()
        return Kept.plain(whole)


@pytest.mark.parametrize("whole_experts", [False, True], ids=["sharded", "whole"])
@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g128", "fp8", "fp8-blocks", "mxfp4"])
def test_each_rank_makes_its_part_of_a_matrix_in_the_format(wide: Path, weights: str, whole_experts: bool) -> None:
    ranks = [Ranks(rank, 2, whole_experts) for rank in range(2)]
    with open_checkpoint(wide, ranks[0]) as (spec, first), open_checkpoint(wide, ranks[1]) as (_, second):
        assembled = _Assembled([first, second], spec, ranks, weights)
        model = Decoder(spec, Weights(assembled, OPS, "fp32", torch.float32, torch.device("cpu")))
    error = relative_error(by_ranks(wide, 2, weights, whole_experts=whole_experts)[0], logits(model, CHUNKS))
    assert error < ERROR_MAX


@pytest.mark.parametrize("weights", ["auto", "int8", "int4", "int4-g64", "int4-g128", "fp8", "fp8-blocks", "mxfp4"])
def test_each_rank_has_its_part_of_a_quantized_matrix(wide: Path, tmp_path: Path, weights: str) -> None:
    """To the bit. Groups of 64 and 128 are cut in two where a rank reads 32 of 64 inputs."""
    convert(wide, tmp_path / "kept", weights)
    alone = logits(load(tmp_path / "kept", OPS, weights="auto", dtype=torch.float32), CHUNKS)
    assert relative_error(by_ranks(tmp_path / "kept", 2, "auto")[0], alone) < ERROR_MAX


def test_experts_in_one_tensor_are_cut_like_others(tmp_path: Path) -> None:
    """GPT-OSS's floats, where gate and up take turns along the last dimension."""
    gpt_oss = tiny_gpt_oss(tmp_path, SEED, intermediate_size=128)
    alone = logits(load(gpt_oss, OPS, weights="mxfp4", dtype=torch.float32), CHUNKS)
    assert relative_error(by_ranks(gpt_oss, 2, "mxfp4")[0], alone) < ERROR_MAX  # its groups are cut nowhere


def test_what_groups_do_not_allow_is_refused_by_name(wide: Path, tmp_path: Path) -> None:
    convert(wide, tmp_path / "kept", "fp8-blocks")
    with pytest.raises(ModelError, match=r"expert.down.0.0.fp8.q: inputs 0 to 64 .* groups of 128 .*one of 4 ranks"):
        load(tmp_path / "kept", OPS, weights="auto", dtype=torch.float32, ranks=Ranks(0, 4))
    with pytest.raises(ModelError, match=r"attention.output.*multiple of 32.*one of 4 ranks"):
        load(wide, OPS, weights="int4", dtype=torch.float32, ranks=Ranks(0, 4))
    load(tmp_path / "kept", OPS, weights="auto", dtype=torch.float32, ranks=Ranks(0, 4, whole_experts=True))


@pytest.mark.parametrize("whole_experts", [False, True], ids=["sharded", "whole"])
def test_a_rank_reads_its_part_and_little_more_at_a_time(wide: Path, whole_experts: bool) -> None:
    piece_bytes, reads = 1 << 12, []
    read = shards.Shard._read

    def counted(*arguments) -> Tensor:
        tensor = read(*arguments)
        reads.append(tensor.nbytes)
        return tensor

    ranks = Ranks(1, 4, whole_experts)
    with (
        mock.patch.object(shards.Shard, "_read", counted),
        mock.patch.object(shards, "PIECE_BYTES", piece_bytes),
        open_checkpoint(wide, ranks) as (spec, checkpoint),
    ):
        for parameter, shape in parameters(part_of(spec, ranks)).items():
            reads.clear()
            assert tuple(checkpoint.take(parameter).floats().shape) == shape
            assert max(reads) <= max(4 * prod(shape), piece_bytes)


def test_a_file_gives_any_rectangle_of_a_matrix(wide: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 1 << 10)  # a few rows
    name = "model.layers.0.self_attn.o_proj.weight"
    with shards.open_shard(wide / "model.safetensors") as shard:
        assert torch.equal(shard.read_cut(name, (range(3, 60), range(5, 17))), shard.read(name)[3:60, 5:17])


@pytest.mark.parametrize(
    ("size", "whole_experts", "text"),
    [
        (3, False, r"ranks is 3, and layer 0 has 4 heads, .* the model can have 1, 2, 4 ranks"),
        (8, False, "layer 0 has 4 heads"),
        (16, False, "97 tokens is too small for 16"),
    ],
)
def test_so_many_ranks_as_cannot_share_it_are_refused(wide: Path, size: int, whole_experts: bool, text: str) -> None:
    with pytest.raises(EngineMisconfigured, match=text):
        load(wide, OPS, weights="fp32", dtype=torch.float32, ranks=Ranks(0, size, whole_experts))


def _mixtral(num_heads: int = 32, num_kv_heads: int = 8) -> ModelSpec:
    """Of Mixtral 8x7B's shape, a shared expert and a norm more."""
    heads = GroupedQuery(num_heads, num_kv_heads, 128, query_key_norm=QueryKeyNorm(1e-5))
    layer = LayerSpec(heads, Mixture(8, 2, 14336, shared_intermediate=4096))
    return ModelSpec(32000, 4096, (layer,), 1e-5, Rope(1e6), tied_embeddings=False, context_max=32768)


@pytest.mark.parametrize(
    ("spec", "ranks", "text"),
    [
        (_mixtral(num_heads=36, num_kv_heads=6), Ranks(0, 4), "6 key-value heads"),
        (_mixtral(), Ranks(0, 16, whole_experts=True), "8 experts, fewer than 16"),
    ],
)
def test_numbers_of_heads_and_experts_must_fit(spec: ModelSpec, ranks: Ranks, text: str) -> None:
    with pytest.raises(EngineMisconfigured, match=text):
        part_of(spec, ranks)


@pytest.mark.parametrize(
    ("size", "whole_experts"), [(2, False), (4, False), (8, False), (16, False), (2, True), (4, True), (8, True)]
)
def test_every_number_of_a_model_is_some_ranks(size: int, whole_experts: bool) -> None:
    spec, covered = _mixtral(), dict[Parameter, set[tuple[tuple[int, int], ...]]]()
    for rank in range(size):
        ranks = Ranks(rank, size, whole_experts)
        for parameter, shape in parameters(part_of(spec, ranks)).items():
            where = cut(parameters(spec)[parameter], shape, ranks)
            assert tuple(map(len, where)) == shape
            covered.setdefault(parameter, set()).add(tuple((one.start, one.stop) for one in where))
    assert covered.keys() == parameters(spec).keys()
    for parameter, shape in parameters(spec).items():
        sizes = [prod(stop - start for start, stop in where) for where in covered[parameter]]
        assert sum(sizes) == prod(shape), f"{parameter} has gaps or is computed twice"


def test_a_choice_that_is_not_held_is_none_of_the_held_and_counts_nothing() -> None:
    weights, places = moe._of_held(range(2, 5), torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[4, 1, 5]]))
    assert (weights.tolist(), places.tolist()) == ([[0.5, 0, 0]], [[2, 3, 3]])


def test_a_rank_of_two_has_half_of_mixtral() -> None:
    """But for routers and norms: a two-thousandth."""
    whole = sum(map(prod, parameters(_mixtral()).values()))
    part = sum(map(prod, parameters(part_of(_mixtral(), Ranks(1, 2))).values()))
    assert 0.5 < part / whole < 0.5005
