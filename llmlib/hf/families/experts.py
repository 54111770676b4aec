"""Families with routed experts: Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2 and V3, gpt-oss."""

from llmlib.attention import MLA, Attention
from llmlib.ffn import ClampedSwiGLU
from llmlib.hf.families.llamas import (
    ATTENTION,
    BLOCK,
    BUFFERS,
    ENDS,
    FFN,
    FILE,
    LLAMA,
    PRE_NORMS,
    QK_NORMS,
    assemble,
    gated,
    head_width,
    heads,
    qwen_window,
    windows,
)  # fmt: skip
from llmlib.hf.keys import Keys, rotary
from llmlib.hf.loading import family
from llmlib.hf.tables import linear
from llmlib.model import Layer, ModelConfig, Spec, spec
from llmlib.moe import MoE, TopKRouter
from llmlib.norm import RMSNorm

EXPERTS = {
    BLOCK + "ffn.router.weight": FILE + "mlp.gate.weight",
    **{
        f"{BLOCK}ffn.experts.{part}_proj.weight": f"{FILE}mlp.experts.{{e}}.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
SHARED = {
    row: name
    for part in ("gate", "up", "down")
    for row, name in linear(f"{BLOCK}ffn.shared_experts.{part}_proj", f"{FILE}mlp.shared_experts.{part}_proj").items()
}
MIXTRAL = LLAMA | {
    BLOCK + "ffn.router.weight": FILE + "block_sparse_moe.gate.weight",
    BLOCK + "ffn.experts.gate_proj.weight": FILE + "block_sparse_moe.experts.{e}.w1.weight",
    BLOCK + "ffn.experts.up_proj.weight": FILE + "block_sparse_moe.experts.{e}.w3.weight",
    BLOCK + "ffn.experts.down_proj.weight": FILE + "block_sparse_moe.experts.{e}.w2.weight",
}


def routed(c: Keys, expert: Spec, experts: int, **options) -> Spec:
    """The mixture with the number of experts that each token takes."""
    top_k = c("num_experts_per_tok", also=("experts_per_token",))
    return spec(MoE, num_experts=experts, top_k=top_k, expert=expert, **options)


@family("mixtral", table=MIXTRAL, buffers=BUFFERS)
def mixtral(c: Keys) -> ModelConfig:
    """Mixtral: Mistral with 8 experts, 2 for each token (arXiv 2401.04088)."""
    mixer = spec(Attention, **heads(c, window=c("sliding_window", None)), **rotary(c, head_width(c), theta=1e6))
    ffn = routed(c, gated(c), c("num_local_experts"), router=spec(TopKRouter, scoring="softmax_of_top_k"))
    return assemble(c, c("num_hidden_layers") * (Layer(mixer, ffn),), norm=spec(RMSNorm, eps=c("rms_norm_eps", 1e-5)))


@family("qwen3_moe", table=LLAMA | QK_NORMS | EXPERTS, buffers=BUFFERS)
def qwen3_moe(c: Keys) -> ModelConfig:
    """Qwen3's mixtures, some layers dense (arXiv 2505.09388)."""
    c.ignore("max_window_layers", "layer_types")  # a window is every layer's here
    qk_norm = spec(RMSNorm, eps=c("rms_norm_eps", 1e-6))
    mixer = spec(
        Attention, **heads(c, bias=c("attention_bias", False), qk_norm=qk_norm, window=qwen_window(c)),
        **rotary(c, head_width(c)),
    )  # fmt: skip
    router = spec(TopKRouter, norm_topk_prob=c("norm_topk_prob", False))
    experts = c("num_experts", also=("num_local_experts",))
    sparse = routed(c, gated(c, width="moe_intermediate_size"), experts, router=router)
    dense, every, only = gated(c), c("decoder_sparse_step", 1), set(c("mlp_only_layers", []))
    return assemble(
        c, [Layer(mixer, dense if i in only or (i + 1) % every else sparse) for i in range(c("num_hidden_layers"))]
    )


@family("olmoe", table=LLAMA | QK_NORMS | EXPERTS, buffers=BUFFERS)
def olmoe(c: Keys) -> ModelConfig:
    """OLMoE: 64 narrow experts, norms on whole queries and keys (arXiv 2409.02060)."""
    eps = c("rms_norm_eps", 1e-5)
    mixer = spec(
        Attention, **heads(c, bias=c("attention_bias", False), clip_qkv=c("clip_qkv", None)),
        **rotary(c, head_width(c)), qk_norm=spec(RMSNorm, eps=eps), qk_norm_over="width",
    )  # fmt: skip
    ffn = routed(c, gated(c), c("num_experts"), router=spec(TopKRouter, norm_topk_prob=c("norm_topk_prob", False)))
    return assemble(c, c("num_hidden_layers") * (Layer(mixer, ffn),), norm=spec(RMSNorm, eps=eps))


LATENT = {
    **linear(BLOCK + "mixer.q_proj", FILE + "self_attn.q_proj"),
    **linear(BLOCK + "mixer.q_a_proj", FILE + "self_attn.q_a_proj"),
    **linear(BLOCK + "mixer.q_b_proj", FILE + "self_attn.q_b_proj"),
    **linear(BLOCK + "mixer.kv_a_proj", FILE + "self_attn.kv_a_proj_with_mqa"),
    **linear(BLOCK + "mixer.kv_b_proj", FILE + "self_attn.kv_b_proj"),
    **linear(BLOCK + "mixer.o_proj", FILE + "self_attn.o_proj"),
    BLOCK + "mixer.q_a_norm.weight": FILE + "self_attn.q_a_layernorm.weight",
    BLOCK + "mixer.kv_a_norm.weight": FILE + "self_attn.kv_a_layernorm.weight",
}
DEEPSEEK = ENDS | PRE_NORMS | LATENT | FFN | EXPERTS | SHARED
BIASED = {BLOCK + "ffn.router.e_score_correction_bias": FILE + "mlp.gate.e_score_correction_bias"}


def latent_attention(c: Keys, interleaved: bool) -> Spec:
    """MLA by DeepSeek's keys."""
    c.ignore("num_key_value_heads", "head_dim", "qk_head_dim")
    width = c("qk_rope_head_dim")
    turn = rotary(c, width)
    turn.pop("rope_dim")
    return spec(
        MLA, num_heads=c("num_attention_heads"), kv_latent_dim=c("kv_lora_rank"),
        q_latent_dim=c.nullable("q_lora_rank", 1536), head_dim=c("qk_nope_head_dim"), v_head_dim=c("v_head_dim"),
        d_rope=width, rope_interleaved=interleaved, bias=c("attention_bias", False),
        norm=spec(RMSNorm, eps=1e-6), **turn,
    )  # fmt: skip


def deepseek(c: Keys, mixer: Spec, router: Spec) -> ModelConfig:
    """Dense layers first, then routed and shared experts."""
    c.only("moe_layer_freq", 1)
    c.ignore("seq_aux", "aux_loss_alpha", "ep_size", "num_nextn_predict_layers")
    dense, first = gated(c), c("first_k_dense_replace", 0)
    expert, shared = dense.replace(d_ff=c("moe_intermediate_size"), bias=False), c("n_shared_experts", 0)
    sparse = routed(
        c, expert, c("n_routed_experts"), router=router,
        shared_expert=dense.replace(d_ff=shared * c("moe_intermediate_size")) if shared else None,
    )  # fmt: skip
    return assemble(c, [Layer(mixer, dense if i < first else sparse) for i in range(c("num_hidden_layers"))])


@family("deepseek_v2", table=DEEPSEEK, buffers=BUFFERS)
def deepseek_v2(c: Keys) -> ModelConfig:
    """DeepSeek-V2: latent attention, routed experts beside shared ones (arXiv 2405.04434)."""
    c.only("scoring_func", "softmax")
    c.presume("n_shared_experts", 2)
    c.ignore("norm_topk_prob")  # transformers' model doesn't read it, and the published values have it off
    grouped = c.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    groups = {"n_group": c("n_group", 1), "topk_group": c("topk_group", 1)}
    router = spec(
        TopKRouter, routed_scaling_factor=float(c("routed_scaling_factor", 1.0)), **(groups if grouped else {})
    )
    return deepseek(c, latent_attention(c, interleaved=True), router)


V3_DEFAULTS = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1,
               "first_k_dense_replace": 3}  # fmt: skip


@family("deepseek_v3", table=DEEPSEEK | BIASED, buffers=(*BUFFERS, r"^model\.layers\.61\."))
def deepseek_v3(c: Keys) -> ModelConfig:
    """DeepSeek-V3: V2 with sigmoid scores and a balancing bias (arXiv 2412.19437)."""
    c.only("scoring_func", "sigmoid")
    c.only("topk_method", "noaux_tc")
    c.only("mlp_bias", False)
    for name, value in V3_DEFAULTS.items():
        c.presume(name, value)
    router = spec(
        TopKRouter, scoring="sigmoid", correction_bias=True, norm_topk_prob=c("norm_topk_prob", True),
        n_group=c("n_group"), topk_group=c("topk_group"), group_score="top2",
        routed_scaling_factor=float(c("routed_scaling_factor")),
    )  # fmt: skip
    return deepseek(c, latent_attention(c, c("rope_interleave", True)), router)


GPT_OSS = ENDS | ATTENTION | PRE_NORMS | linear(BLOCK + "ffn.router", FILE + "mlp.router") | {
    BLOCK + "mixer.sinks": FILE + "self_attn.sinks",
    BLOCK + "ffn.experts.gate_proj.weight": FILE + "mlp.experts.gate_up_proj | T12 | step1 0/2",
    BLOCK + "ffn.experts.up_proj.weight": FILE + "mlp.experts.gate_up_proj | T12 | step1 1/2",
    BLOCK + "ffn.experts.down_proj.weight": FILE + "mlp.experts.down_proj | T12",
    BLOCK + "ffn.experts.gate_proj.bias": FILE + "mlp.experts.gate_up_proj_bias | step1 0/2",
    BLOCK + "ffn.experts.up_proj.bias": FILE + "mlp.experts.gate_up_proj_bias | step1 1/2",
    BLOCK + "ffn.experts.down_proj.bias": FILE + "mlp.experts.down_proj_bias",
}  # fmt: skip


GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096}  # fmt: skip


@family("gpt_oss", table=GPT_OSS, buffers=BUFFERS)
def gpt_oss(c: Keys) -> ModelConfig:
    """gpt-oss: sinks, windows in every other layer, clamped experts (arXiv 2508.10925)."""
    c.only("hidden_act", "silu")
    c.ignore("initial_context_length")
    c.presume("max_position_embeddings", 131072)
    c.presume("rope_parameters", GPT_OSS_ROPE)
    mixer = spec(
        Attention, **heads(c, bias=c("attention_bias", True), sinks=True), **rotary(c, head_width(c), theta=150000.0)
    )
    expert = spec(
        ClampedSwiGLU, d_ff=c("intermediate_size"), bias=True, alpha=c("swiglu_alpha", 1.702),
        limit=c("swiglu_limit", 7.0),
    )  # fmt: skip
    router = spec(TopKRouter, scoring="softmax_of_top_k", bias=True)
    ffn = routed(c, expert, c("num_local_experts", also=("num_experts",)), router=router)
    every_second = ["sliding_attention", "full_attention"] * c("num_hidden_layers")
    c.presume("layer_types", every_second[: c("num_hidden_layers")])
    return assemble(
        c, [Layer(mixer.replace(window=w), ffn) for w in windows(c, c("sliding_window", 128))],
        norm=spec(RMSNorm, eps=c("rms_norm_eps", 1e-5)),
    )  # fmt: skip
