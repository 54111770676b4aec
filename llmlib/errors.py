"""The errors that llmlib raises: each names the thing, its value and the remedy."""

import math


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


def require_range(name: str, bounds: tuple[float, float], *, above_0: bool = True) -> None:
    """Raise ConfigError unless (low, high) runs upwards, from above 0, or else from 0."""
    low, high = bounds
    require(
        low <= high and (low > 0 if above_0 else low >= 0),
        f"{name} is ({low}, {high}), and must be (low, high) with 0 {'<' if above_0 else '≤'} low ≤ high",
    )


def require_state(state: dict | None, names: tuple[str, ...], owner: str) -> None:
    """Raise ValueError unless a layer's state holds nothing yet, or all of `names` and no other.

    Besides them a state may hold "reserve", which is for caches, and "cross", which is for cross-attention.
    """
    found = set(state or ()) - {"reserve", "cross"}
    require(
        not found or found == set(names),
        f"state holds {', '.join(map(repr, sorted(found)))}, and {owner} keeps "
        f"{', '.join(map(repr, names))}: is it the state of another layer?",
        ValueError,
    )


def require_counts(least: int = 1, **sizes: int | None) -> None:
    """ConfigError unless each of the sizes that is given is a whole number of `least` or more."""
    for name, size in sizes.items():
        whole = isinstance(size, int) and not isinstance(size, bool)
        require(size is None or whole, f"{name} is {size!r}, and must be a whole number")
        require(size is None or size >= least, f"{name} is {size}, and must be at least {least}")


def require_positive(**numbers: float | None) -> None:
    """ConfigError unless each of the numbers that is given is above 0 and finite."""
    for name, number in numbers.items():
        require(number is None or 0 < number < math.inf, f"{name} is {number}, and must be above 0 and finite")
