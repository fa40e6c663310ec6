"""Which `Ops` table runs on which device.

Owns the names that configuration uses. A table is imported when it is picked, so that a machine without a backend's
compiler or driver can still run the others.
"""

from collections.abc import Callable, Mapping

import torch

from kernels.ops import Ops


def pick(device: str | torch.device, name: str | None = None) -> Ops:
    """The backend called `name`, or the fastest one for the device. Raises ValueError for a name that is not there."""
    name = name or FASTEST.get(torch.device(device).type, "reference")
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]()


def _reference() -> Ops:
    from kernels import reference

    return reference.OPS


def _cpu() -> Ops:
    from kernels import cpu

    return cpu.OPS


def _triton() -> Ops:
    from kernels import triton

    return triton.OPS


BACKENDS: Mapping[str, Callable[[], Ops]] = {"reference": _reference, "cpu": _cpu, "triton": _triton}

FASTEST: Mapping[str, str] = {"cpu": "cpu", "cuda": "triton"}  # by device type
