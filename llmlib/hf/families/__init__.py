"""Every family that `load` reads: a config reader and a rename table each, and no model code."""

from llmlib.hf.families import classics, llamas

__all__ = ["classics", "llamas"]
