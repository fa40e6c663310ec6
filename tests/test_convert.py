"""A converted checkpoint is the model that its source is in that format, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import convert as conversion
from engine.convert import convert
from engine.errors import ModelError
from engine.loader import load, read_spec
from engine.models.layers import AUTO
from engine.models.parameters import Parameter, has_format, parameters
from engine.quant import FORMATS
from kernels.backends import pick
from tests.parity import ARCHITECTURE_SHAPES, TOKENS, kept_in_a_format, logits
from tests.published import published, published_mxfp4, set_config
from tests.tiny_models import tiny, tiny_llama
from worker.cli import main
from worker.errors import Misconfigured


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny("mixtral, 8 experts, 3 chosen, tied", tmp_path_factory.mktemp("mixtral"))


def model_logits(folder: Path, weights: str, table: str = "reference") -> torch.Tensor:
    return logits(load(folder, pick("cpu", table), weights=weights, dtype=torch.float32), [TOKENS])


@pytest.mark.parametrize("table", ["reference", "cpu"])
@pytest.mark.parametrize("weights", FORMATS)
def test_it_has_the_logits_of_its_source_in_the_format(mixtral: Path, tmp_path: Path, weights: str, table: str) -> None:
    convert(mixtral, tmp_path / "new", weights)
    assert torch.equal(model_logits(tmp_path / "new", AUTO, table), model_logits(mixtral, weights, table))


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v2", "deepseek-v3", "qwen2-moe", "mistral"])
def test_so_has_every_kind_of_model(tmp_path: Path, name: str) -> None:
    source = tiny(name, tmp_path)
    convert(source, tmp_path / "new", "int4")
    assert torch.equal(model_logits(tmp_path / "new", AUTO), model_logits(source, "int4"))
    assert read_spec(tmp_path / "new") == read_spec(source)


@pytest.mark.parametrize("weights", [AUTO, "int8"])
@pytest.mark.parametrize("name", ["gptq", "gptq, by activation", "W8A8", "DeepSeek's blocks"])
def test_what_others_have_quantized_can_be_converted(tmp_path: Path, name: str, weights: str) -> None:
    source, _ = published(name, tmp_path)
    convert(source, tmp_path / "new", weights)
    assert torch.equal(model_logits(tmp_path / "new", AUTO), model_logits(source, weights))


def test_gpt_oss_stays_in_its_sixteen_numbers(tmp_path: Path) -> None:
    source, _ = published_mxfp4(tmp_path)
    convert(source, tmp_path / "new", AUTO)
    assert torch.equal(model_logits(tmp_path / "new", AUTO), model_logits(source, AUTO))
    layouts = {name.split(".")[-2] for name in load_file(tmp_path / "new/model-00001.safetensors")}
    assert layouts == {"mxfp4", "plain"}


def test_it_can_be_loaded_in_another_format_and_be_converted_again(mixtral: Path, tmp_path: Path) -> None:
    convert(mixtral, tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "int8", "int8")
    assert torch.equal(model_logits(tmp_path / "int8", AUTO), model_logits(tmp_path / "bf16", "int8"))


def test_it_is_as_small_as_its_format(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path, hidden_size=256, intermediate_size=512, vocab_size=97)
    convert(source, tmp_path / "new", "int4-g128")
    tensors = load_file(tmp_path / "new/model-00001.safetensors")
    num_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if ".int4." in name)
    matrices = [shape for each, shape in parameters(read_spec(source)).items() if has_format(each, shape)]
    num_weights = sum(out * into for out, into in matrices) - 97 * 256  # but the head, which is int8
    assert num_bytes == num_weights * FORMATS["int4-g128"].bits / 8


def test_it_is_cut_into_files_that_an_index_names(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "SHARD_BYTES", 50_000)
    convert(mixtral, tmp_path / "new", "int8")
    files = sorted(tmp_path.glob("new/*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 60_000 for file in files)
    index = json.loads((tmp_path / "new/model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in files}
    assert torch.equal(model_logits(tmp_path / "new", AUTO), model_logits(mixtral, "int8"))


def test_the_tokenizers_files_go_along(mixtral: Path, tmp_path: Path) -> None:
    (mixtral / "tokenizer.json").write_text('{"model": 1}')
    (mixtral / "chat_template.jinja").write_text("{{ messages }}")
    (mixtral / "pytorch_model.bin").write_bytes(b"pickle")
    convert(mixtral, tmp_path / "new", "int8")
    assert (tmp_path / "new/tokenizer.json").read_text() == '{"model": 1}'
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names >= {"chat_template.jinja", "generation_config.json"}
    assert "pytorch_model.bin" not in names
    assert "model.safetensors" not in names


def test_progress_reaches_the_end(mixtral: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    convert(mixtral, tmp_path / "new", "int8", lambda *of: heard.append(of))
    assert heard[-1][0] == heard[-1][1]


def test_what_was_interrupted_is_no_model(mixtral: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(mixtral, tmp_path / "new", "int8", interrupt)
    with pytest.raises(ModelError, match=r"config\.json"):
        model_logits(tmp_path / "new", AUTO)


def test_nothing_is_overwritten(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="no empty folder"):
        convert(mixtral, tmp_path / "new", "int8")
    with pytest.raises(ModelError, match="no empty folder"):
        convert(mixtral, tmp_path / "new/notes.txt", "int8")
    with pytest.raises(ModelError, match="int3"):
        convert(mixtral, tmp_path / "other", "int3")


def test_a_matrix_that_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path, hidden_size=48)
    with pytest.raises(ModelError, match=r"attention.query.*multiple of 32"):
        convert(source, tmp_path / "new", "int4")


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8", "mxfp4", "bf16"])
def test_a_part_that_is_missing_or_misshapen_is_named(mixtral: Path, tmp_path: Path, weights: str) -> None:
    convert(mixtral, tmp_path / "new", weights)
    file = tmp_path / "new/model-00001.safetensors"
    tensors = load_file(file)
    parts = [name for name in tensors if name.startswith("expert.gate.1.2.")]
    assert len(parts) >= (1 if weights == "bf16" else 2)
    for part in parts:
        save_file({name: tensor for name, tensor in tensors.items() if name != part}, file)
        with pytest.raises(ModelError, match=r"expert.gate.1.2"):
            model_logits(tmp_path / "new", AUTO)
        save_file(tensors | {part: torch.zeros(7, 3, dtype=tensors[part].dtype)}, file)
        with pytest.raises(ModelError, match=rf"{part} has the shape \(7, 3\)"):
            model_logits(tmp_path / "new", AUTO)


def test_nibbles_of_inputs_that_they_cannot_hold_are_refused(tmp_path: Path) -> None:
    convert(tiny_llama(tmp_path, hidden_size=48), tmp_path / "new", "int8")
    file = tmp_path / "new/model-00001.safetensors"
    tensors, name = load_file(file), "feed_forward.gate.1"  # of 48 inputs: a group and a half
    parts = {f"{name}.int4.q": torch.zeros(96, 24, dtype=torch.uint8)}
    parts |= {f"{name}.int4.{part}": torch.zeros(96, 1) for part in ("scale", "zero")}
    save_file({one: tensors[one] for one in tensors if not one.startswith(f"{name}.")} | parts, file)
    with pytest.raises(ModelError, match=rf"{name}.plain.weight is missing"):
        model_logits(tmp_path / "new", AUTO)


def test_a_later_version_is_refused(mixtral: Path, tmp_path: Path) -> None:
    convert(mixtral, tmp_path / "new", "int8")
    set_config(tmp_path / "new", quantization_config={"quant_method": "tokenmill", "version": 2, "weights": "int8"})
    with pytest.raises(ModelError, match=r"tokenmill.*version"):
        model_logits(tmp_path / "new", AUTO)


@pytest.mark.parametrize("name", ARCHITECTURE_SHAPES)
def test_the_inventory_knows_which_matrices_have_a_format(tmp_path: Path, name: str) -> None:
    """By what a model really takes as such when it is loaded."""
    checkpoint = tiny(name, tmp_path)
    known = {each for each, shape in parameters(read_spec(checkpoint)).items() if has_format(each, shape)}
    assert known - {Parameter("head")} == set(kept_in_a_format(checkpoint))


def test_the_command_writes_a_folder_that_loads(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "convert", str(mixtral), str(tmp_path / "new"), "--weights", "int4", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["bytes"] == sum(t.nbytes for t in load_file(tmp_path / "new/model-00001.safetensors").values())
    assert torch.equal(model_logits(tmp_path / "new", AUTO), model_logits(mixtral, "int4"))
    assert main(["model", "convert", str(mixtral), str(tmp_path / "new")]) == Misconfigured.exit_code
    assert "no empty folder" in capsys.readouterr().err
