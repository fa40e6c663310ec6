"""Steps that are padded and replayed give what plain ones give. On the CPU what was recorded is computed anew."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import engine.build
from engine.batch import build_batch
from engine.build import Model, engine_of
from engine.config import EngineConfig
from engine.graphs import Graphs, sizes_of, sizes_up_to
from engine.loader import load
from engine.models import KVCache
from engine.sequence import Share, block_table
from engine.types import FinishReason, Request, Sampling
from kernels import reference
from kernels.triton import OPS, attention_plan
from tests import tiny_models, triton_interpreter
from tests.test_engine import run
from tests.test_metering import share_of

BLOCK_SIZE = 8
NUM_BLOCKS = 40
CPU = torch.device("cpu")
NOTHING = torch.empty(0, dtype=torch.int64)


class Recorder:
    """Stands where CUDA's graphs do."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1

        def replay() -> Tensor:
            self.num_replayed += 1
            return compute()

        return replay


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    triton_interpreter.install()
    path = tiny_models.tiny_mixtral(tmp_path_factory.mktemp("model"), seed=3)
    # Attention alone hangs on more than tensors of one shape; the rest would only take the interpreter's time.
    ops = replace(reference.OPS, attention=OPS.attention)
    decoder = load(path, ops, weights="fp32", dtype=torch.float32)
    config = EngineConfig(block_size=BLOCK_SIZE, cache_tokens=NUM_BLOCKS * BLOCK_SIZE, drafts_max=0)
    return Model.of(config, decoder, ops)


@pytest.fixture(autouse=True)
def _little_room(monkeypatch) -> None:
    """For parts of long contexts, each of which the interpreter visits."""
    monkeypatch.setattr(attention_plan, "SEGMENTS_SPARE", 1)


def sequences(model: Model, lengths: list[int], num_new: list[int]) -> list[Share]:
    """Their last tokens to compute, so many each, behind a cache that holds random numbers."""
    torch.manual_seed(5)
    for cache in (*model.cache.keys, *model.cache.values):
        cache[:NUM_BLOCKS] = torch.randn_like(cache[:NUM_BLOCKS])
        cache[NUM_BLOCKS] = torch.nan  # what nobody wrote must not matter
    shares, block = [], 0
    for length, new in zip(lengths, num_new, strict=True):
        share = share_of(list(range(3, 3 + length)), [], [7] * (new - 1), length - 1, length - 1, new)
        share.sequence.blocks = block_table(range(block, block + 1 + (length + new) // BLOCK_SIZE))
        block = share.sequence.blocks[-1] + 1
        shares.append(share)
    assert block <= NUM_BLOCKS
    return shares


def logits(forward: Callable, shares: list[Share]) -> Tensor:
    with torch.inference_mode():
        return forward(build_batch(shares, BLOCK_SIZE, NOTHING)).clone()


def graphs_of(model: Model, sizes: dict[int, list[int]]) -> tuple[Graphs, Recorder]:
    graphs, recorder = Graphs(model.forward, sizes, NUM_BLOCKS, BLOCK_SIZE), Recorder()
    graphs.record(recorder, 12, CPU)
    return graphs, recorder


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # the same sums in batches of another size


def kept(cache: KVCache) -> list[Tensor]:
    return [tensor[:NUM_BLOCKS].clone() for tensor in (*cache.keys, *cache.values)]


@pytest.mark.parametrize(
    ("lengths", "num_new"), [([5, 17, 9], [1, 1, 1]), ([5, 17], [1, 1]), ([20], [1]), ([9, 20], [3, 1])]
)
def test_a_step_that_is_padded_and_replayed_has_the_plain_steps_logits_and_cache(model, lengths, num_new):
    graphs, recorder = graphs_of(model, {1: [2, 4], 3: [6]})
    logits(graphs, graphs.padded(sequences(model, [30, 40, 11, 6], [1] * 4)))  # leaves its inputs behind
    shares = sequences(model, lengths, num_new)
    expected, cache = logits(model.forward, shares), kept(model.cache)
    padded = graphs.padded(sequences(model, lengths, num_new))
    assert len(padded) > len(shares) or len(shares) == 2
    actual = logits(graphs, padded)
    assert recorder.num_replayed == 2
    assert actual.isfinite().all()
    assert_close(actual[: sum(num_new)], expected)
    for now, before in zip(kept(model.cache), cache, strict=True):
        assert_close(now, before)


def test_prompts_and_what_is_too_large_are_computed_as_they_come(model):
    graphs, recorder = graphs_of(model, {1: [1, 2], 3: [6]})
    prompt = sequences(model, [20], [1])[0].sequence
    prompt.num_computed = 11
    for shares in (
        [prompt.share(9)],
        [prompt.share(2)],  # as few tokens as a verification has
        sequences(model, [5, 6, 7], [1, 1, 1]),
        sequences(model, [5, 9, 6], [3, 3, 1]),
        sequences(model, [9], [4]),
    ):
        assert graphs.padded(shares) is shares
        logits(graphs, shares)
    assert recorder.num_replayed == 0


def test_attention_in_more_parts_than_there_is_room_for_is_not_replayed(model, monkeypatch):
    monkeypatch.setattr(attention_plan, "SEGMENT_MIN", 64)
    graphs, recorder = graphs_of(model, {1: [2]})
    for lengths, num_replayed in (([70, 5], 1), ([70, 80], 1), ([70, 5], 2)):
        shares = sequences(model, lengths, [1, 1])
        expected = logits(model.forward, shares)
        assert_close(logits(graphs, shares), expected)
        assert recorder.num_replayed == num_replayed


def test_a_backend_that_plans_every_step_anew_has_no_graphs(tmp_path):
    decoder = load(tiny_models.tiny_mixtral(tmp_path, seed=3), reference.OPS, weights="fp32", dtype=torch.float32)
    model = Model.of(
        EngineConfig(block_size=BLOCK_SIZE, cache_tokens=NUM_BLOCKS * BLOCK_SIZE, drafts_max=0), decoder, reference.OPS
    )
    _, recorder = graphs_of(model, {1: [2]})
    assert recorder.num_recorded == 0


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_an_engine_that_replays_gives_the_plain_engines_answers(model, overlap, monkeypatch):
    """Sequences come and go, so that every size is met, with padding and without."""
    monkeypatch.setattr(engine.build, "sizes_of", lambda *_: {1: [2, 4]})
    requests = [
        Request(id=number, prompt=tuple(range(3, 6 + number)), sampling=Sampling(tokens_max=2 + 2 * number))
        for number in range(3)
    ]
    config = EngineConfig(block_size=BLOCK_SIZE, cache_tokens=NUM_BLOCKS * BLOCK_SIZE, sequences_max=3, drafts_max=0)
    recorder = Recorder()
    plain, _ = run(engine_of(config, model), *requests)
    replayed, finished = run(engine_of(replace(config, overlap=overlap), model, capture=recorder), *requests)
    assert replayed == plain
    assert all(end.reason is FinishReason.LENGTH for end in finished.values())
    assert recorder.num_recorded == 2
    assert recorder.num_replayed == 5  # all steps but that of the prompts


def test_sizes_leave_a_fifth_of_padding_at_most():
    sizes = sizes_up_to(256)
    assert sizes[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16]
    assert sizes[-5:] == [128, 160, 192, 224, 256]
    assert all(upper - lower - 1 <= upper / 5 for lower, upper in pairwise(sizes))
    assert sizes_of(20, 1) == {1: sizes_up_to(20)}
    assert sizes_of(300, 4) == {1: sizes_up_to(300), 4: sizes_up_to(512)}
