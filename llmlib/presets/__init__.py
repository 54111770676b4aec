"""Published models as data: `get("llama-3-8b")` is a ModelConfig, `names()` lists them, PRESETS gives their sources."""

from llmlib.presets import falcon, gpt2, granite, hybrids, llama, moe, statespace
from llmlib.presets.registry import PRESETS, Preset, get, names

__all__ = [
    "PRESETS", "Preset", "falcon", "get", "gpt2", "granite", "hybrids", "llama", "moe", "names", "statespace",
]  # fmt: skip
