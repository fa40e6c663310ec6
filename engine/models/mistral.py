"""Mistral (`MistralForCausalLM`, arXiv 2310.06825), as data: a Llama whose attention may have a window."""

from collections.abc import Sequence

from engine.models import llama
from engine.models.hf import Architecture


class MistralConfig(llama.LlamaConfig, kw_only=True):
    """Mistral has no field of its own."""

    def windows(self) -> Sequence[int | None]:
        """The same in every layer."""
        return [self.sliding_window or None] * self.num_hidden_layers


ARCHITECTURE = Architecture(config=MistralConfig, names=llama.ARCHITECTURE.names)
