"""Where things are kept on this machine: models and jars in the user's cache, data in the user's state (XDG)."""

import os
from pathlib import Path

from worker.errors import Misconfigured


def cache_folder() -> Path:
    """Ours among the user's caches: what is in it is safe to delete, it is fetched again."""
    return _xdg("XDG_CACHE_HOME", ".cache") / "tokenmill"


def state_folder() -> Path:
    """Ours among what the user's programs keep between runs."""
    return _xdg("XDG_STATE_HOME", ".local/state") / "tokenmill"


def models_folder() -> Path:
    """Where fetched models are kept."""
    return cache_folder() / "models"


def model_folder(model: str) -> Path:
    """The checkpoint's folder: of a fetched model by its name, or at the path itself. Raises Misconfigured."""
    if not model:
        raise Misconfigured("no model is set: give --model smollm2-moe, or the path of a checkpoint's folder")
    for folder in (models_folder() / model, Path(model)):
        if (folder / "config.json").is_file():
            return folder.absolute()
    raise Misconfigured(
        f"there is no model {model!r}, neither in {models_folder()} nor as a folder with a config.json: "
        "`tokenmill model fetch smollm2-moe` fetches the demo model, `tokenmill model list` shows what is there"
    )


def _xdg(variable: str, below_home: str) -> Path:
    configured = Path(os.environ.get(variable, ""))
    return configured if configured.is_absolute() else Path.home() / below_home  # relative values are to be ignored
