"""A layer for multi-token prediction drafts what its published formula says, however the work is cut and shared."""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import build
from engine.config import EngineConfig
from engine.convert import convert
from engine.core import Core
from engine.drafting import Drafter
from engine.errors import EngineMisconfigured, ModelError
from engine.loader import load, open_checkpoint
from engine.models import Decoder, KVCache
from engine.models.layers import AUTO
from engine.sampler import GREEDY, uniform
from engine.sequence import Proposed
from engine.sequence import Sequence as EngineSequence
from engine.types import Charge, Finished, Request, Sampling, Work
from kernels.ops import AttentionBatch, SamplingRow
from kernels.reference import OPS
from tests.parity import (
    BLOCK_SIZE,
    BLOCK_TABLE,
    ERROR_MAX,
    NUM_BLOCKS,
    SEED,
    TOKENS,
    cache_for,
    logits,
    relative_error,
    step,
)
from tests.published import published
from tests.tiny_models import tiny_deepseek_v3, tiny_llama, transformers_model, with_draft_layer

pytestmark = pytest.mark.timeout(600)  # importing transformers alone has taken 90 s on two busy cores

LAYER = "model.layers.2."  # behind the two of the tiny model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return with_draft_layer(tiny_deepseek_v3(tmp_path_factory.mktemp("model"), SEED), SEED)


@pytest.fixture(scope="module")
def naive(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "Naive":
    return Naive(checkpoint, tmp_path_factory.mktemp("naive"))


def foreseeing(folder: Path, by_states: float) -> Path:
    """A model of one layer whose draft layer is the same over the same tokens but the first: it is often right.

    `by_states`: how much the states count beside the tokens; the more, the less it is right.
    """
    shape = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    path = with_draft_layer(tiny_deepseek_v3(folder, SEED, **shape))
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding /= embedding.square().mean(1, keepdim=True).sqrt()  # so that `enorm` leaves them as they are
    for name in [name for name in tensors if name.startswith("model.layers.0.")]:
        tensors[name.replace("layers.0", "layers.1")] = tensors[name].clone()
    same = torch.eye(embedding.shape[1])
    tensors |= {
        "model.layers.1.embed_tokens.weight": embedding.clone(),
        "model.layers.1.enorm.weight": torch.ones(len(same)),
        "model.layers.1.eh_proj.weight": torch.cat([same, by_states * same], dim=1),
        "model.layers.1.shared_head.norm.weight": tensors["model.norm.weight"].clone(),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


class Naive:
    """The formula (DeepSeek-V3, arXiv 2412.19437, eq. 21 to 23) over whole sequences, without a cache.

    Its Transformer block is transformers' own layer, which loads as one more of the model's.
    """

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        path = shutil.copytree(checkpoint, folder / "one more layer")
        config = json.loads((path / "config.json").read_text())
        config["num_hidden_layers"] += 1
        (path / "config.json").write_text(json.dumps(config))
        self._layer = f"model.layers.{config['num_hidden_layers'] - 1}."
        self._tensors = load_file(path / "model.safetensors")
        self._model = transformers_model(path)
        self._states: dict[tuple[int, ...], Tensor] = {}

    def logits(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> Tensor:
        """Of the draft (V,) behind the tokens and the layer's own drafts, whose states are its own."""
        states = self._main(tokens)[:-1]  # h_1 .. h_T-1: one for each token but the first, to which it belongs
        ahead = list(tokens[1:])
        own = self._predict(states, ahead)
        for draft in drafts:
            states, ahead = torch.cat([states, own[-1:]]), [*ahead, draft]
            own = self._predict(states, ahead)
        with torch.inference_mode():
            return self._model.lm_head(own[-1])

    def _main(self, tokens: Sequence[int]) -> Tensor:
        """The model's states (T, C), as its head reads them."""
        if tuple(tokens) not in self._states:
            model = self._model.model
            with torch.inference_mode():
                x = self._through(model.embed_tokens(torch.tensor(tokens)), model.layers[:-1])
                self._states[tuple(tokens)] = model.norm(x)
        return self._states[tuple(tokens)]

    def _predict(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """The layer's states (T, C), as the head reads them."""
        with torch.inference_mode():
            embedded = self._model.model.embed_tokens(torch.tensor(tokens))
            both = torch.cat([self._norm(embedded, "enorm"), self._norm(states, "hnorm")], dim=-1)
            merged = both @ self._tensors[f"{self._layer}eh_proj.weight"].T
            return self._norm(self._through(merged, self._model.model.layers[-1:]), "shared_head.norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self._tensors[f"{self._layer}{name}.weight"]

    def _through(self, x: Tensor, layers: Any) -> Tensor:
        length = len(x)
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        rope = self._model.model.rotary_emb(x[None], torch.arange(length)[None])
        x = x[None]
        for layer in layers:
            x = layer(x, attention_mask=mask, position_embeddings=rope)
        return x[0]


# ------------------------------------------------------------------------------------------------------------ the layer


def draft(model: Decoder, cache: KVCache, start: int, tokens: Sequence[int]) -> Tensor:
    """The logits (V,) behind the tokens, which are those behind the places from `start` on."""
    places = torch.arange(start, start + len(tokens))
    batch = AttentionBatch(
        block_tables=BLOCK_TABLE[None],
        query_starts=[0, len(tokens)],
        context_lens=[start + len(tokens)],
        slots=BLOCK_TABLE[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE,
    )
    return model.draft(torch.tensor(tokens), places, batch, cache, torch.tensor([len(tokens) - 1]))[0]


@pytest.mark.parametrize("cut", [[22], [5, 9, 1, 7], [1] * 22], ids=["at once", "chunks", "token by token"])
def test_its_logits_are_those_of_the_published_formula(checkpoint: Path, naive: Naive, cut: list[int]) -> None:
    """In a cache full of NaN, of which it reads what the model and it have written."""
    model = load_with_heads(checkpoint)
    cache = cache_for(model)
    for start, stop in pairwise(accumulate(cut, initial=0)):
        step(model, cache, start, TOKENS[start:stop], [])
        ours = draft(model, cache, start, TOKENS[start + 1 : stop + 1])
        assert relative_error(ours, naive.logits(TOKENS[: stop + 1])) < ERROR_MAX


def test_behind_its_own_drafts_it_goes_on_by_its_own_states(checkpoint: Path, naive: Naive) -> None:
    model = load_with_heads(checkpoint)
    cache = cache_for(model)
    tokens, drafts = TOKENS[:18], TOKENS[18:21]
    step(model, cache, 0, tokens[:-1], [])
    draft(model, cache, 0, tokens[1:])
    for num in range(1, 4):
        ours = draft(model, cache, 16 + num, drafts[num - 1 : num])
        assert relative_error(ours, naive.logits(tokens, drafts[:num])) < ERROR_MAX


def test_with_it_the_model_is_the_same(checkpoint: Path) -> None:
    plain = load(checkpoint, OPS, weights="fp32", dtype=torch.float32)
    assert torch.equal(logits(load_with_heads(checkpoint), [TOKENS]), logits(plain, [TOKENS]))
    with pytest.raises(ValueError, match="loaded without it"):
        draft(plain, cache_for(plain), 0, TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_cache_with_states_takes_the_bytes_it_says(checkpoint: Path, dtype: torch.dtype) -> None:
    """Of a layer more, and of a state of 64 numbers for each token."""
    spec = load_with_heads(checkpoint).spec
    cache = KVCache.allocate(spec, NUM_BLOCKS, BLOCK_SIZE, dtype)
    assert cache.states is not None
    tensors = (*cache.keys, cache.states)  # the values are a part of the keys
    assert sum(tensor.nbytes for tensor in tensors) == NUM_BLOCKS * KVCache.bytes_per_block(spec, BLOCK_SIZE, dtype)
    assert len(cache.keys) == 3
    assert cache.states.shape == (NUM_BLOCKS, BLOCK_SIZE, 64)


def load_with_heads(checkpoint: Path) -> Decoder:
    return load(checkpoint, OPS, weights="fp32", dtype=torch.float32, draft_heads=True)


# ----------------------------------------------------------------------------------------------------------- the engine

PROMPTS = [
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58],
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 2, 71, 82, 81],  # four blocks as in the first
    [5],
]
# Chunks, cached prefixes, preemption, and blocks that change hands.
TIGHT: dict[str, Any] = {"cache_tokens": 112, "tokens_per_step_max": 16, "sequences_max": 4}


def engine(checkpoint: Path, **settings: Any) -> Core:
    torch.set_num_threads(1)
    return build(
        EngineConfig(**{"block_size": 4, "cache_tokens": 1024, "weights": "fp32", "drafts_max": 0, **settings}),
        checkpoint,
    )


def drafting(checkpoint: Path, **settings: Any) -> Core:
    return engine(checkpoint, **{"draft_heads": True, "drafts_max": 3, "draft_cost": 0.0, **settings})


def asked(num_tokens: int, temperature: float) -> list[Request]:
    sampling: dict[str, Any] = {"tokens_max": num_tokens, "temperature": temperature, "seed": 3}
    return [
        Request(id=0, prompt=tuple(PROMPTS[0]), sampling=Sampling(**sampling)),
        Request(id=1, prompt=tuple(PROMPTS[1]), sampling=Sampling(num_choices=3, **sampling)),
        Request(id=2, prompt=tuple(PROMPTS[2]), sampling=Sampling(frequency_penalty=0.7, **sampling)),
    ]


def run(core: Core, requests: list[Request]) -> tuple[dict[tuple[int, int], list[int]], list[Finished]]:
    outputs: dict[tuple[int, int], list[int]] = {}
    finished: list[Finished] = []
    for request in requests:
        core.submit(request)
    while core.has_work:
        result = core.step()
        finished += result.finished
        for token in result.tokens:
            outputs.setdefault((token.request, token.choice), []).append(token.token)
    return outputs, finished


@pytest.mark.parametrize(("temperature", "share_kept"), [(0.0, 0.5), (0.8, 0.25)])
def test_its_drafts_change_nothing_and_many_are_kept(tmp_path: Path, temperature: float, share_kept: float) -> None:
    path = foreseeing(tmp_path, by_states=0.0)
    plain, _ = run(engine(path), asked(40, temperature))
    outputs, finished = run(drafting(path, **TIGHT), asked(40, temperature))
    assert outputs == plain
    usages = [end.usage for end in finished]
    assert sum(usage.num_preemptions for usage in usages) > 0
    assert sum(usage.num_cached for usage in usages) > 0
    num_drafted, num_accepted = (sum(getattr(u, name) for u in usages) for name in ("num_drafted", "num_accepted"))
    assert share_kept * num_drafted < num_accepted < num_drafted


class Checked:
    """A drafter whose proposals are those of the formula, drawn by the numbers of their positions."""

    def __init__(self, drafter: Drafter, naive: Naive) -> None:
        self.drafter, self.naive, self.num_seen_behind = drafter, naive, drafter.num_seen_behind
        self.num_checked = self.num_deep = 0

    def can_draft(self, sequence: EngineSequence) -> bool:
        return self.drafter.can_draft(sequence)

    def propose(self, wanted: Mapping[EngineSequence, int]) -> Proposed:
        proposed = self.drafter.propose(wanted)
        for sequence, drafts in proposed.drafts.items():
            for num, own in enumerate(drafts):
                logits = self.naive.logits(sequence.tokens, drafts[:num])[None]
                row = row_of(sequence, len(sequence.tokens) + num)
                assert own == int(OPS.sample(logits, [row])), "it drafted by other states, tokens or numbers"
                self.num_checked += 1
                self.num_deep += num > 0
        return proposed


def row_of(sequence: EngineSequence, position: int) -> SamplingRow:
    sampling = sequence.request.sampling
    if not sampling.temperature:
        return GREEDY
    draw = uniform(sampling.seed, sequence.choice, position)
    return SamplingRow(temperature=sampling.temperature, top_k=0, top_p=1.0, min_p=0.0, uniform=draw)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_engine_drafts_by_the_formula_whatever_is_cut_shared_or_given_up(
    tmp_path: Path, temperature: float
) -> None:
    """Also behind drafts that were kept, whose states are the model's by then."""
    path = foreseeing(tmp_path, by_states=0.2)
    core = drafting(path, **TIGHT | {"cache_tokens": 80})
    core._drafting._drafter = checked = Checked(core._drafting._drafter, Naive(path, tmp_path))
    _, finished = run(core, asked(24, temperature)[:2])  # the third's penalties are not in the formula
    assert checked.num_deep > 50
    assert sum(end.usage.num_accepted for end in finished) > 0
    assert sum(end.usage.num_preemptions for end in finished) > 0


def test_a_prefix_is_drafted_from_without_computing_it_again(checkpoint: Path, naive: Naive) -> None:
    """The states are in its blocks, and so is what the layer made of them."""
    core = drafting(checkpoint, sequences_max=1)
    core._drafting._drafter = Checked(core._drafting._drafter, naive)
    computed = []
    for number in range(3):
        core.submit(Request(id=number, prompt=(*PROMPTS[0], number), sampling=Sampling(tokens_max=3)))
        charges = [charge for charge in charges_of(core) if charge.work is Work.DRAFTED]
        computed.append(sum(charge.num_tokens for charge in charges))
    # Of 28 tokens 24 are in blocks that are shared: behind the last of those stands a token that is the same too.
    assert computed[0] - computed[1] == computed[0] - computed[2] == 24


def charges_of(core: Core) -> list[Charge]:
    charges: list[Charge] = []
    while core.has_work:
        charges += core.step().charges
    return charges


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("name", "tensor", "because"),
    [
        ("enorm.weight", None, "enorm.weight is missing"),
        ("shared_head.norm.weight", None, "norm.weight is missing"),
        ("self_attn.o_proj.weight", None, "o_proj.weight is missing"),
        ("eh_proj.weight", torch.zeros(64, 64), r"eh_proj.weight has the shape \(64, 64\).*\(64, 128\)"),
        ("hnorm.weight", torch.zeros(64, dtype=torch.int8), "hnorm.weight is of type I8"),
    ],
)
def test_a_tensor_that_is_not_as_it_should_be_is_named_by_whoever_drafts(
    checkpoint: Path, tmp_path: Path, name: str, tensor: Tensor | None, because: str
) -> None:
    path = shutil.copytree(checkpoint, tmp_path / "damaged")
    tensors = load_file(path / "model.safetensors")
    del tensors[LAYER + name]
    save_file(tensors | ({} if tensor is None else {LAYER + name: tensor}), path / "model.safetensors")
    with pytest.raises(ModelError, match=f"tensor {LAYER}.*{because}"):
        load_with_heads(path)
    load(path, OPS, weights="fp32", dtype=torch.float32)


def test_a_model_without_such_a_layer_does_not_draft_by_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no layer for multi-token prediction"):
        drafting(tiny_llama(tmp_path))


@pytest.mark.parametrize("weights", [AUTO, "int8"])
def test_a_converted_folder_has_it_where_its_source_had(checkpoint: Path, tmp_path: Path, weights: str) -> None:
    convert(checkpoint, tmp_path / "new", weights)
    model = load(tmp_path / "new", OPS, weights=AUTO, dtype=torch.float32, draft_heads=True)
    source = load(checkpoint, OPS, weights=weights, dtype=torch.float32, draft_heads=True)
    ours, theirs = ((one, cache_for(one)) for one in (model, source))
    for one, cache in (ours, theirs):
        step(one, cache, 0, TOKENS[:-1], [])
    assert torch.equal(draft(*ours, 0, TOKENS[1:]), draft(*theirs, 0, TOKENS[1:]))
    assert torch.equal(
        logits(load(tmp_path / "new", OPS, weights=AUTO, dtype=torch.float32), [TOKENS]),
        logits(load(checkpoint, OPS, weights=weights, dtype=torch.float32), [TOKENS]),
    )
    convert(tiny_deepseek_v3(tmp_path, 1), tmp_path / "without", weights)
    with open_checkpoint(tmp_path / "without", draft_heads=None) as (spec, _):
        assert spec.draft_layers == ()


def test_in_blocks_of_fp8_it_is_read_and_known(tmp_path: Path) -> None:
    source = with_draft_layer(tiny_deepseek_v3(tmp_path, SEED), SEED)
    in_fp8, of_floats = (
        load(path, OPS, weights="fp32", dtype=torch.float32, draft_heads=True)
        for path in published("DeepSeek's blocks", tmp_path, source)
    )
    for one, cache in (ours := (in_fp8, cache_for(in_fp8)), theirs := (of_floats, cache_for(of_floats))):
        step(one, cache, 0, TOKENS[:-1], [])
    assert relative_error(draft(*ours, 0, TOKENS[1:]), draft(*theirs, 0, TOKENS[1:])) < ERROR_MAX
    load(tmp_path / "published", OPS, weights=AUTO, dtype=torch.float32)


def test_it_drafts_alone_and_for_one_rank() -> None:
    for settings, because in (
        ({"ranks": 2}, "draft_heads is set, and ranks is 2"),
        ({"draft_experts": 1}, "draft_experts and draft_heads are set"),
        ({"drafts_max": 0}, "draft_heads is set and drafts_max is 0"),
        ({"overlap": "on"}, "a model drafts"),
    ):
        with pytest.raises(EngineMisconfigured, match=because):
            EngineConfig(draft_heads=True, **settings)
