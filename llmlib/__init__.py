"""The components of modern language models in readable PyTorch.

Axis letters, the same in every signature here and in the book:

    b batch                    t query or sequence time    s key time            d width (of the model, or of one head)
    e value width              h query heads               g key/value or B/C groups
    n state size, or streams   p SSM head width            f feed-forward width  v vocabulary
    E experts                  k experts per token         l latent rank         r MIMO rank      c chunk      w window
"""

import importlib

__version__ = "0.1.0"

_ATTRIBUTES = {
    "load": "hf",
    "kernels": "ops",
    "explain": "ops",
    "record": "ops",
    "spec": "model",
    "Layer": "model",
    "ModelConfig": "model",
    "CausalLM": "model",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CorpusError": "errors",
    "KernelUnavailableError": "errors",
    "TrainingError": "errors",
    "UnsupportedArchitectureError": "errors",
}
_MODULES = (
    "attention", "benchmark", "compact", "cost", "data", "errors", "ffn", "generate", "hf", "hybrid", "interactive",
    "model", "moe", "norm", "notebook", "ops", "position", "presets", "residual", "scaling", "ssm", "tasks",
    "tokenizer", "train",
)  # fmt: skip
__all__ = sorted({*_ATTRIBUTES, *_MODULES})


def __getattr__(name: str):
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(f"llmlib.{_ATTRIBUTES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"llmlib.{name}")
    raise AttributeError(f"module 'llmlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
