"""Published models as data: `get("llama-3-8b")` is a ModelConfig, `names()` lists them, PRESETS gives their sources."""

from llmlib.presets import gpt2, llama, moe
from llmlib.presets.registry import PRESETS, Preset, get, names

__all__ = ["PRESETS", "Preset", "get", "gpt2", "llama", "moe", "names"]
