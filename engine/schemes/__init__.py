"""The ways in which published checkpoints are quantized, one file per scheme.

Owns `SCHEMES`, by the `quant_method` of `config.json`'s `quantization_config`. A scheme's fields are read strictly: one
that we do not know may change what the numbers mean, so it is refused by name.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from engine.errors import ModelError
from engine.schemes.awq import AwqConfig
from engine.schemes.compressed import CompressedConfig
from engine.schemes.fp8 import Fp8Config
from engine.schemes.gptq import GptqConfig
from engine.schemes.mxfp4 import Mxfp4Config
from engine.schemes.own import METHOD, OwnConfig
from engine.schemes.scheme import FLOATS, Entries, Entry, Plain, Scheme, Source, Stored, Wanted

__all__ = ["FLOATS", "SCHEMES", "Entries", "Entry", "Plain", "Scheme", "Source", "Stored", "Wanted", "scheme_of"]


class _Config(Protocol):
    def scheme(self) -> Scheme: ...


SCHEMES: Mapping[str, type[_Config]] = {
    "awq": AwqConfig,
    "compressed-tensors": CompressedConfig,
    "fp8": Fp8Config,
    "gptq": GptqConfig,
    "mxfp4": Mxfp4Config,
    METHOD: OwnConfig,
}


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """How the checkpoint of this `config.json` is quantized. Raises ModelError for a way that we do not know."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return Plain()
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    kind = SCHEMES.get(method) if isinstance(method, str) else None
    if kind is None:
        raise ModelError(f"config.json: quantization_config.quant_method {method!r} is not one of {', '.join(SCHEMES)}")
    try:
        return msgspec.convert(quantization, kind).scheme()
    except msgspec.ValidationError as error:
        raise ModelError(f"config.json: quantization_config ({method}): {error}") from error
