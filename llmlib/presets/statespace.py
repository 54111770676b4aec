"""Mamba, Mamba-2, Falcon-Mamba, and Jamba, which mixes Mamba with attention and experts."""

from llmlib.attention import Attention
from llmlib.ffn import SwiGLU
from llmlib.model import Layer, ModelConfig, spec
from llmlib.moe import MoE
from llmlib.norm import RMSNorm
from llmlib.presets.registry import publish
from llmlib.ssm import Mamba, Mamba2

MAMBA = "Gu and Dao (2023), https://arxiv.org/abs/2312.00752"
MAMBA2 = "Dao and Gu (2024), https://arxiv.org/abs/2405.21060"
JAMBA = "Lieber et al. (2024), https://arxiv.org/abs/2403.19887"
JAMBA_1_5 = "Jamba Team (2024), https://arxiv.org/abs/2408.12570"


def stack(mixer, d_model: int, num_layers: int, vocab_size: int, tied: bool = True) -> ModelConfig:
    """A stack of one mixer with no feed-forward: the mixer is as wide as both together."""
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, layers=num_layers * (Layer(mixer=mixer),), norm=spec(RMSNorm, eps=1e-5),
        tie_embeddings=tied,
    )  # fmt: skip


_SHAPES = ((768, 24), (1024, 48), (1536, 48), (2048, 48), (2560, 64))
for _name, _size in zip(("130m", "370m", "790m", "1.4b", "2.8b"), _SHAPES, strict=True):
    publish(
        f"mamba-{_name}", "mamba", _name.upper(), 2023, MAMBA,
        lambda s=_size: stack(spec(Mamba, d_state=16), *s, vocab_size=50280),
    )  # fmt: skip
for _name, _size in zip(("130m", "370m", "780m", "1.3b", "2.7b"), _SHAPES, strict=True):
    publish(
        f"mamba2-{_name}", "mamba2", _name.upper(), 2024, MAMBA2,
        lambda s=_size: stack(spec(Mamba2, head_dim=64, d_state=128, chunk_size=256), *s, vocab_size=50288),
    )  # fmt: skip
publish(
    "falcon-mamba-7b", "mamba", "7B", 2024, "Zuo et al. (2024), https://arxiv.org/abs/2410.05355",
    lambda: stack(
        spec(Mamba, d_state=16, inner_norm=spec(RMSNorm, eps=1e-6, weight=False)), 4096, 64, 65024, tied=False
    ),
)  # fmt: skip


def jamba(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    """One attention layer in eight, experts in every second layer, no positions."""
    attention = spec(Attention, num_heads=num_heads, num_kv_heads=8)
    scan = spec(Mamba, d_state=16, inner_norm=spec(RMSNorm, eps=1e-6))
    dense = spec(SwiGLU, d_ff=d_ff)
    sparse = spec(MoE, num_experts=16, top_k=2, expert=dense)
    layers = (Layer(attention if i % 8 == 4 else scan, sparse if i % 2 == 1 else dense) for i in range(num_layers))
    return ModelConfig(
        vocab_size=65536, d_model=d_model, layers=tuple(layers), norm=spec(RMSNorm, eps=1e-6), max_seq_len=262144
    )


publish("jamba-v0.1", "jamba", "52B", 2024, JAMBA, lambda: jamba(4096, 32, 32, 14336))
publish("jamba-1.5-mini", "jamba", "52B", 2024, JAMBA_1_5, lambda: jamba(4096, 32, 32, 14336))
publish("jamba-1.5-large", "jamba", "398B", 2024, JAMBA_1_5, lambda: jamba(8192, 72, 64, 24576))
