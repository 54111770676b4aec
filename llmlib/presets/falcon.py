"""Falcon (Almazrouei et al., arXiv 2311.16867): a parallel block, few key/value heads; RW is sequential with ALiBi."""

from llmlib.attention import Attention
from llmlib.ffn import MLP
from llmlib.model import Layer, ModelConfig, spec
from llmlib.norm import LayerNorm
from llmlib.position import ALiBi
from llmlib.presets.registry import publish

PAPER = "Almazrouei et al. (2023), https://arxiv.org/abs/2311.16867"


def falcon(
    d_model: int, num_layers: int, num_heads: int, num_kv_heads: int, *, norms: int = 2, tied: bool = True
) -> ModelConfig:
    """Falcon 7B (one key/value head, one norm), 11B, 40B and 180B (eight heads)."""
    layer = Layer(
        mixer=spec(Attention, num_heads=num_heads, num_kv_heads=num_kv_heads, rope_theta=10000.0),
        ffn=spec(MLP, d_ff=4 * d_model, activation="gelu", bias=False),
        parallel=True, parallel_norms=norms,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=65024, d_model=d_model, layers=num_layers * (layer,), norm=spec(LayerNorm, eps=1e-5),
        tie_embeddings=tied, max_seq_len=2048,
    )  # fmt: skip


def falcon_rw(d_model: int, num_layers: int, num_heads: int, vocab_size: int) -> ModelConfig:
    """Falcon-RW, trained on web text alone: a sequential block with biases, and ALiBi in place of rotary positions."""
    alibi = spec(ALiBi, bfloat16=True, scale=(d_model // num_heads) ** -0.5)
    layer = Layer(
        mixer=spec(Attention, num_heads=num_heads, bias=True, position_bias=alibi),
        ffn=spec(MLP, d_ff=4 * d_model, activation="gelu"),
    )
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, layers=num_layers * (layer,), norm=spec(LayerNorm, eps=1e-5),
        tie_embeddings=True, max_seq_len=2048,
    )  # fmt: skip


publish("falcon-7b", "falcon", "7B", 2023, PAPER, lambda: falcon(4544, 32, 71, 1, norms=1))
publish("falcon-40b", "falcon", "40B", 2023, PAPER, lambda: falcon(8192, 60, 128, 8))
publish("falcon-180b", "falcon", "180B", 2023, PAPER, lambda: falcon(14848, 80, 232, 8))
publish(
    "falcon-11b", "falcon", "11B", 2024, "Malartic et al. (2024), https://arxiv.org/abs/2407.14885",
    lambda: falcon(4096, 60, 32, 8, norms=1, tied=False).replace(max_seq_len=8192),
)  # fmt: skip
_WEB = "Penedo et al. (2023), https://arxiv.org/abs/2306.01116"
publish("falcon-rw-1b", "falcon", "1B", 2023, _WEB, lambda: falcon_rw(2048, 24, 32, 50304))
publish("falcon-rw-7b", "falcon", "7B", 2023, _WEB, lambda: falcon_rw(4096, 36, 64, 65024))
