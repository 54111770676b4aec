"""Hybrids of attention and state spaces: Samba, Zamba2, Bamba, Nemotron-H, Falcon-H1; and one of the book's own.

Jamba and Granite 4 stand with their families. Hymba, which is often named with these, is not here: it shares keys and
values between neighbours and makes both mixers' inputs in one map. `llmlib.hybrid.ParallelHeads` is the idea of it.
"""

import math

from llmlib.attention import MLA, Attention
from llmlib.ffn import MLP, ScaledSwiGLU, SwiGLU
from llmlib.hybrid import Identity, ParallelHeads, SharedBlock, WithSharedBlock
from llmlib.model import Layer, ModelConfig, spec
from llmlib.moe import MoE, TopKRouter
from llmlib.norm import RMSNorm
from llmlib.presets.registry import publish
from llmlib.ssm import Mamba, Mamba2

SAMBA = "Ren et al. (2024), https://arxiv.org/abs/2406.07522"
ZAMBA2 = "Glorioso et al. (2024), https://arxiv.org/abs/2411.15242"
BAMBA = "https://huggingface.co/ibm-fms/Bamba-9B"
NEMOTRON_H = "NVIDIA (2025), https://arxiv.org/abs/2504.03624"
FALCON_H1 = "Zuo et al. (2025), https://arxiv.org/abs/2507.22448"
NEMOTRON_H_4B = "https://huggingface.co/nvidia/Nemotron-H-4B-Base-8K"


def samba(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    """Samba: Mamba and attention to the last 2,048 tokens take turns, each before a feed-forward."""
    norm, ffn = spec(RMSNorm, eps=1e-5), spec(SwiGLU, d_ff=d_ff)
    attention = spec(Attention, num_heads=num_heads, rope_theta=10000.0, window=2048)
    pair = Layer(spec(Mamba, d_state=16), ffn), Layer(attention, ffn)
    return ModelConfig(
        vocab_size=32000, d_model=d_model, layers=num_layers // 2 * pair, norm=norm, tie_embeddings=True,
        max_seq_len=4096,
    )  # fmt: skip


def zamba2(
    d_model: int,
    num_layers: int,
    hybrid_at: tuple[int, ...],
    d_state: int,
    *,
    num_blocks: int,
    rope_theta: float | None = None,
    attention_adapter: bool = False,
) -> ModelConfig:
    """Zamba2: Mamba-2 everywhere, and at some layers a transformer block before it, whose weights those layers share.

    hybrid_at   which layers those are; num_blocks  how many blocks take turns among them
    attention_adapter  each use has low-rank changes not only of the block's feed-forward, but of its queries, keys and
                       values too
    """
    norm, d_ff, num_heads = spec(RMSNorm, eps=1e-5), 4 * d_model, 32
    head_dim = 2 * d_model // num_heads
    scan = spec(Mamba2, head_dim=64, d_state=d_state, chunk_size=256, dt_limit=(0.001, math.inf))
    attention = spec(
        Attention, num_heads=num_heads, head_dim=head_dim, scale=(head_dim / 2) ** -0.5, rope_theta=rope_theta,
        d_out=d_model,
    )  # fmt: skip
    block = spec(SharedBlock, attention=attention, norm=norm, d_ff=d_ff)
    layers = [Layer(scan)] * num_layers
    for use, i in enumerate(hybrid_at):
        mixer = spec(
            WithSharedBlock, name=f"block {use % num_blocks}", block=block if use < num_blocks else None, mixer=scan,
            norm=norm, d_ff=d_ff, adapter_rank=128, attention_adapter=attention_adapter,
        )  # fmt: skip
        layers[i] = Layer(mixer, norm=spec(Identity))
    return ModelConfig(
        vocab_size=32000, d_model=d_model, layers=tuple(layers), norm=norm, tie_embeddings=True, max_seq_len=4096
    )


def bamba() -> ModelConfig:
    """Bamba-9B: three attention layers among 29 of Mamba-2; half of each head turns."""
    attention = spec(Attention, num_heads=32, num_kv_heads=8, rope_theta=10000.0, rope_dim=64)
    scan, ffn = spec(Mamba2, head_dim=64, d_state=128, chunk_size=256), spec(SwiGLU, d_ff=14336)
    layers = tuple(Layer(attention if i in (9, 18, 27) else scan, ffn) for i in range(32))
    return ModelConfig(vocab_size=128256, d_model=4096, layers=layers, norm=spec(RMSNorm, eps=1e-5), max_seq_len=4096)


_TURN = "M-M-M-M-M*-"  # five layers of Mamba-2, then attention, each before a feed-forward layer
_8B = "M-M-M-M*-" + 3 * _TURN + "M-M-M-M-M-"
_56B = "M-M-M-M*-" + 9 * _TURN + "M-M-M-M-M-"
_47B = 8 * "M-" + "M*-" + 9 * "M-" + "M*-" + 2 * _TURN + 6 * "M-" + "M---MM---M-M*-M-M-M-M-M-"


def nemotron_h(d_model: int, pattern: str, num_heads: int, scan_heads: int, d_state: int, d_ff: int) -> ModelConfig:
    """Nemotron-H: one letter for each layer, M Mamba-2, * attention without positions, − a feed-forward by itself."""
    layers = {
        "M": Layer(spec(
            Mamba2, num_heads=scan_heads, head_dim=64, expand=None, d_state=d_state, n_groups=8, chunk_size=128,
            dt_limit=(0.001, math.inf),
        )),
        "*": Layer(spec(Attention, num_heads=num_heads, num_kv_heads=8, head_dim=128)),
        "-": Layer(ffn=spec(MLP, d_ff=d_ff, activation="relu2", bias=False)),
    }  # fmt: skip
    return ModelConfig(
        vocab_size=131072, d_model=d_model, layers=tuple(layers[kind] for kind in pattern),
        norm=spec(RMSNorm, eps=1e-5), max_seq_len=8192,
    )  # fmt: skip


def falcon_h1_small() -> ModelConfig:
    """Falcon-H1-0.5B: attention and Mamba-2 side by side in every layer. The factors are muP's, left in the model.

    That of the keys, 0.39, is part of the attention's scale, for scores are linear in the keys.
    """
    keys, z, x = 0.39062499999999994, 8**-0.5, 0.25
    attention = spec(Attention, num_heads=8, num_kv_heads=2, head_dim=64, rope_theta=1e11, scale=keys / 8)
    scan = spec(
        Mamba2, num_heads=24, head_dim=64, expand=None, d_state=128, chunk_size=128, gated_norm=False,
        part_scales=(z, x, z, 0.5, z),
    )  # fmt: skip
    mixer = spec(ParallelHeads, mixers=(attention, scan), input_scales=(1.0, 1.25), output_scales=(0.9375, 2**0.5 / 6))
    ffn = spec(ScaledSwiGLU, d_ff=2048, gate_scale=0.78125**0.5, output_scale=0.5859375)
    return ModelConfig(
        vocab_size=32784, d_model=1024, layers=36 * (Layer(mixer, ffn),), norm=spec(RMSNorm, eps=1e-5),
        embedding_scale=32**0.5, logit_scale=0.0390625, max_seq_len=16384,
    )  # fmt: skip


def book_hybrid(*, sparse: bool = False) -> ModelConfig:
    """The book's own small example, not a published model: Mamba-2, and latent attention in every fourth layer.

    It has no positions, since the scan knows the order. With `sparse`, every second feed-forward is a mixture of 8
    experts and one that all tokens share.
    """
    norm, dense = spec(RMSNorm, eps=1e-5), spec(SwiGLU, d_ff=512)
    latent = spec(MLA, num_heads=4, kv_latent_dim=64, head_dim=48, d_rope=0)
    scan = spec(Mamba2, head_dim=32, d_state=32)
    moe = spec(
        MoE, num_experts=8, top_k=2, expert=spec(SwiGLU, d_ff=128), num_shared_experts=1,
        router=spec(TopKRouter, norm_topk_prob=True),
    )  # fmt: skip
    layers = (Layer(latent if i % 4 == 3 else scan, moe if sparse and i % 2 == 1 else dense) for i in range(8))
    return ModelConfig(
        vocab_size=256, d_model=192, layers=tuple(layers), norm=norm, tie_embeddings=True, max_seq_len=1024,
        name=f"book's own: Mamba-2 + MLA{' + MoE' if sparse else ''}",
    )  # fmt: skip


publish("samba-421m", "samba", "421M", 2024, SAMBA, lambda: samba(1536, 12, 12, 4096))
publish("samba-1.3b", "samba", "1.3B", 2024, SAMBA, lambda: samba(2304, 18, 18, 6144))
publish(
    "zamba2-1.2b", "zamba2", "1.2B", 2024, ZAMBA2,
    lambda: zamba2(
        2048, 38, (5, 11, 17, 23, 29, 35), 128, num_blocks=1, rope_theta=10000.0, attention_adapter=True
    ),
)  # fmt: skip
publish(
    "zamba2-2.7b", "zamba2", "2.7B", 2024, ZAMBA2,
    lambda: zamba2(2560, 54, (6, 12, 18, 24, 30, 36, 42, 47, 51), 64, num_blocks=2),
)  # fmt: skip
publish("bamba-9b", "bamba", "9.78B", 2024, BAMBA, bamba)
publish("falcon-h1-0.5b", "falcon-h1", "0.5B", 2025, FALCON_H1, falcon_h1_small)
for _name, _source, *_sizes in (
    ("4b", NEMOTRON_H_4B, 3072, _8B, 32, 112, 128, 12288),
    ("8b", NEMOTRON_H, 4096, _8B, 32, 128, 128, 21504),
    ("47b", NEMOTRON_H, 8192, _47B, 64, 256, 256, 30720),
    ("56b", NEMOTRON_H, 8192, _56B, 64, 256, 256, 32768),
):
    publish(f"nemotron-h-{_name}", "nemotron-h", _name.upper(), 2025, _source, lambda s=_sizes: nemotron_h(*s))
