"""Published checkpoints in Hugging Face's format: `load`, and the tables and readers behind it."""

from llmlib.hf.checkpoint import Checkpoint
from llmlib.hf.loading import FAMILIES, Family, family, find, load, read_config

__all__ = ["FAMILIES", "Checkpoint", "Family", "family", "find", "load", "read_config"]
