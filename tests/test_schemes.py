"""A checkpoint in a published layout is the weights that it stands for, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import ModelError
from engine.loader import load, open_checkpoint
from engine.models.layers import AUTO
from engine.models.parameters import Parameter, parameters
from kernels.reference import OPS
from tests.parity import ERROR_MAX, TOKENS, logits, relative_error
from tests.published import LAYOUTS, published, published_mxfp4, set_config, write_weights

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1"  # transformers' name for Mixtral's gate


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    torch.set_num_threads(1)
    return request.param, *published(request.param, tmp_path_factory.mktemp("published"))


def model_logits(folder: Path, weights: str) -> torch.Tensor:
    return logits(load(folder, OPS, weights=weights, dtype=torch.float32), [TOKENS])


def kept_layouts(folder: Path) -> set[str]:
    with open_checkpoint(folder) as (spec, checkpoint):
        matrices = [
            each for each in parameters(spec) if each.role in ("attention.output", "expert.gate", "expert.down")
        ]
        return {checkpoint.take(each).layout for each in matrices}


def test_a_published_layout_stands_for_the_weights_of_its_definition(pair: tuple[str, Path, Path]) -> None:
    _, folder, floats = pair
    assert torch.equal(model_logits(folder, "fp32"), model_logits(floats, "fp32"))


def test_it_is_kept_as_published_where_we_have_such_a_format(pair: tuple[str, Path, Path]) -> None:
    """A zero point is stored as a value, so that a weight of int4 may be rounded once more in fp32."""
    name, folder, floats = pair
    assert kept_layouts(folder) == {LAYOUTS[name].kept}
    assert relative_error(model_logits(folder, AUTO), model_logits(floats, "fp32")) < ERROR_MAX


def test_each_of_its_tensors_is_named_where_it_is_missing_or_misshapen(
    pair: tuple[str, Path, Path], tmp_path: Path
) -> None:
    _, folder, _ = pair
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    (spoilt / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    optional = ("g_idx", "weight_shape", "weight_zero_point")
    needed = [one for one in tensors if one.startswith(f"{EXPERT}.") and not one.endswith(optional)]
    assert len(needed) >= 2
    for one in needed:
        write_weights(spoilt, {other: tensor for other, tensor in tensors.items() if other != one})
        with pytest.raises(ModelError, match=EXPERT):
            model_logits(spoilt, AUTO)
        write_weights(spoilt, tensors | {one: torch.zeros(3, 5, dtype=tensors[one].dtype)})
        with pytest.raises(ModelError, match=rf"{one} has the shape \(3, 5\)"):
            model_logits(spoilt, AUTO)
        write_weights(spoilt, tensors | {one: tensors[one].to(torch.float64)})
        with pytest.raises(ModelError, match=EXPERT):
            model_logits(spoilt, AUTO)


def test_what_a_scheme_leaves_alone_stays_as_it_is(tmp_path: Path) -> None:
    """One of three matrices that we multiply by at once: they become floats together."""
    folder, floats = published("awq", tmp_path)
    matrix = "model.layers.0.self_attn.k_proj"
    tensors = load_file(folder / "model.safetensors")
    plain = {f"{matrix}.weight": load_file(floats / "model.safetensors")[f"{matrix}.weight"]}
    write_weights(folder, {one: tensors[one] for one in tensors if not one.startswith(matrix)} | plain)
    assert relative_error(model_logits(folder, AUTO), model_logits(floats, "fp32")) < ERROR_MAX


def test_experts_kept_in_several_ways_are_refused_unless_a_format_is_named(tmp_path: Path) -> None:
    folder, floats = published("awq", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    plain = {f"{EXPERT}.weight": load_file(floats / "model.safetensors")[f"{EXPERT}.weight"]}
    write_weights(folder, {one: tensors[one] for one in tensors if not one.startswith(EXPERT)} | plain)
    with pytest.raises(ModelError, match="experts of layer 1 are kept as fp32 and int4"):
        model_logits(folder, AUTO)
    assert torch.equal(model_logits(folder, "fp32"), model_logits(floats, "fp32"))


def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder, _ = published("gptq, by activation", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for group in (2, -1):  # of two, 0 and 1
        tensors[f"{EXPERT}.g_idx"][7] = group
        write_weights(folder, tensors)
        with pytest.raises(ModelError, match=rf"{EXPERT}.*groups other than 0 .. 1"):
            model_logits(folder, AUTO)


def test_biases_of_a_model_without_any_are_ignored_where_they_are_zero(tmp_path: Path) -> None:
    folder, floats = published("gptq", tmp_path)
    tensors = load_file(folder / "model.safetensors") | {f"{EXPERT}.bias": torch.zeros(96)}
    write_weights(folder, tensors)
    assert torch.equal(model_logits(folder, "fp32"), model_logits(floats, "fp32"))
    tensors[f"{EXPERT}.bias"][40] = 1e-3
    write_weights(folder, tensors)
    with pytest.raises(ModelError, match=rf"{EXPERT}.bias.*belong to no part"):
        model_logits(folder, AUTO)


@pytest.mark.parametrize("name", ["gptq", "awq", "W4A16", "FP8", "DeepSeek's blocks"])
def test_a_vector_is_never_taken_for_a_matrix(tmp_path: Path, name: str) -> None:
    folder, _ = published(name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for end in ("qweight", "weight_packed"):
        write_weights(folder, tensors | {f"model.norm.{end}": torch.zeros(64, 8, dtype=torch.int32)})
        with pytest.raises(ModelError, match=rf"model.norm.{end} and 0 others belong to no part"):
            model_logits(folder, AUTO)
    write_weights(folder, tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)})
    with pytest.raises(ModelError, match=r"model.norm.weight is of type F8_E4M3"):
        model_logits(folder, AUTO)


def test_scales_of_activations_change_nothing(tmp_path: Path) -> None:
    folder, floats = published("fp8, a scale for all", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    matrices = [one for one in tensors if ".experts." in one and one.endswith(".weight")]
    scales = {one.removesuffix("weight") + "input_scale": torch.ones(()) for one in matrices}
    write_weights(folder, tensors | scales)
    assert torch.equal(model_logits(folder, "fp32"), model_logits(floats, "fp32"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return published_mxfp4(tmp_path_factory.mktemp("mxfp4"))


class TestMxfp4:
    def test_it_stands_for_the_weights_of_its_definition(self, gpt_oss: tuple[Path, Path]) -> None:
        folder, floats = gpt_oss
        assert torch.equal(model_logits(folder, "fp32"), model_logits(floats, "fp32"))
        assert torch.equal(model_logits(folder, AUTO), model_logits(floats, "fp32"))
        with open_checkpoint(folder) as (_, checkpoint):
            assert checkpoint.take(Parameter("expert.up", 1, 3)).layout == "mxfp4"

    def test_transformers_takes_it_for_the_same(self, gpt_oss: tuple[Path, Path]) -> None:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        name = "model.layers.1.mlp.experts.gate_up_proj"
        tensors, expected = (load_file(each / "model.safetensors") for each in gpt_oss)
        theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        assert torch.equal(theirs.float(), expected[name])

    def test_progress_reaches_every_byte(self, gpt_oss: tuple[Path, Path]) -> None:
        heard: list[tuple[int, int]] = []
        load(gpt_oss[0], OPS, weights=AUTO, dtype=torch.float32, progress=lambda *of: heard.append(of))
        assert heard[-1][0] == heard[-1][1]
        total = sum(tensor.nbytes for tensor in load_file(gpt_oss[0] / "model.safetensors").values())
        assert heard[-1][1] == total


# Layout, field of quantization_config, value, what the refusal names.
REFUSED: list[tuple[str, str, Any, str]] = [
    ("gptq", "quant_method", "quip", "quip.*awq, compressed-tensors, fp8, gptq, mxfp4"),
    ("gptq", "quant_method", 4, "quant_method 4"),
    ("gptq", "bits", 3, "bits 3"),
    ("gptq", "bits", "4", "bits"),
    ("gptq", "group_size", 0, "group_size 0"),
    ("gptq", "checkpoint_format", "marlin", "marlin.*checkpoint_format"),
    ("gptq", "dynamic", {"-:.*attn.*": {}}, "dynamic"),
    ("awq", "version", "gemv", "gemv.*version"),
    ("awq", "zero_point", False, "zero_point"),
    ("awq", "bits", 8, "bits"),
    ("gptq", "rotation", "hadamard", "rotation"),
    ("awq", "rotation", "hadamard", "rotation"),
    ("DeepSeek's blocks", "weight_block_size", [64, 64], r"weight_block_size \[64, 64\]"),
    ("DeepSeek's blocks", "fmt", "e5m2", "e5m2.*fmt"),
    ("DeepSeek's blocks", "scale_fmt", "fp4", "scale_fmt"),
    ("W4A16", "format", "marlin-24", "marlin-24.*format"),
    ("W4A16", "config_groups", {"g": {"weights": {"num_bits": 4, "type": "float"}}}, "floats of 4 bits"),
    ("W4A16", "config_groups", {"g": {"weights": {"num_bits": 3}}}, "num_bits"),
    ("W4A16", "config_groups", {"g": {"weights": {"num_bits": 4, "rotate": 1}}}, "rotate"),
    ("W4A16", "config_groups", {"g": {"weights": {"num_bits": 8, "strategy": "block"}}}, "blocks of integers"),
    ("W4A16", "sparsity_config", {"format": "sparse-24-bitmask"}, "sparse-24-bitmask"),
    ("W4A16", "transform_config", {"config_groups": {"u": {}}}, "transform_config"),
    ("W4A16", "quantization_status", "frozen", "frozen.*quantization_status"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: published(name, tmp_path_factory.mktemp("some"))[0] for name in {name for name, *_ in REFUSED}}


class TestConfigurations:
    @pytest.mark.parametrize(("name", "field", "value", "named"), REFUSED)
    def test_what_we_do_not_compute_is_named(
        self, folders: dict[str, Path], name: str, field: str, value: object, named: str
    ) -> None:
        set_config(folders[name], quantization_config=LAYOUTS[name].config | {field: value})
        with pytest.raises(ModelError, match=rf"config.json.*{named}"):
            model_logits(folders[name], AUTO)

    def test_a_quantized_checkpoint_that_does_not_say_so_is_refused(self, folders: dict[str, Path]) -> None:
        set_config(folders["awq"], quantization_config=None)
        with pytest.raises(ModelError, match="is missing"):
            model_logits(folders["awq"], AUTO)
