"""What can be wrong with what the engine is given. The worker turns each into an answer or an exit of its own kind."""


class ModelError(Exception):
    """A model cannot be used: a file is missing, damaged, hostile, or of a kind that is not supported.

    Its text names the file, tensor or setting, and says what to do where there is something to do.
    """


class EngineMisconfigured(Exception):
    """The settings contradict each other, the model or the machine; the text says which to change."""


class RequestRefused(Exception):
    """The engine could never run this request; the text says why. Nothing of it is kept."""


class RankLost(Exception):
    """A process that computed a part of the model has ended, and with it the engine; the text says which and how."""
