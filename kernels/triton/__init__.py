"""The Triton table, for NVIDIA Hopper: fused kernels where they beat torch, the definition elsewhere.

Owns the choice. Tiles come from tables, never from a search while serving. The kernels run on any machine in Triton's
interpreter (`TRITON_INTERPRET=1`), which is how they are tested without a GPU.
"""

import dataclasses

from kernels import reference
from kernels.ops import WeightKernel
from kernels.triton import attention, cache, elementwise, heads, logprobs, norms, products, route, sample, weights

OPS = dataclasses.replace(
    reference.OPS,
    name="triton",
    rms_norm=norms.rms_norm,
    add_rms_norm=norms.add_rms_norm,
    prepare_norm=norms.prepare_norm,
    rotary=elementwise.rotary,
    write_kv=cache.write_kv,
    rotate_and_write=heads.rotate_and_write,
    swiglu=elementwise.swiglu,
    attention=attention.attention,
    route=route.route,
    experts=products.experts,
    sample=sample.sample,
    logprobs=logprobs.logprobs,
    weights={
        "fp32": reference.OPS.weights["fp32"],
        "bf16": WeightKernel(weights.prepare_bf16, products.linear_bf16, weights.stack),
        "int8": WeightKernel(weights.prepare_int8, products.linear, weights.stack),
        "int4": WeightKernel(weights.prepare_int4, products.linear, weights.stack),
        "mxfp4": WeightKernel(weights.prepare_mxfp4, products.linear, weights.stack),
        "fp8": WeightKernel(weights.prepare_fp8, products.linear, weights.stack),
    },
)
