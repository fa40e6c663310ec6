"""What a Hugging Face `config.json` says about the rotary embedding, in typed form.

Owns the kinds of stretched contexts that we compute, and the refusal of all others.
"""

import math
from typing import Annotated

from msgspec import Meta, Struct

from engine.errors import ModelError
from engine.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling

Context = Annotated[int, Meta(ge=1, le=2**24)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
NotNegative = Annotated[float, Meta(ge=0, le=1e12)]


class RopeConfig(Struct, kw_only=True):
    """`rope_parameters`, or the older `rope_scaling` whose kind was called `type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: Context | None = None
    partial_rotary_factor: float = 1.0
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    truncate: bool = True

    def rope(self, theta: float, context_max: int) -> Rope:
        """The embedding as data, where the file has no theta or original context of its own."""
        theta = self.rope_theta or theta
        original = self.original_max_position_embeddings or context_max
        kind = self.rope_type or self.type or "default"
        require(self.partial_rotary_factor == 1.0, "partial_rotary_factor is not supported, only 1")
        match kind:
            case "default":
                return Rope(theta)
            case "linear":
                return Rope(theta, LinearScaling(self.factor))
            case "llama3":
                low, high = self.low_freq_factor, self.high_freq_factor
                require(low < high, f"low_freq_factor {low} is not below high_freq_factor {high}")
                return Rope(theta, Llama3Scaling(self.factor, low, high, original))
            case "yarn":
                require(theta > 1, f"rope_theta {theta} is not above 1")
                fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0  # the paper's
                require(slow < fast, f"beta_slow {slow} is not below beta_fast {fast}")
                scaling = YarnScaling(self.factor, fast, slow, original, whole_pairs=self.truncate)
                return Rope(theta, scaling, self._magnitude())
        raise ModelError(
            f'config.json: rope_type {kind!r} is not supported, only "default", "linear", "llama3" and "yarn"'
        )

    def sharpening(self) -> float:
        """By what DeepSeek multiplies its queries and its keys over the whole head, rotated or not."""
        return self._yarn_scale(self.mscale_all_dim or 0.0)

    def _magnitude(self) -> float:
        """By what the rotated parts of queries and keys grow."""
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._yarn_scale(self.mscale) / self._yarn_scale(self.mscale_all_dim)
        return self._yarn_scale(1.0)

    def _yarn_scale(self, by: float) -> float:
        """1 for a context that is not stretched, more with its logarithm (YaRN, arXiv 2309.00071, 3.4)."""
        return 1.0 + 0.1 * by * math.log(max(self.factor, 1.0))


def require(holds: bool, otherwise: str) -> None:
    """Raise ModelError with what is wrong in the file, unless it holds."""
    if not holds:
        raise ModelError(f"config.json: {otherwise}")
