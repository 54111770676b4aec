"""Llama 1, 2 and 3: RMSNorm, rotary positions, SwiGLU, no biases; grouped keys and values in 2-70B and all of 3."""

from llmlib.attention import Attention
from llmlib.ffn import SwiGLU
from llmlib.model import Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.presets.registry import publish

LLAMA_1 = "Touvron et al. (2023), https://arxiv.org/abs/2302.13971"
LLAMA_2 = "Touvron et al. (2023), https://arxiv.org/abs/2307.09288"
LLAMA_3 = "Grattafiori et al. (2024), https://arxiv.org/abs/2407.21783"


def llama(
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    num_kv_heads: int | None = None,
    *,
    vocab_size: int = 32000,
    max_seq_len: int = 2048,
    eps: float = 1e-5,
    tie_embeddings: bool = False,
    **attention,
) -> ModelConfig:
    """A Llama of any size; further keywords are options of `Attention`, such as rope_theta and rope_scaling."""
    attention = {"rope_theta": 10000.0, **attention}
    layer = Layer(
        mixer=spec(Attention, num_heads=num_heads, num_kv_heads=num_kv_heads or num_heads, **attention),
        ffn=spec(SwiGLU, d_ff=d_ff),
    )
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, layers=num_layers * (layer,), norm=spec(RMSNorm, eps=eps),
        tie_embeddings=tie_embeddings, max_seq_len=max_seq_len,
    )  # fmt: skip


def llama3(*sizes, factor: float | None = None, max_seq_len: int = 131072, **options) -> ModelConfig:
    """Llama 3 and, with the `factor` that stretches its wavelengths beyond 8,192 tokens, Llama 3.1 and 3.2."""
    scaling = factor and {
        "type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return llama(
        *sizes, vocab_size=128256, rope_theta=500000.0, rope_scaling=scaling, max_seq_len=max_seq_len, **options
    )


_SIZES = {
    "7b": (4096, 32, 32, 11008),
    "13b": (5120, 40, 40, 13824),
    "33b": (6656, 60, 52, 17920),
    "65b": (8192, 80, 64, 22016),
}
for _size, _shape in _SIZES.items():
    publish(f"llama-{_size}", "llama", _size.upper(), 2023, LLAMA_1, lambda s=_shape: llama(*s, eps=1e-6))
for _size, _shape in {"7b": _SIZES["7b"], "13b": _SIZES["13b"], "70b": (8192, 80, 64, 28672, 8)}.items():
    publish(f"llama-2-{_size}", "llama", _size.upper(), 2023, LLAMA_2, lambda s=_shape: llama(*s, max_seq_len=4096))
_SIZES_3 = {"8b": (4096, 32, 32, 14336, 8), "70b": (8192, 80, 64, 28672, 8), "405b": (16384, 126, 128, 53248, 8)}
for _size in ("8b", "70b"):
    publish(
        f"llama-3-{_size}", "llama", _size.upper(), 2024, LLAMA_3,
        lambda s=_SIZES_3[_size]: llama3(*s, max_seq_len=8192),
    )  # fmt: skip
for _size, _shape in _SIZES_3.items():
    publish(f"llama-3.1-{_size}", "llama", _size.upper(), 2024, LLAMA_3, lambda s=_shape: llama3(*s, factor=8.0))
for _size, _shape in {"1b": (2048, 16, 32, 8192, 8), "3b": (3072, 28, 24, 8192, 8)}.items():
    publish(
        f"llama-3.2-{_size}", "llama", _size.upper(), 2024, f"https://huggingface.co/meta-llama/Llama-3.2-{_size.upper()}",
        lambda s=_shape: llama3(*s, factor=32.0, tie_embeddings=True),
    )  # fmt: skip
