"""The cache gets what weights, the largest step and graphs leave; where that is too little, the numbers are told."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from engine.build import Model, bytes_per_block
from engine.config import EngineConfig
from engine.errors import EngineMisconfigured
from engine.graphs import sizes_up_to
from engine.loader import load
from engine.memory import GRAPH_BYTES, Demand, largest_batch
from engine.models.decoder import Decoder
from kernels import reference
from tests.tiny_models import VOCAB_SIZE, tiny_mixtral

CPU = torch.device("cpu")


@dataclass
class FakeProbe:
    """A device of any size, on which every step takes the same."""

    free: int
    step: int = 1 << 20
    computed: list[str] = field(default_factory=list)

    def free_bytes(self) -> int:
        self.computed.append("asked")
        return self.free

    def total_bytes(self) -> int:
        return 80 * 10**9

    def peak_bytes(self, compute: Callable[[], object]) -> int:
        compute()
        self.computed.append("computed")
        return self.step


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    path = tiny_mixtral(tmp_path_factory.mktemp("model"), seed=7)
    return load(path, reference.OPS, weights="fp32", dtype=torch.float32)


def num_blocks(decoder: Decoder, probe: FakeProbe, **settings) -> int:
    return Model.of(
        EngineConfig(**{"sequences_max": 4, "drafts_max": 0, **settings}), decoder, reference.OPS, probe=probe
    ).num_blocks


def test_the_cache_has_its_share_of_what_the_step_and_the_graphs_leave(decoder):
    block = bytes_per_block(decoder.spec, 16, torch.float32)
    graphs = len(sizes_up_to(4)) * GRAPH_BYTES + (1 << 20) + 4 * 4 * VOCAB_SIZE
    probe = FakeProbe(free=graphs + (1 << 20) + 10 * block)
    assert num_blocks(decoder, probe) == 9
    assert probe.computed == ["computed", "asked"]  # what loading kernels takes is not free any more
    assert num_blocks(decoder, probe, cache_memory_share=0.5) == 5
    assert num_blocks(decoder, FakeProbe(free=(1 << 20) + 10 * block), graphs="off") == 9
    assert num_blocks(decoder, FakeProbe(free=10**9)) == 4 * 512 // 16  # more would be of no use


def test_a_cache_of_a_size_that_was_asked_for_may_have_all_that_is_left(decoder):
    block = bytes_per_block(decoder.spec, 16, torch.float32)
    probe = FakeProbe(free=(1 << 20) + 10 * block)
    assert num_blocks(decoder, probe, graphs="off", cache_tokens=160) == 10
    with pytest.raises(EngineMisconfigured, match="lower cache_tokens"):
        num_blocks(decoder, probe, graphs="off", cache_tokens=176)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers():
    demand = Demand(total=80 * 10**9, free=5 * 10**9, step=2 * 10**9, graphs=10**9)
    assert demand.blocks(0.5, 10**8, num_wanted=50, num_least=10) == 10
    with pytest.raises(EngineMisconfigured) as refusal:
        demand.blocks(0.5, 10**8, num_wanted=50, num_least=11)
    for number in ("80.00 GB", "75.00 GB", "2.00 GB", "1.00 GB", "50%", "1.10 GB"):
        assert number in str(refusal.value)


def test_weights_and_a_step_that_leave_nothing_are_refused(decoder):
    with pytest.raises(EngineMisconfigured, match="does not fit"):
        num_blocks(decoder, FakeProbe(free=1 << 20))


@pytest.mark.parametrize(("tokens", "num_sequences"), [(512, 32), (7, 3), (4, 4)])
def test_the_largest_step_has_all_tokens_and_rows_and_a_place_for_each(tokens, num_sequences):
    config = EngineConfig(tokens_per_step_max=tokens, sequences_max=num_sequences)
    batch, blocks = largest_batch(config, CPU)
    assert (len(batch.token_ids), len(batch.rows)) == (tokens, num_sequences)
    slots = batch.attention.slots.tolist()
    assert len(set(slots)) == tokens
    assert max(slots) < blocks * config.block_size
