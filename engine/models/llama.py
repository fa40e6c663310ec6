"""Llama and what is shaped like it (`LlamaForCausalLM`), as data."""

from collections.abc import Sequence

from engine.models import names
from engine.models.hf import Architecture, DecoderConfig
from engine.models.spec import Dense


class LlamaConfig(DecoderConfig, kw_only=True):
    """Llama has no field of its own."""

    def feed_forwards(self) -> Sequence[Dense]:
        """The same in every layer."""
        return [Dense(self.intermediate_size)] * self.num_hidden_layers


ARCHITECTURE = Architecture(config=LlamaConfig, names={**names.BASE, **names.ATTENTION, **names.DENSE})
