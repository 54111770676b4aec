"""Published models by name: how each is built, what its makers call its size, and where that is written."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from llmlib.errors import ConfigError
from llmlib.model import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A published model: `label` is the size its makers quote, `source` the paper or model card that describes it."""

    name: str
    family: str
    label: str
    year: int
    source: str
    build: Callable[[], ModelConfig]


PRESETS: dict[str, Preset] = {}


def publish(name: str, family: str, label: str, year: int, source: str, build: Callable[[], ModelConfig]) -> None:
    """Add a published model to the list."""
    PRESETS[name] = Preset(name, family, label, year, source, lambda: build().replace(name=name))


def names(family: str | None = None) -> list[str]:
    """The names that `get` knows, of one family or of all."""
    return [name for name, preset in PRESETS.items() if family in (None, preset.family)]


def get(name: str) -> ModelConfig:
    """The config of a published model. An unknown name is a ConfigError that lists the nearest ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        raise ConfigError(
            f"there is no preset {name!r}; {'the nearest are' if near else 'there are'} "
            f"{', '.join(near or PRESETS)}. llmlib.presets.names() lists all {len(PRESETS)}"
        )
    return PRESETS[name].build()
