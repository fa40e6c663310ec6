"""The CPU table without C++: torch's own fastest primitives where they beat the definition, the definition elsewhere.

Owns the choice of primitive. Never quantizes activations with a scale shared by rows: what a sequence gets must not
depend on which others are in the batch.
"""

import dataclasses

from kernels import reference
from kernels.cpu import attention, elementwise, experts, linear, sample

OPS = dataclasses.replace(
    reference.OPS,
    name="cpu-torch",
    rms_norm=elementwise.rms_norm,
    add_rms_norm=elementwise.add_rms_norm,
    rotate_and_write=reference.rotate_and_write_by(elementwise.rms_norm, reference.rotary, reference.write_kv),
    swiglu=elementwise.swiglu,
    attention=attention.attention,
    experts=experts.experts,
    sample=sample.sample,
    logprobs=sample.logprobs,
    weights=linear.WEIGHTS,
)
