"""Qwen3 (`Qwen3ForCausalLM`, arXiv 2505.09388), as data: a Llama that normalises each query and key head."""

from collections.abc import Sequence
from dataclasses import replace

from engine.models import llama, names
from engine.models.hf import Architecture, Size
from engine.models.hf_rope import require
from engine.models.spec import GroupedQuery, QueryKeyNorm


class Qwen3Config(llama.LlamaConfig, kw_only=True):
    """Qwen3's own fields. `sliding_window` and `max_window_layers` count only with `use_sliding_window`."""

    head_dim: Size | None = 128
    use_sliding_window: bool = False

    def windows(self) -> Sequence[None]:
        """None: no published model uses them."""
        require(not self.use_sliding_window, "use_sliding_window is not supported, only false")
        return [None] * self.num_hidden_layers

    def grouped_query(self) -> Sequence[GroupedQuery]:
        """Llama's, with the norms."""
        norm = QueryKeyNorm(self.rms_norm_eps)
        return [replace(mixer, query_key_norm=norm) for mixer in super().grouped_query()]


ARCHITECTURE = Architecture(config=Qwen3Config, names={**llama.ARCHITECTURE.names, **names.QUERY_KEY_NORMS})
