"""What can be wrong with what the engine is given to load. The worker turns it into an exit of its own kind."""


class ModelError(Exception):
    """A model cannot be used: a file is missing, damaged, hostile, or of a kind that is not supported.

    Its text names the file, tensor or setting, and says what to do where there is something to do.
    """
