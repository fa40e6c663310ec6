"""The cache keeps keys and values as well as its bits allow, on every backend, and the model with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import EngineMisconfigured
from engine.loader import load
from engine.models import KVCache
from engine.types import Finished, Request, Sampling
from kernels import reference
from kernels.cache import CACHE_DTYPES, decode, encode, kept_size, row_size
from kernels.ops import AttentionBatch, Ops
from kernels.reference import OPS
from tests.parity import BLOCK_SIZE, NUM_BLOCKS, SEED, TOKENS, cache_for, logits, median_error
from tests.test_kernels import TABLES, table
from tests.tiny_models import tiny

NARROW = ["bf16", "fp8", "int8"]


@pytest.fixture(params=TABLES)
def any_ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    with table(request.param) as ops:
        yield ops


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------- what a row keeps


def kept(x: Tensor, name: str) -> Tensor:
    rows = encode(x, CACHE_DTYPES[name])
    assert rows.dtype == CACHE_DTYPES[name]
    assert rows.shape == (*x.shape[:-1], row_size(x.shape[-1], rows.dtype))
    assert kept_size(rows) == x.shape[-1]
    return decode(rows)


@pytest.mark.parametrize(("name", "relative"), [("fp32", 0.0), ("bf16", 2**-8), ("fp8", 2**-4)])
def test_floats_are_off_by_half_a_step_of_their_size(name: str, relative: float) -> None:
    x = torch.randn(50, 3, 64) * 10 ** torch.linspace(-1, 1, 50)[:, None, None]
    error = (kept(x, name) - x).abs()
    assert (error <= relative * x.abs() + (2**-10 if name == "fp8" else 0)).all()  # below 2^-6 e4m3's steps are even
    assert (error.max() > 0) == (name != "fp32")


def test_int8_is_off_by_half_a_level_of_its_own_row() -> None:
    x = torch.randn(50, 3, 64)
    x[7, 1] *= 1000
    x[8, 2] = 0
    error = (kept(x, "int8") - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)).all()


def test_fp8_cuts_off_what_is_too_large() -> None:
    assert kept(torch.tensor([[1e4, -1e4, 448.0, 1.0]]), "fp8").tolist() == [[448.0, -448.0, 448.0, 1.0]]


@pytest.mark.parametrize("name", CACHE_DTYPES)
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(name: str, what: float) -> None:
    x = torch.randn(2, 8)
    x[1, 3] = what
    assert kept(x, name)[0].isfinite().all()
    assert not kept(x, name)[1, 3].isfinite()


# ----------------------------------------------------------------------------------------------------- on every backend


@pytest.mark.parametrize("name", NARROW)
def test_rows_are_written_as_the_definition_writes_them_and_no_others(any_ops: Ops, name: str) -> None:
    dtype, slots = CACHE_DTYPES[name], torch.tensor([17, 2, 3])
    key, value = torch.randn(2, 3, 2, 24) * 10 ** torch.linspace(-5, 4, 24)
    value[1, 0] = 0
    value[2, 1, 5] = torch.inf
    key[0] = (torch.arange(48.0).view(2, 24) + 0.5) * 2.0**-9  # ties: below 2^-6, and halfway between numbers above
    caches = [torch.zeros(5, 4, 2, row_size(24, dtype)).to(dtype) for _ in range(4)]
    any_ops.write_kv(key, value, caches[0], caches[1], slots)
    reference.write_kv(key, value, caches[2], caches[3], slots)
    for actual, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    untouched = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not caches[0].view(torch.uint8).view(20, -1)[untouched].any()
    assert torch.equal(decode(caches[0]).view(20, 2, 24)[slots], decode(encode(key, dtype)))


def test_every_number_of_fp8_is_read_as_what_it_is(any_ops: Ops) -> None:
    """As values of a lone position, which attention gives back."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).view(torch.float8_e4m3fn)
    batch = AttentionBatch(torch.tensor([[0]]), [0, 1], [1], torch.tensor([0]))
    keys = torch.zeros(1, 1, 16, 16).to(codes.dtype)
    read = any_ops.attention(torch.zeros(1, 16, 16), keys, codes, batch, 1.0).flatten()
    assert torch.allclose(read, codes.float().flatten(), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])}], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_attention_sees_what_the_rows_stand_for(any_ops: Ops, name: str, options: dict) -> None:
    """A prompt, a decode and a few drafts, in blocks out of order; what nobody wrote is NaN."""
    dtype, lengths, queries = CACHE_DTYPES[name], [21, 40, 9], [21, 1, 3]
    starts = [0, 21, 22, 25]
    tables = torch.tensor([[3, 9, 1, 0, 0], [2, 11, 5, 8, 4], [7, 6, 0, 0, 0]])
    key_cache, value_cache = (_empty((12, 8, 2, row_size(size, dtype)), dtype) for size in (40, 24))
    for places, length in zip(tables, lengths, strict=True):
        position = torch.arange(length)
        slots = places[position // 8] * 8 + position % 8
        reference.write_kv(torch.randn(length, 2, 40), torch.randn(length, 2, 24), key_cache, value_cache, slots)
    query = torch.randn(sum(queries), 4, 40)
    batch = AttentionBatch(tables, starts, lengths, torch.zeros(sum(queries), dtype=torch.int64))
    actual = any_ops.attention(query, key_cache, value_cache, batch, 0.2, **options)
    exact = decode(key_cache), decode(value_cache)
    expected = reference.attention(query, *exact, batch, 0.2, **options)
    assert actual.shape == (25, 4, 24)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()  # sums of fp32 in another order


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    cache = torch.empty(shape, dtype=dtype)
    cache.view(torch.uint8).fill_(0xFF)
    return cache


# -------------------------------------------------------------------------------------------------------- in the models


@pytest.fixture(scope="module", params=["mixtral", "gpt-oss", "deepseek-v2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(request.param, tmp_path_factory.mktemp("model"), SEED)


# Of the median token's logits, in models whose heads have but 16 numbers. A number of fp8 is off by 2.7 % of itself,
# one of int8 by 1 / 127 / sqrt(12) of the row's largest, a third of that.
ERROR_MAX = {"bf16": 0.01, "fp8": 0.06, "int8": 0.03}


@pytest.mark.parametrize("name", NARROW)
def test_a_model_stays_near_itself_and_does_not_see_how_it_was_cut(checkpoint: Path, name: str) -> None:
    model = load(checkpoint, OPS, weights="fp32", dtype=torch.float32)
    if name == "int8" and "deepseek" in str(checkpoint):
        with pytest.raises(ValueError, match="latents"):
            cache_for(model, CACHE_DTYPES[name])
        return
    whole = logits(model, [TOKENS], CACHE_DTYPES[name])
    error = median_error(whole, logits(model, [TOKENS]))
    assert 1e-4 < error < ERROR_MAX[name]
    one_by_one = logits(model, [[token] for token in TOKENS], CACHE_DTYPES[name])
    assert median_error(one_by_one, whole) < 1e-5  # the median: a number that is near a tie may be rounded otherwise


@pytest.mark.parametrize("name", ["fp32", *NARROW])
def test_a_cache_takes_the_bytes_it_says(checkpoint: Path, name: str) -> None:
    model, dtype = load(checkpoint, OPS, weights="fp32", dtype=torch.float32), CACHE_DTYPES[name]
    if name == "int8" and "deepseek" in str(checkpoint):
        return
    cache = cache_for(model, dtype)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in cache.keys + cache.values}
    announced = NUM_BLOCKS * KVCache.bytes_per_block(model.spec, BLOCK_SIZE, dtype)
    assert sum(storage.nbytes() for storage in storages.values()) == announced
    in_fp32 = KVCache.bytes_per_block(model.spec, BLOCK_SIZE, torch.float32)
    share = {"fp32": 1, "bf16": 1 / 2, "fp8": 1 / 4, "int8": (16 + 4) / 16 / 4}  # heads of 16 and a scale
    assert announced == NUM_BLOCKS * in_fp32 * share[name]


# -------------------------------------------------------------------------------------------------------- in the engine


def test_an_engine_with_a_cache_of_8_bits_answers_and_finds_prefixes_again(tmp_path: Path) -> None:
    checkpoint = tiny("mixtral", tmp_path, SEED)
    for name in ("fp8", "int8"):
        core = build(EngineConfig(cache=name, block_size=4, cache_tokens=256), checkpoint)
        first, second = (answer(core, request_id) for request_id in (1, 2))
        assert len(first[0]) == 8
        assert first[0] == second[0]
        assert second[1].usage.num_cached == 20  # of 23: a cached prefix leaves a token to compute


def test_a_cache_that_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineMisconfigured, match=r"cache 'int4'.*fp32, bf16, fp8, int8"):
        build(EngineConfig(cache="int4"), tiny("mixtral", tmp_path))
    with pytest.raises(EngineMisconfigured, match=r"int8 cannot keep the latents.*fp8"):
        build(EngineConfig(cache="int8"), tiny("deepseek-v2", tmp_path))


def answer(core: Core, request_id: int) -> tuple[list[int], Finished]:
    core.submit(Request(id=request_id, prompt=tuple(TOKENS), sampling=Sampling(tokens_max=8)))
    tokens: list[int] = []
    while True:
        result = core.step()
        tokens += [event.token for event in result.tokens]
        if result.finished:
            return tokens, result.finished[0]
