"""Which `Ops` table runs on which device.

Owns the names that configuration uses. A table is imported when it is picked, so that a machine without a backend's
compiler or driver can still run the others.
"""

import logging
from collections.abc import Callable, Mapping

import torch

from kernels.ops import Ops

_LOG = logging.getLogger(__name__)


def pick(device: str | torch.device, name: str | None = None) -> Ops:
    """The backend called `name`, or the fastest one for the device. Raises ValueError for a name that is not there.

    Where a processor should have C++ kernels and has none, the log says so and why; `Ops.name` tells which table it is.
    """
    name = name or FASTEST.get(torch.device(device).type, "reference")
    if name not in BACKENDS:
        raise ValueError(f"no kernel backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]()


def _reference() -> Ops:
    from kernels import reference

    return reference.OPS


def _cpu() -> Ops:
    from kernels.cpu import native

    try:
        return native.ops()
    except native.Unavailable as reason:
        _LOG.warning("no C++ kernels, so torch's own ops are used, several times slower: %s", reason)
        return _cpu_torch()


def _cpu_torch() -> Ops:
    from kernels import cpu

    return cpu.OPS


def _triton() -> Ops:
    from kernels import triton

    return triton.OPS


BACKENDS: Mapping[str, Callable[[], Ops]] = {
    "reference": _reference,
    "cpu": _cpu,
    "cpu-torch": _cpu_torch,
    "triton": _triton,
}

FASTEST: Mapping[str, str] = {"cpu": "cpu", "cuda": "triton"}  # by device type
