"""The errors that llmlib raises: each names the thing, its value and the remedy."""


class ConfigError(ValueError):
    """A model description that can't be built: an unknown option, or sizes that don't fit together."""


class KernelUnavailableError(RuntimeError):
    """A kernel was forced that can't run here, or whose name no op knows."""


class CheckpointError(ValueError):
    """A checkpoint that is broken or doesn't fit: the message names the tensor or the file."""


class UnsupportedArchitectureError(ValueError):
    """A `model_type` that llmlib doesn't know: the message names it and those it does know."""


class CorpusError(ValueError):
    """A text source that is empty, unreadable or too short for what was asked."""


class TrainingError(RuntimeError):
    """A training run that can't go on, such as one whose loss is no longer a number."""


def require(condition: bool, message: str, error: type[Exception] = ConfigError) -> None:
    """Raise `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)
