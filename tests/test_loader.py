"""A folder is loaded whole and unharmed, or refused by name."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ModelError
from engine.loader import INDEX_BYTES_MAX, load, read_spec
from engine.models import Decoder
from kernels.ops import Ops, WeightKernel
from kernels.reference import OPS
from tests.parity import TOKENS, logits
from tests.tiny_models import tiny, tiny_llama, tiny_mixtral, with_draft_layer

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("pristine"), 1)


@pytest.fixture
def llama(pristine: Path, tmp_path: Path) -> Path:
    """A copy of one Llama folder, to be spoilt."""
    return shutil.copytree(pristine, tmp_path / "llama")


class TestWeightFormats:
    def test_a_format_that_the_backend_lacks_is_unpacked_and_multiplied(self, llama: Path) -> None:
        dense_only = {name: kernel for name, kernel in OPS.weights.items() if name in {"fp32", "bf16"}}
        unpacked = load(llama, _with_weights(dense_only), weights="int8", dtype=torch.float32)
        packed = load(llama, OPS, weights="int8", dtype=torch.float32)
        assert torch.equal(logits(unpacked, [TOKENS]), logits(packed, [TOKENS]))

    def test_a_matrix_that_int4_cannot_group_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"attention.query.*multiple of 32"):
            load(tiny_llama(tmp_path, hidden_size=48), OPS, weights="int4", dtype=torch.float32)

    def test_an_unknown_format_or_dtype_is_refused(self, llama: Path) -> None:
        with pytest.raises(ModelError, match=r"int3.*auto, fp32, bf16, int8"):
            load(llama, OPS, weights="int3", dtype=torch.float32)
        with pytest.raises(ModelError, match="float16"):
            load(llama, OPS, weights="fp32", dtype=torch.float16)


class TestFolders:
    def test_shards_load_as_one_file_does(self, llama: Path) -> None:
        whole = logits(_load(llama), [TOKENS])
        _shard(llama)
        assert torch.equal(logits(_load(llama), [TOKENS]), whole)

    def test_progress_reaches_every_byte(self, llama: Path) -> None:
        heard: list[tuple[int, int]] = []
        load(llama, OPS, weights="fp32", dtype=torch.float32, progress=lambda *bytes_: heard.append(bytes_))
        tensors = load_file(llama / "model.safetensors")
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert len(heard) == len(tensors)
        assert heard == sorted(heard)
        assert heard[-1] == (total, total)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone tells what is mapped")
    def test_no_file_is_mapped_while_it_is_read(self, llama: Path) -> None:
        """Mapped pages count as ours: with them, loading took up to 3.4 times the weights."""
        mapped: list[bool] = []

        def progress(_done: int, _total: int) -> None:
            mapped.append(str(llama) in Path("/proc/self/maps").read_text())

        load(llama, OPS, weights="int8", dtype=torch.float32, progress=progress)
        assert mapped
        assert not any(mapped)

    def test_the_model_outlives_its_folder(self, llama: Path) -> None:
        """Its weights are copies: a file cut short under a running model would kill the process."""
        model = _load(llama)
        before = logits(model, [TOKENS])
        (llama / "model.safetensors").write_bytes(b"")
        assert torch.equal(logits(model, [TOKENS]), before)

    def test_generation_config_has_the_last_word_on_what_ends_an_answer(self, llama: Path) -> None:
        (llama / "generation_config.json").unlink()
        assert read_spec(llama).eos_token_ids == (1,)
        (llama / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
        assert read_spec(llama).eos_token_ids == (3, 4)

    def test_leftovers_that_mean_nothing_are_ignored(self, tmp_path: Path) -> None:
        llama = tiny_llama(tmp_path, tie_word_embeddings=True)
        before = logits(_load(llama), [TOKENS])
        embedding = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
        _rewrite(llama, {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
        assert torch.equal(logits(_load(llama), [TOKENS]), before)

    def test_a_layer_for_multi_token_prediction_is_known_and_changes_nothing(self, tmp_path: Path) -> None:
        path = tiny("deepseek-v3", tmp_path)
        before = logits(_load(path), [TOKENS])
        with_draft_layer(path)
        assert torch.equal(logits(_load(path), [TOKENS]), before)
        assert len(read_spec(path).draft_layers) == 0
        _rewrite(path, {"model.layers.3.enorm.weight": torch.ones(64)})  # of a second one, which the config has not
        _refused(path, r"tensor model.layers.3.enorm.weight and 0 others")


class TestDamagedFolders:
    def test_a_missing_tensor_is_named(self, llama: Path) -> None:
        _rewrite(llama, {GATE: None})
        _refused(llama, f"{GATE} is missing")

    def test_a_surplus_tensor_is_named(self, llama: Path) -> None:
        _rewrite(llama, {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)})
        _refused(llama, "q_norm.weight")

    def test_a_misshapen_tensor_is_named_with_both_shapes(self, llama: Path) -> None:
        _rewrite(llama, {GATE: torch.zeros(64, 96)})
        _refused(llama, rf"{GATE}.*\(64, 96\).*\(96, 64\)")

    def test_a_tensor_of_all_experts_is_named_with_both_shapes(self, tmp_path: Path) -> None:
        gpt_oss = tiny("gpt-oss", tmp_path)
        name = "model.layers.1.mlp.experts.gate_up_proj"
        _rewrite(gpt_oss, {name: torch.zeros(5, 64, 192)})
        _refused(gpt_oss, rf"{name} has the shape \(5, 64, 192\).*\(6, 64, 192\)")

    def test_a_tensor_that_is_no_float_is_named(self, llama: Path) -> None:
        _rewrite(llama, {GATE: torch.zeros(96, 64, dtype=torch.int8)})
        _refused(llama, f"{GATE}.*I8")

    def test_a_file_that_shrinks_while_it_is_read_is_named(self, llama: Path) -> None:
        file = llama / "model.safetensors"

        def shrink(_done: int, _total: int) -> None:
            os.truncate(file, 5000)

        with pytest.raises(ModelError, match=r"model.safetensors has become shorter"):
            load(llama, OPS, weights="fp32", dtype=torch.float32, progress=shrink)

    def test_a_missing_file_is_named(self, llama: Path) -> None:
        (llama / "model.safetensors").unlink()
        _refused(llama, "model.safetensors is missing")
        (llama / "config.json").unlink()
        _refused(llama, "config.json")

    def test_a_missing_shard_is_named(self, llama: Path) -> None:
        _shard(llama)
        (llama / "b.safetensors").unlink()
        _refused(llama, "b.safetensors is missing")


class TestHostileFolders:
    @pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
    def test_a_truncated_file(self, llama: Path, length: int) -> None:
        weights = llama / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:length])
        _refused(llama, "model.safetensors")

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 1])
    def test_a_header_length_that_lies(self, llama: Path, length: int) -> None:
        weights = llama / "model.safetensors"
        weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
        _refused(llama, "model.safetensors")

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [97, 48], "data_offsets": [0, 2**62]},
            {"dtype": "F32", "shape": [97, 48], "data_offsets": [97 * 48 * 4, 0]},
            {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 97 * 48 * 4]},
            {"dtype": "F32", "shape": [97, -48], "data_offsets": [0, 97 * 48 * 4]},
            {"dtype": "pickle", "shape": [97, 48], "data_offsets": [0, 97 * 48 * 4]},
        ],
        ids=["beyond the file", "backwards", "shape overflows", "negative size", "unknown type"],
    )
    def test_a_header_entry_that_lies(self, llama: Path, entry: dict[str, Any]) -> None:
        header = json.dumps({"lm_head.weight": entry}).encode()
        data = bytes(97 * 48 * 4)
        (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
        _refused(llama, "model.safetensors")

    def test_two_tensors_in_one_place(self, llama: Path) -> None:
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
        header = json.dumps({"lm_head.weight": entry, "model.norm.weight": entry}).encode()
        (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        _refused(llama, "model.safetensors")

    @pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "a/b.safetensors"])
    def test_an_index_that_points_out_of_the_folder(self, llama: Path, name: str) -> None:
        _write_index(llama, {"lm_head.weight": name})
        _refused(llama, "is not a file of this folder")

    def test_an_index_of_endless_length(self, llama: Path) -> None:
        with (llama / "model.safetensors.index.json").open("wb") as index:
            index.truncate(INDEX_BYTES_MAX + 1)
        _refused(llama, "longer than")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{",
            '{"architectures": 3}',
            '{"architectures": [["x"]]}',
            "[" * 100_000,
            '{"a": ' * 100_000,
            "\xff",
            '{"\xd9": 1}',
        ],
        ids=["empty", "a list", "cut", "number", "nested", "bomb of lists", "of objects", "not UTF-8", "not in a name"],
    )
    def test_a_config_that_is_none(self, llama: Path, text: str) -> None:
        (llama / "config.json").write_text(text, encoding="latin-1")
        _refused(llama)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", 2.5),
            ("hidden_size", -48),
            ("hidden_size", "48"),
            ("vocab_size", 2**70),
            ("rms_norm_eps", -1.0),
            ("num_key_value_heads", 3),
            ("head_dim", 7),
            ("hidden_act", "gelu"),
            ("sliding_window", 128),
            ("mlp_bias", True),
            ("eos_token_id", [1] * 1000),
            ("quantization_config", {"quant_method": "bitsandbytes"}),
            ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
            ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}),
            ("rope_parameters", {"rope_type": "yarn", "beta_fast": 2.0, "beta_slow": 2.0}),
            ("rope_parameters", {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0}),
            ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ],
    )
    def test_a_field_out_of_bounds_or_beyond_us_is_named(self, llama: Path, field: str, value: object) -> None:
        config = json.loads((llama / "config.json").read_text())
        (llama / "config.json").write_text(json.dumps(config | {field: value}))
        named = "rope|freq_factor|rotary|beta_" if field == "rope_parameters" else field
        _refused(llama, f"config.json.*({named})")

    @pytest.mark.parametrize(
        ("shape", "field", "value"),
        [
            ("qwen3", "use_sliding_window", True),
            ("qwen2-moe", "use_sliding_window", True),
            ("qwen3-moe", "use_sliding_window", True),
            ("qwen3-moe", "num_local_experts", None),
            ("olmoe", "clip_qkv", 8.0),
            ("gpt-oss", "layer_types", ["full_attention"]),
            ("gpt-oss", "layer_types", ["chunked_attention"] * 2),
            ("deepseek-v2", "moe_layer_freq", 2),
            ("deepseek-v2", "norm_topk_prob", True),
            ("deepseek-v2", "scoring_func", "sigmoid"),
            ("deepseek-v2", "topk_method", "noaux_tc"),
            ("deepseek-v2", "n_group", 5),
            ("deepseek-v2", "topk_group", 5),
            ("deepseek-v2", "num_experts_per_tok", 7),
            ("deepseek-v2", "num_key_value_heads", 2),
            ("deepseek-v2", "attention_bias", True),
            ("deepseek-v2", "qk_rope_head_dim", 7),
            ("deepseek-v3", "scoring_func", "softmax"),
            ("deepseek-v3", "topk_method", "group_limited_greedy"),
            ("deepseek-v3", "n_group", 5),
            ("deepseek-v3", "rope_interleave", False),
            ("deepseek-v3", "num_nextn_predict_layers", 17),
            ("gpt-oss", "rope_parameters", None),
        ],
    )
    def test_what_an_architecture_knows_and_we_do_not_is_named(
        self, tmp_path: Path, shape: str, field: str, value: object
    ) -> None:
        path = tiny(shape, tmp_path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {field: value}))
        _refused(path, f"config.json.*{field}")

    def test_an_unknown_architecture_is_named_with_the_known_ones(self, llama: Path) -> None:
        (llama / "config.json").write_text('{"architectures": ["GPT5ForCausalLM"]}')
        _refused(llama, "GPT5ForCausalLM.*LlamaForCausalLM.*MixtralForCausalLM")

    def test_more_experts_chosen_than_there_are(self, tmp_path: Path) -> None:
        mixtral = tiny_mixtral(tmp_path)
        config = json.loads((mixtral / "config.json").read_text())
        (mixtral / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
        _refused(mixtral, "5 chosen experts")


def _load(path: Path) -> Decoder:
    return load(path, OPS, weights="fp32", dtype=torch.float32)


def _refused(path: Path, because: str | None = None) -> None:
    with pytest.raises(ModelError, match=because):
        _load(path)


def _with_weights(weights: Mapping[str, WeightKernel]) -> Ops:
    return replace(OPS, weights=weights)


def _rewrite(path: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of the folder's one weight file."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | dict(changes)
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, file)


def _shard(path: Path) -> None:
    """Splits the folder's one weight file in two and an index."""
    tensors = load_file(path / "model.safetensors")
    weight_map = {name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, path / file)
    (path / "model.safetensors").unlink()
    _write_index(path, weight_map)


def _write_index(path: Path, weight_map: dict[str, str]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
