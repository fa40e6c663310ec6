"""Compiles the C++ kernels where that has not been done: `python -m kernels.cpu.native`. Never fails."""

from kernels.cpu.native.build import Unavailable, load

try:
    print(f"CPU kernels for {load(print)[0]}")  # for whoever installs
except Unavailable as reason:
    print(f"No CPU kernels, so torch's own ops will be used, several times slower: {reason}")
