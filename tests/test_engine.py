"""The engine from end to end on tiny checkpoints: transformers' greedy tokens, however the work is cut and shared."""

import random
from pathlib import Path

import msgspec
import pytest
import torch

import engine.build as build_module
from engine import sampler
from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import EngineMisconfigured
from engine.loader import read_spec
from engine.types import Finished, FinishReason, Progress, Request, Sampling, Token
from tests.parity import ARCHITECTURE_SHAPES
from tests.tiny_models import (
    SHAPES,
    VOCAB_SIZE,
    tiny,
    tiny_llama,
    tiny_mixtral,
    transformers_greedy,
    transformers_logits,
)

pytestmark = pytest.mark.timeout(600)  # importing transformers alone has taken 90 s on two busy cores

NUM_TOKENS = 64

PROMPTS = [
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93, 75, 10, 58],
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 2, 71, 82, 81],  # 16 tokens as in the first
    [5],
    [8, 9, 8, 9, 8, 9, 8, 9],
]


# Every shape goes through the engine plainly and with all that cuts and shares its work; these also with each alone.
EACH_WAY = [
    *ARCHITECTURE_SHAPES,
    "llama, one key-value head, tied",
    "llama, llama3 rope",
    "mixtral, 8 experts, 3 chosen, tied",
    "mixtral, one chosen, odd hidden size",
]
each_way = pytest.mark.parametrize("shape", EACH_WAY, indirect=True)


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory) -> Path:
    """A checkpoint of each of the parity suite's shapes."""
    return tiny(request.param, tmp_path_factory.mktemp("model"), seed=7)


@pytest.fixture(scope="module")
def expected(shape) -> list[list[int]]:
    return transformers_greedy(shape, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """One checkpoint, for what does not hang on its shape."""
    return tiny_mixtral(tmp_path_factory.mktemp("model"), seed=7)


def engine(checkpoint: Path, **settings) -> Core:
    torch.set_num_threads(1)
    plain = {"block_size": 4, "cache_tokens": 1024, "weights": "fp32", "drafts_max": 0}
    return build(EngineConfig(**{**plain, **settings}), checkpoint)


def run(core: Core, *requests: Request) -> tuple[dict[tuple[int, int], list[Token]], dict[tuple[int, int], Finished]]:
    for request in requests:
        core.submit(request)
    outputs: dict[tuple[int, int], list[Token]] = {}
    finished: dict[tuple[int, int], Finished] = {}
    while core.has_work:
        result = core.step()
        for token in result.tokens:
            outputs.setdefault((token.request, token.choice), []).append(token)
        finished |= {(f.request, f.choice): f for f in result.finished}
    return outputs, finished


def greedy(core: Core) -> tuple[list[list[int]], list[Finished]]:
    """The four prompts, all at once."""
    sampling = Sampling(tokens_max=NUM_TOKENS)
    requests = [Request(id=number, prompt=tuple(prompt), sampling=sampling) for number, prompt in enumerate(PROMPTS)]
    outputs, finished = run(core, *requests)
    order = [(number, 0) for number in range(len(PROMPTS))]
    return [[token.token for token in outputs[choice]] for choice in order], [finished[choice] for choice in order]


def test_greedy_tokens_are_transformers_own(shape, expected):
    assert greedy(engine(shape))[0] == expected


@each_way
def test_one_at_a_time_they_are_the_same(shape, expected):
    assert greedy(engine(shape, sequences_max=1))[0] == expected


@each_way
@pytest.mark.parametrize("tokens_per_step_max", [4, 7])
def test_prompts_in_chunks_change_nothing(shape, expected, tokens_per_step_max):
    assert greedy(engine(shape, sequences_max=4, tokens_per_step_max=tokens_per_step_max))[0] == expected


@each_way
def test_a_cached_prefix_changes_nothing(shape, expected):
    core = engine(shape, sequences_max=1)
    greedy(core)
    tokens, finished = greedy(core)
    assert tokens == expected
    assert [f.usage.num_cached for f in finished] == [24, 16, 0, 4]  # all full blocks that leave a token to compute


@each_way
def test_preemption_changes_nothing(shape, expected):
    tokens, finished = greedy(engine(shape, cache_tokens=112))  # the longest alone needs 92
    assert tokens == expected
    assert sum(f.usage.num_preemptions for f in finished) > 0
    assert sum(f.usage.num_recomputed for f in finished) > 0


@each_way
def test_drafts_change_nothing(shape, expected):
    tokens, finished = greedy(engine(shape, drafts_max=4, draft_cost=0.0))
    assert tokens == expected
    assert sum(f.usage.num_drafted for f in finished) > sum(f.usage.num_accepted for f in finished) > 0


@each_way
def test_steps_ahead_change_nothing(shape, expected):
    tight = {"cache_tokens": 112, "tokens_per_step_max": 16, "sequences_max": 4}
    assert greedy(engine(shape, overlap="on", **tight))[0] == expected


def test_a_model_drafts_for_itself_with_one_expert_and_changes_nothing(shape, expected):
    if not has_experts(shape):
        with pytest.raises(EngineMisconfigured, match="draft_experts is 1; the model chooses 1 experts"):
            engine(shape, drafts_max=3, draft_experts=1)
        return
    settings = {"cache_tokens": 112, "tokens_per_step_max": 16, "sequences_max": 4}
    tokens, finished = greedy(engine(shape, drafts_max=3, draft_cost=0.0, draft_experts=1, **settings))
    assert tokens == expected
    assert sum(f.usage.num_drafted for f in finished) > sum(f.usage.num_accepted for f in finished) > 0


def has_experts(shape: Path) -> bool:
    return max(getattr(layer.feed_forward, "num_chosen", 1) for layer in read_spec(shape).layers) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", [{"draft_experts": 1}, {"draft_model": "another"}, {"draft_model": "itself"}])
def test_models_draft_and_change_nothing(checkpoint, tmp_path, drafter, temperature):
    """With choices, penalties, prompts in chunks, cached prefixes and preemption, drafting by another model."""
    if name := drafter.get("draft_model"):
        drafter = {"draft_model": checkpoint if name == "itself" else tiny_llama(tmp_path, num_hidden_layers=1)}
    tight = {"cache_tokens": 160, "tokens_per_step_max": 24, "sequences_max": 5, "drafts_max": 3, "draft_cost": 0.0}
    sampling = {"tokens_max": 40, "temperature": temperature, "seed": 3}
    asked = [
        Request(id=0, prompt=tuple(PROMPTS[0]), sampling=Sampling(**sampling)),
        Request(id=1, prompt=tuple(PROMPTS[1]), sampling=Sampling(num_choices=3, **sampling)),
        Request(id=2, prompt=tuple(PROMPTS[3]), sampling=Sampling(frequency_penalty=0.7, num_logprobs=1, **sampling)),
    ]
    plain = run(engine(checkpoint), *asked)[0]
    outputs, finished = run(engine(checkpoint, **tight, **drafter), *asked)
    assert {choice: [token.token for token in tokens] for choice, tokens in outputs.items()} == {
        choice: [token.token for token in tokens] for choice, tokens in plain.items()
    }
    usages = [end.usage for end in finished.values()]
    num_drafted, num_accepted = (sum(getattr(u, name) for u in usages) for name in ("num_drafted", "num_accepted"))
    assert num_drafted > 20
    assert sum(usage.num_preemptions for usage in usages) > 0
    # Drafts by another batch's sums: once in a while two tokens are all but equal.
    assert num_accepted > 0.95 * num_drafted if name == "itself" else num_accepted < num_drafted


def test_a_draft_models_cache_is_a_part_of_the_memory(checkpoint, monkeypatch):
    monkeypatch.setattr(build_module, "free_memory_bytes", lambda device: 1 << 20)
    alone = engine(checkpoint, cache_tokens=0).capacity.cache_tokens
    assert (
        engine(checkpoint, cache_tokens=0, drafts_max=1, draft_model=checkpoint).capacity.cache_tokens == alone // 8 * 4
    )
    assert engine(checkpoint, cache_tokens=0, drafts_max=1, draft_experts=1).capacity.cache_tokens == alone


def test_drafts_are_on_unless_steps_overlap(checkpoint):
    num_drafted = [
        sum(end.usage.num_drafted for end in greedy(engine(checkpoint, drafts_max=None, overlap=overlap))[1])
        for overlap in ("auto", "on")
    ]
    assert num_drafted[0] > num_drafted[1] == 0


def test_a_draft_model_of_another_vocabulary_is_refused(checkpoint, tmp_path):
    other = tiny_llama(tmp_path, vocab_size=96)
    with pytest.raises(EngineMisconfigured, match=r"a vocabulary of 96 tokens, the model one of 97"):
        engine(checkpoint, drafts_max=1, draft_model=other)


def test_all_at_once_they_change_nothing(shape, expected):
    settings = {"cache_tokens": 112, "tokens_per_step_max": 16, "sequences_max": 4, "drafts_max": 3, "draft_cost": 0.0}
    assert greedy(engine(shape, **settings))[0] == expected


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_in_a_batch_of_32_one_whose_logits_are_not_finite_fails_alone(checkpoint, monkeypatch, overlap):
    dice = random.Random(5)
    requests = [
        Request(
            id=number,
            prompt=tuple(dice.choices(range(2, VOCAB_SIZE), k=8)),
            sampling=Sampling(tokens_max=12, temperature=number % 2, seed=number),
        )
        for number in range(32)
    ]
    settings = {"sequences_max": 32, "tokens_per_step_max": 512, "overlap": overlap}
    clean, _ = run(engine(checkpoint, **settings), *requests)
    guilty, num_steps = 17, 0
    draw = sampler.draw

    def draw_spoilt(ops, logits, shares):
        nonlocal num_steps
        num_steps += 1
        rows = [share.sequence.request.id for share in shares for _ in range(share.num_rows)]
        if num_steps == 5:
            logits[rows.index(guilty), 3] = torch.nan
        return draw(ops, logits, shares)

    monkeypatch.setattr(sampler, "draw", draw_spoilt)
    outputs, finished = run(engine(checkpoint, **settings), *requests)
    assert [number for (number, _), end in finished.items() if end.reason is FinishReason.FAILED] == [guilty]
    assert len(outputs[guilty, 0]) == 4
    assert all(outputs[number, 0] == clean[number, 0] for number in range(32) if number != guilty)


WAYS = [{}, {"drafts_max": 3, "draft_cost": 0.0}, {"overlap": "on"}]


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(checkpoint, way):
    asked = Request(
        id=50,
        prompt=tuple(PROMPTS[3]),
        sampling=Sampling(tokens_max=40, temperature=0.8, top_k=20, top_p=0.95, seed=1234, num_choices=2),
    )
    beside = [
        Request(id=number, prompt=tuple(prompt), sampling=Sampling(tokens_max=30, temperature=1.0, seed=number))
        for number, prompt in enumerate(PROMPTS)
    ]
    alone = run(engine(checkpoint), asked)[0]
    tight = {"cache_tokens": 160, "tokens_per_step_max": 24, "sequences_max": 5}
    crowded = run(engine(checkpoint, **way, **tight), *beside, asked)[0]
    assert crowded[50, 0] == alone[50, 0]
    assert crowded[50, 1] == alone[50, 1]
    assert alone[50, 0] != alone[50, 1]


def own_logprobs(tokens: list[Token]) -> list[float]:
    return [token.logprob.logprob for token in tokens if token.logprob]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("way", WAYS)
def test_another_engine_goes_on_as_the_interrupted_one_would_have(checkpoint, temperature, way):
    """With the tokens, the random numbers and the log probabilities of an engine that nobody interrupted."""
    sampling = Sampling(tokens_max=40, temperature=temperature, seed=9, num_choices=2, num_logprobs=2)
    asked = Request(id=0, prompt=tuple(PROMPTS[3]), sampling=sampling)
    whole = run(engine(checkpoint), asked)[0]
    core = engine(checkpoint, **way)
    core.submit(asked)
    results = [core.step() for _ in range(9)]
    core.interrupt()
    results.append(core.step())
    before = {
        choice: [token for result in results for token in result.tokens if token.choice == choice] for choice in (0, 1)
    }
    progress = tuple(
        Progress(tokens=tuple(token.token for token in before[end.choice]), usage=end.usage)
        for end in results[-1].finished
    )
    other = engine(checkpoint, **way)
    after, finished = run(other, msgspec.structs.replace(asked, progress=progress))
    for choice in (0, 1):
        assert before[choice]
        assert after[0, choice]
        gone_on = [*before[choice], *after[0, choice]]
        assert [token.index for token in gone_on] == list(range(40))
        assert [token.token for token in gone_on] == [token.token for token in whole[0, choice]]
        # The cache is computed in other batches, whose sums are rounded otherwise: fp32 has 1e-7.
        assert own_logprobs(gone_on) == pytest.approx(own_logprobs(whole[0, choice]), abs=1e-4)
        assert finished[0, choice].usage.num_output == 40


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_are_those_of_the_tokens_and_come_in_order(checkpoint, way):
    sampling = Sampling(tokens_max=5, num_logprobs=3)
    tokens = run(engine(checkpoint, **way), Request(id=0, prompt=(1, 2, 3), sampling=sampling))[0][0, 0]
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0]  # greedy
        assert token.top_logprobs[0].token == token.token
        logprobs = [top.logprob for top in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert logprobs[0] < 0


CUTS = [
    {},
    {"tokens_per_step_max": 7, "sequences_max": 4},
    {"cache_tokens": 112},
    {"drafts_max": 3, "draft_cost": 0.0, "draft_experts": 1},
    {"overlap": "on", "tokens_per_step_max": 9, "sequences_max": 4},
]


@pytest.mark.parametrize("cuts", CUTS)
def test_a_prompts_logprobs_are_transformers_own_however_the_work_is_cut(checkpoint, cuts):
    """Whole or in chunks, behind a cached prefix, preempted, beside others that draft."""
    core = engine(checkpoint, **cuts)
    for _ in range(2):
        requests = [
            Request(
                id=number,
                prompt=tuple(prompt),
                sampling=Sampling(tokens_max=30, num_prompt_logprobs=number % 3, num_choices=1 + number % 2),
            )
            for number, prompt in enumerate(PROMPTS)
        ]
        scored: dict[int, list] = {number: [] for number in range(len(PROMPTS))}
        for request in requests:
            core.submit(request)
        while core.has_work:
            for one in core.step().scored:
                scored[one.request] += one.logprobs
        for number, prompt in enumerate(PROMPTS):
            expected = transformers_logits(checkpoint, prompt).log_softmax(-1)
            assert [own.token for own, _ in scored[number]] == prompt[1:]
            theirs = expected[range(len(prompt) - 1), prompt[1:]].tolist()
            assert [own.logprob for own, _ in scored[number]] == pytest.approx(theirs, abs=1e-4)
            likeliest = expected[:-1].topk(number % 3).values.tolist()
            ours = [[one.logprob for one in top] for _, top in scored[number]]
            assert torch.tensor(ours).flatten().tolist() == pytest.approx(
                torch.tensor(likeliest).flatten().tolist(), abs=1e-4
            )


def test_only_who_asks_gets_logprobs(checkpoint):
    outputs, _ = run(
        engine(checkpoint),
        Request(id=0, prompt=(1, 2, 3), sampling=Sampling(tokens_max=4)),
        Request(id=1, prompt=(1, 2, 3), sampling=Sampling(tokens_max=4, num_logprobs=0)),
        Request(id=2, prompt=(1, 2, 3), sampling=Sampling(tokens_max=4, num_logprobs=2)),
    )
    assert [token.logprob is None for token in outputs[0, 0]] == [True] * 4
    assert [len(token.top_logprobs) for token in outputs[1, 0]] == [0] * 4
    assert [len(token.top_logprobs) for token in outputs[2, 0]] == [2] * 4


def test_the_capacity_is_the_models_within_the_cache(checkpoint):
    small, large = engine(checkpoint, cache_tokens=64), engine(checkpoint, cache_tokens=4096)
    assert (small.capacity.context_max, large.capacity.context_max) == (64, 512)
    assert small.capacity.vocab_size == VOCAB_SIZE


def test_the_cache_is_sized_by_memory_but_never_beyond_use(checkpoint):
    assert engine(checkpoint, cache_tokens=0, sequences_max=3).capacity.cache_tokens == 3 * 512


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"context_max": 600}, "512"),
        ({"context_max": 500, "cache_tokens": 64}, "raise cache_tokens"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"cache_tokens": 0, "cache_memory_share": 1e-12}, "one block takes"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_refused(checkpoint, settings, why):
    with pytest.raises(EngineMisconfigured, match=why):
        engine(checkpoint, **settings)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"block_size": 0}, "block_size"),
        ({"cache_tokens": 100}, "take 112"),
        ({"sequences_max": 600}, "tokens_per_step_max"),
        ({"draft_experts": -1}, "draft_experts"),
        ({"draft_experts": 1, "draft_model": Path("x")}, "draft_experts and draft_model are set"),
        ({"draft_experts": 1, "drafts_max": 0}, "nothing would be drafted"),
        ({"draft_experts": 1, "overlap": "on"}, "a model drafts"),
        ({"drafts_max": -1}, "drafts_max"),
        ({"cache_memory_share": 1.0}, "cache_memory_share"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, why):
    with pytest.raises(EngineMisconfigured, match=why):
        EngineConfig(**settings)
