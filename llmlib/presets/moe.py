"""Mixtures of experts: Mixtral, DeepSeek-V2 and V3, OLMoE, Qwen3, gpt-oss.

What the publishers count as active parameters, in billions; `cost.parameters(config, active=True)` counts everything
that a token passes through, and the embedding and the head whole:

    Mixtral 8×7B 12.9, 8×22B 39     everything
    OLMoE 1.3                       everything
    Qwen3-30B-A3B 3.3, 235B-A22B 22 everything
    DeepSeek-V2 21                  everything, though without the embedding it rounds to the same
    gpt-oss-20b 3.61, 120b 5.13     the head, but not the embedding
    DeepSeek-V3 36.6 (37)           the head (0.9), but not the embedding (0.9); its repository's README_WEIGHTS first
                                    said 36.7 with both, which would be 37.6. The total of 671 leaves out the extra
                                    prediction head of its training
"""

from llmlib.attention import MLA, Attention
from llmlib.ffn import ClampedSwiGLU, SwiGLU
from llmlib.model import Layer, ModelConfig, spec
from llmlib.moe import MoE, TopKRouter
from llmlib.norm import RMSNorm
from llmlib.presets.registry import publish

MIXTRAL = "Jiang et al. (2024), https://arxiv.org/abs/2401.04088"
MIXTRAL_22B = "https://huggingface.co/mistralai/Mixtral-8x22B-v0.1"
OLMOE = "Muennighoff et al. (2024), https://arxiv.org/abs/2409.02060"
QWEN3 = "Yang et al. (2025), https://arxiv.org/abs/2505.09388"
GPT_OSS = "OpenAI (2025), https://arxiv.org/abs/2508.10925"
DEEPSEEK_V2 = "DeepSeek-AI (2024), https://arxiv.org/abs/2405.04434"
DEEPSEEK_V3 = "DeepSeek-AI (2024), https://arxiv.org/abs/2412.19437"


def mixtral(d_model: int = 4096, num_layers: int = 32, num_heads: int = 32, d_ff: int = 14336, **sizes) -> ModelConfig:
    """Mixtral: 8 experts as wide as a dense feed-forward, 2 for each token."""
    moe = spec(
        MoE, num_experts=8, top_k=2, expert=spec(SwiGLU, d_ff=d_ff), router=spec(TopKRouter, scoring="softmax_of_top_k")
    )
    layer = Layer(mixer=spec(Attention, num_heads=num_heads, num_kv_heads=8, rope_theta=1e6), ffn=moe)
    sizes = {"vocab_size": 32000, "max_seq_len": 32768} | sizes
    return ModelConfig(d_model=d_model, layers=num_layers * (layer,), norm=spec(RMSNorm, eps=1e-5), **sizes)


def olmoe() -> ModelConfig:
    """OLMoE-1B-7B: 64 narrow experts, 8 for each token, whose weights aren't renormalised."""
    layer = Layer(
        mixer=spec(
            Attention, num_heads=16, num_kv_heads=16, rope_theta=10000.0, qk_norm=spec(RMSNorm, eps=1e-5),
            qk_norm_over="width",
        ),
        ffn=spec(MoE, num_experts=64, top_k=8, expert=spec(SwiGLU, d_ff=1024)),
    )  # fmt: skip
    return ModelConfig(
        vocab_size=50304, d_model=2048, layers=16 * (layer,), norm=spec(RMSNorm, eps=1e-5), max_seq_len=4096
    )


def qwen3_moe(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    """Qwen3's mixtures: 128 experts, 8 for each token, renormalised."""
    layer = Layer(
        mixer=spec(
            Attention, num_heads=num_heads, num_kv_heads=4, head_dim=128, rope_theta=1e6,
            qk_norm=spec(RMSNorm, eps=1e-6),
        ),
        ffn=spec(
            MoE, num_experts=128, top_k=8, expert=spec(SwiGLU, d_ff=d_ff), router=spec(TopKRouter, norm_topk_prob=True)
        ),
    )  # fmt: skip
    return ModelConfig(
        vocab_size=151936, d_model=d_model, layers=num_layers * (layer,), norm=spec(RMSNorm, eps=1e-6),
        max_seq_len=40960,
    )  # fmt: skip


def gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
    """gpt-oss: biases everywhere, clamped experts, sinks, and a window of 128 in every other layer."""
    yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    mixer = spec(
        Attention, num_heads=64, num_kv_heads=8, head_dim=64, rope_theta=150000.0, rope_scaling=yarn, bias=True,
        sinks=True,
    )  # fmt: skip
    moe = spec(
        MoE, num_experts=num_experts, top_k=4, expert=spec(ClampedSwiGLU, d_ff=2880, bias=True),
        router=spec(TopKRouter, scoring="softmax_of_top_k", bias=True),
    )  # fmt: skip
    pair = Layer(mixer=mixer.replace(window=128), ffn=moe), Layer(mixer=mixer, ffn=moe)
    return ModelConfig(
        vocab_size=201088, d_model=2880, layers=num_layers // 2 * pair, norm=spec(RMSNorm, eps=1e-5),
        max_seq_len=131072,
    )  # fmt: skip


def deepseek(
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    *,
    dense_layers: int,
    num_experts: int,
    top_k: int,
    expert_d_ff: int,
    num_shared_experts: int,
    router: dict,
    q_latent_dim: int | None = 1536,
    vocab_size: int = 102400,
    mscale: float = 0.707,
) -> ModelConfig:
    """DeepSeek-V2 and V3: latent attention; dense layers first, then many narrow experts beside shared ones."""
    yarn = {
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "mscale": mscale, "mscale_all_dim": mscale,
    }  # fmt: skip
    norm = spec(RMSNorm, eps=1e-6)
    mixer = spec(
        MLA, num_heads=num_heads, kv_latent_dim=512, q_latent_dim=q_latent_dim, head_dim=128, d_rope=64, v_head_dim=128,
        rope_theta=10000.0, rope_interleaved=True, rope_scaling=yarn, norm=norm,
    )  # fmt: skip
    moe = spec(
        MoE, num_experts=num_experts, top_k=top_k, expert=spec(SwiGLU, d_ff=expert_d_ff),
        num_shared_experts=num_shared_experts, router=spec(TopKRouter, **router),
    )  # fmt: skip
    dense, sparse = Layer(mixer=mixer, ffn=spec(SwiGLU, d_ff=d_ff)), Layer(mixer=mixer, ffn=moe)
    return ModelConfig(
        vocab_size=vocab_size, d_model=d_model, norm=norm, max_seq_len=163840,
        layers=dense_layers * (dense,) + (num_layers - dense_layers) * (sparse,),
    )  # fmt: skip


def deepseek_v2() -> ModelConfig:
    """160 routed experts in 8 groups, one group for each node; a token's 6 come from its best 3."""
    return deepseek(
        5120, 60, 128, 12288, dense_layers=1, num_experts=160, top_k=6, expert_d_ff=1536, num_shared_experts=2,
        router={"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
    )  # fmt: skip


def deepseek_v2_lite() -> ModelConfig:
    """The small V2: queries without a latent, no groups."""
    return deepseek(
        2048, 27, 16, 10944, dense_layers=1, num_experts=64, top_k=6, expert_d_ff=1408, num_shared_experts=2, router={},
        q_latent_dim=None,
    )  # fmt: skip


def deepseek_v3() -> ModelConfig:
    """256 routed experts and a shared one, balanced by a bias; without the extra prediction head of its training."""
    return deepseek(
        7168, 61, 128, 18432, dense_layers=3, num_experts=256, top_k=8, expert_d_ff=2048, num_shared_experts=1,
        router={
            "scoring": "sigmoid", "norm_topk_prob": True, "correction_bias": True, "n_group": 8, "topk_group": 4,
            "group_score": "top2", "routed_scaling_factor": 2.5,
        },
        vocab_size=129280, mscale=1.0,
    )  # fmt: skip


publish("mixtral-8x7b", "mixtral", "8x7B", 2023, MIXTRAL, mixtral)
publish("mixtral-8x22b", "mixtral", "8x22B", 2024, MIXTRAL_22B, lambda: mixtral(6144, 56, 48, 16384, max_seq_len=65536))
publish("olmoe-1b-7b", "olmoe", "1B-7B", 2024, OLMOE, olmoe)
publish("qwen3-30b-a3b", "qwen3-moe", "30B-A3B", 2025, QWEN3, lambda: qwen3_moe(2048, 48, 32, 768))
publish("qwen3-235b-a22b", "qwen3-moe", "235B-A22B", 2025, QWEN3, lambda: qwen3_moe(4096, 94, 64, 1536))
publish("gpt-oss-20b", "gpt-oss", "20B", 2025, GPT_OSS, lambda: gpt_oss(24, 32))
publish("gpt-oss-120b", "gpt-oss", "120B", 2025, GPT_OSS, lambda: gpt_oss(36, 128))
publish("deepseek-v2-lite", "deepseek", "16B", 2024, DEEPSEEK_V2, deepseek_v2_lite)
publish("deepseek-v2", "deepseek", "236B", 2024, DEEPSEEK_V2, deepseek_v2)
publish("deepseek-v3", "deepseek", "671B", 2024, DEEPSEEK_V3, deepseek_v3)
