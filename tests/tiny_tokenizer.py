"""A tokenizer small enough to train where a test needs one, in the two forms that models come with."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# SmolLM's and Qwen's form, with the refusals and loops that larger models' templates have.
TEMPLATE = """{% for message in messages %}
{% if message['role'] == 'assistant' and loop.first %}{{ raise_exception('a chat begins with the user') }}{% endif %}
<|start|>{{ message['role'] }}
{{ message['content'].strip() }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""

_TEXT = ["the quick brown fox jumps over the lazy dog", "hello world, how are you?", "über naïve 日本語 emoji 😀 stop"]


def save_byte_level(folder: Path, template: object = TEMPLATE) -> Path:
    """GPT-2's kind: every byte has a printable stand-in. Tokens 0 and 1 are <|start|> and <|end|>, the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 3, trainer)
    return _save(tokenizer, folder, {"chat_template": template, "bos_token": {"content": "<|start|>"}})


def save_byte_fallback(folder: Path) -> Path:
    """SentencePiece's kind: spaces are U+2581, and bytes that no token holds are <0xNN>. The end token is 1."""
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helo wrd", "▁h", "▁he"]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "h"), ("▁h", "e")], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _save(tokenizer, folder, {})


def _save(tokenizer: Tokenizer, folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    return folder
