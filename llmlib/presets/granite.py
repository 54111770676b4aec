"""Granite 4.0: Mamba-2 with one attention layer in ten and no positions, dense or with experts; and attention alone.

The multipliers are maximal-update parametrisation made visible: on the embedding, the scores, what each layer adds,
and the logits. What isn't in a paper is from the model cards and config files.
"""

from llmlib.attention import Attention
from llmlib.ffn import SwiGLU
from llmlib.model import Layer, ModelConfig, spec
from llmlib.moe import MoE, TopKRouter
from llmlib.norm import RMSNorm
from llmlib.presets.registry import publish
from llmlib.ssm import Mamba2

CARD = "https://huggingface.co/ibm-granite/granite-4.0-{}-base"
TENTHS, NANO = (5, 15, 25, 35), (10, 13, 17, 27)


def granite(
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    d_ff: int,
    *,
    attention_at: tuple[int, ...] | None = None,
    scan_heads: int = 0,
    scan_head_dim: int = 64,
    experts: tuple[int, int, int] | None = None,
    logits_scaling: float,
    max_seq_len: int = 131072,
) -> ModelConfig:
    """Granite 4.0 of any size.

    attention_at  which layers are attention, the others being Mamba-2; None: all are, with rotary positions
    experts       (how many, how many for each token, width of each) beside the shared one of width d_ff
    """
    norm, hybrid = spec(RMSNorm, eps=1e-5), attention_at is not None
    attention = spec(
        Attention, num_heads=num_heads, num_kv_heads=num_kv_heads, scale=num_heads / d_model,
        rope_theta=None if hybrid else 1e7,
    )  # fmt: skip
    scan = hybrid and spec(Mamba2, num_heads=scan_heads, head_dim=scan_head_dim, d_state=128, chunk_size=256)
    ffn = shared = spec(SwiGLU, d_ff=d_ff)
    if experts is not None:
        number, top_k, width = experts
        ffn = spec(
            MoE, num_experts=number, top_k=top_k, expert=spec(SwiGLU, d_ff=width), shared_expert=shared,
            router=spec(TopKRouter, scoring="softmax_of_top_k"),
        )  # fmt: skip
    layers = tuple(
        Layer(
            attention if not hybrid or i in attention_at else scan, ffn, residual_scale=0.22 * (40 / num_layers) ** 0.5
        )
        for i in range(num_layers)
    )
    return ModelConfig(
        vocab_size=100352, d_model=d_model, layers=layers, norm=norm, tie_embeddings=True, embedding_scale=12.0,
        logit_scale=1 / logits_scaling, max_seq_len=max_seq_len,
    )  # fmt: skip


_SIZES = {
    "h-small": ("32B", (4096, 40, 32, 8, 1536),
                {"attention_at": TENTHS, "scan_heads": 128, "experts": (72, 10, 768), "logits_scaling": 16}),
    "h-tiny": ("7B", (1536, 40, 12, 4, 1024),
               {"attention_at": TENTHS, "scan_heads": 48, "experts": (64, 6, 512), "logits_scaling": 6}),
    "h-micro": ("3B", (2048, 40, 32, 8, 8192), {"attention_at": TENTHS, "scan_heads": 64, "logits_scaling": 8}),
    "micro": ("3B", (2560, 40, 40, 8, 8192), {"logits_scaling": 10}),
    "h-1b": ("1.5B", (1536, 40, 12, 4, 4096), {"attention_at": TENTHS, "scan_heads": 48, "logits_scaling": 6}),
    "1b": ("1.6B", (2048, 40, 16, 4, 4096), {"logits_scaling": 8}),
    "h-350m": ("340M", (768, 32, 12, 4, 2048),
               {"attention_at": NANO, "scan_heads": 48, "scan_head_dim": 32, "logits_scaling": 3,
                "max_seq_len": 32768}),
    "350m": ("350M", (1024, 28, 16, 4, 2048), {"logits_scaling": 4, "max_seq_len": 32768}),
}  # fmt: skip
for _name, (_label, _shape, _options) in _SIZES.items():
    publish(
        f"granite-4.0-{_name}", "granite-4", _label, 2025, CARD.format(_name),
        lambda s=_shape, o=_options: granite(*s, **o),
    )  # fmt: skip
