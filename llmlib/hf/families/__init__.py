"""Every family that `load` reads: a config reader and a rename table each, and no model code."""

from llmlib.hf.families import classics, experts, llamas, statespaces

__all__ = ["classics", "experts", "llamas", "statespaces"]
