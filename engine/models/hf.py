"""What a Hugging Face `config.json` says, in typed form: the part that the architectures share.

Owns the limits on a configuration's numbers, so that a hostile file costs nothing, and the refusal of what we would
compute wrongly. An architecture's own file adds its own fields and its tensor names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from engine.errors import ModelError
from engine.models.hf_rope import Context, Positive, RopeConfig, require
from engine.models.names import Packed
from engine.models.parameters import Parameter
from engine.models.spec import (
    FeedForward,
    GroupedQuery,
    LayerSpec,
    Mixer,
    Mixture,
    ModelSpec,
)

# The largest published models have 126 layers, 512 experts and 256 thousand tokens. Twice that, or more, is no model
# but an attack on our memory: the inventory of parameters is as long as layers times experts.
Layers = Annotated[int, Meta(ge=1, le=256)]
Experts = Annotated[int, Meta(ge=1, le=1024)]
Size = Annotated[int, Meta(ge=1, le=2**20)]
Vocab = Annotated[int, Meta(ge=1, le=2**22)]
Window = Annotated[int, Meta(ge=0, le=2**24)] | None  # transformers writes 0 for Qwen2-MoE's lack of one
TokenId = Annotated[int, Meta(ge=0, le=2**22)]
TokenIds = TokenId | Annotated[list[TokenId], Meta(max_length=64)] | None  # one id, a list of them, or null


@dataclass(frozen=True)
class Architecture:
    """How to read one kind of checkpoint: its configuration, and what it calls our parameters."""

    config: type["DecoderConfig"]
    names: Mapping[str, str | Packed]  # by role, with {layer} and {expert} to be filled in

    def spec_from_config(self, config: Mapping[str, Any]) -> ModelSpec:
        """The model that a `config.json` describes. Raises ModelError for a field that is missing, out of bounds, or
        asks for what we do not compute.
        """
        try:
            return msgspec.convert(config, self.config).spec()
        except msgspec.ValidationError as error:
            raise ModelError(f"config.json: {error}") from error

    def tensor_name(self, parameter: Parameter) -> str:
        """The tensor of the checkpoint that is the parameter, or holds it among others."""
        packed = self.packed(parameter)
        name = packed.name if packed else self.names[parameter.role]
        return str(name).format(layer=parameter.layer, expert=parameter.expert)

    def packed(self, parameter: Parameter) -> Packed | None:
        """How the tensor holds the parameter, unless it is the parameter."""
        name = self.names[parameter.role]
        return name if isinstance(name, Packed) else None


class DecoderConfig(Struct, kw_only=True):
    """The fields that every decoder of this kind has; unknown ones are ignored."""

    vocab_size: Vocab
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Context
    rms_norm_eps: Annotated[float, Meta(ge=0, le=1)]
    rope_theta: Positive = 10_000.0  # the paper's, where the file says nothing
    rope_parameters: RopeConfig | None = None
    rope_scaling: RopeConfig | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: Window = None
    eos_token_id: TokenIds = None

    def feed_forwards(self) -> Sequence[FeedForward]:
        """What works on each token alone, for each layer."""
        raise NotImplementedError

    def windows(self) -> Sequence[int | None]:
        """For each layer, how many positions attention sees, its own included; None: all before it."""
        require(not self.sliding_window, f"sliding_window {self.sliding_window} is not supported, only null")
        return [None] * self.num_hidden_layers

    def mixers(self) -> Sequence[Mixer]:
        """What mixes tokens, for each layer."""
        return self.grouped_query()

    def grouped_query(self) -> Sequence[GroupedQuery]:
        """The usual attention, for each layer."""
        H, G = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        D = self.head_dim or self.hidden_size // H
        require(H % G == 0, f"num_attention_heads {H} is not a multiple of num_key_value_heads {G}")
        require(D > 0 and D % 2 == 0, f"head_dim {D} is not even: rotary embedding turns pairs")
        bias = self.attention_bias
        return [GroupedQuery(H, G, D, bias=bias, output_bias=bias, window=window) for window in self.windows()]

    def draft_layers(self) -> tuple[LayerSpec, ...]:
        """Those for multi-token prediction."""
        return ()

    def spec(self) -> ModelSpec:
        """The model as data. Raises ModelError for what we do not compute."""
        require(self.hidden_act == "silu", f"hidden_act {self.hidden_act!r} is not supported, only silu")
        require(not self.mlp_bias, "mlp_bias is not supported, only false")
        feed_forwards = self.feed_forwards()
        for mixture in feed_forwards:
            if isinstance(mixture, Mixture):
                chosen, there = mixture.num_chosen, mixture.num_experts
                require(chosen <= there, f"{chosen} chosen experts are more than the {there} that there are")
        return ModelSpec(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            layers=tuple(map(LayerSpec, self.mixers(), feed_forwards)),
            draft_layers=self.draft_layers(),
            norm_eps=self.rms_norm_eps,
            rope=(self.rope_parameters or self.rope_scaling or RopeConfig()).rope(
                self.rope_theta, self.max_position_embeddings
            ),
            tied_embeddings=self.tie_word_embeddings,
            context_max=self.max_position_embeddings,
            eos_token_ids=token_ids(self.eos_token_id),
        )


class GenerationConfig(Struct, kw_only=True):
    """What `generation_config.json` says to us: more tokens may end an answer than `config.json` names."""

    eos_token_id: TokenIds = None


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids, however many `value` is."""
    match value:
        case None:
            return ()
        case int():
            return (value,)
        case _:
            return tuple(value)
