"""Families with state spaces: Mamba, Falcon-Mamba, Mamba-2, and the hybrids Jamba, Bamba, Falcon-H1, Granite 4,
Nemotron-H, Zamba2."""

import math

from llmlib.attention import Attention
from llmlib.ffn import MLP, ScaledSwiGLU, SwiGLU
from llmlib.hf.families.experts import routed
from llmlib.hf.families.llamas import (
    ATTENTION,
    BLOCK,
    BUFFERS,
    ENDS,
    FILE,
    PRE_NORMS,
    assemble,
    gated,
    head_width,
    heads,
)
from llmlib.hf.keys import ACTIVATIONS, Keys, rotary
from llmlib.hf.loading import family
from llmlib.hf.tables import linear, norm
from llmlib.hybrid import Identity, ParallelHeads, SharedBlock, WithSharedBlock
from llmlib.model import Layer, ModelConfig, Spec, spec
from llmlib.moe import TopKRouter
from llmlib.norm import RMSNorm
from llmlib.ssm import Mamba, Mamba2


def scan_rows(theirs: str) -> dict[str, str]:
    """A Mamba or Mamba-2 layer, whose parameters both sides name alike."""
    plain = {f"{BLOCK}mixer.{name}": f"{theirs}.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight")}
    maps = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    return plain | {row: name for m in maps for row, name in linear(f"{BLOCK}mixer.{m}", f"{theirs}.{m}").items()}


BACKBONE = {
    "embedding.weight": "backbone.embeddings.weight",
    "head.weight": "lm_head.weight",
    "final_norm.weight": "backbone.norm_f.weight",
    BLOCK + "mixer_norm.weight": "backbone.layers.{i}.norm.weight",
    **scan_rows("backbone.layers.{i}.mixer"),
}


def steps(c: Keys) -> None:
    """Keys about how steps are initialised, and which kernel computes them."""
    c.ignore("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale",
             "use_associative_scan", "residual_in_fp32", "use_mamba_kernels", "use_mem_eff_path", "num_logits_to_keep",
             "mamba_chunk_size", "chunk_size")  # fmt: skip


def limits(c: Keys, low: float = 0.0) -> tuple[float, float]:
    """The range that steps are clamped to; JSON has no infinity, so some files write it as an object."""
    low, high = (
        float(v["__float__"]) if isinstance(v, dict) else float(v) for v in c("time_step_limit", (low, math.inf))
    )
    return low, high


def around(c: Keys, mixer: Spec, eps: float = 1e-5, tied: bool = True) -> ModelConfig:
    """A stack of one mixer and no feed-forward."""
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=c("hidden_size", also=("d_model",)), norm=spec(RMSNorm, eps=eps),
        layers=c("num_hidden_layers", also=("n_layer",)) * (Layer(mixer=mixer),),
        tie_embeddings=c("tie_word_embeddings", tied), name=c.data["model_type"],
    )  # fmt: skip


def mamba_1(c: Keys, **more) -> Spec:
    """Mamba-1 by its published keys."""
    steps(c)
    c.only("hidden_act", "silu", "swish")
    rank, d_model = c("time_step_rank", "auto"), c("hidden_size", also=("d_model",))
    width = c("intermediate_size", None, also=("d_inner",))
    return spec(
        Mamba, d_state=c("state_size", 16), d_conv=c("conv_kernel", 4), bias=c("use_bias", False),
        expand=width / d_model if width else c("expand", 2), conv_bias=c("use_conv_bias", True),
        dt_rank=None if rank == "auto" else rank, **more,
    )  # fmt: skip


@family("mamba", table=BACKBONE, prefix="backbone.")
def mamba(c: Keys) -> ModelConfig:
    """Mamba (arXiv 2312.00752)."""
    c.ignore("expand", "fused_add_norm", "rms_norm", "ssm_cfg", "pad_vocab_size_multiple")
    return around(c, mamba_1(c), c("layer_norm_epsilon", 1e-5))


@family("falcon_mamba", table=BACKBONE, prefix="backbone.")
def falcon_mamba(c: Keys) -> ModelConfig:
    """Falcon-Mamba: Mamba with norms on B, C and dt (arXiv 2410.05355)."""
    c.ignore("expand")
    inner = spec(RMSNorm, eps=c("mixer_rms_eps", 1e-6), weight=False)
    return around(c, mamba_1(c, inner_norm=inner), c("layer_norm_epsilon", 1e-5))


@family("mamba2", table=BACKBONE, prefix="backbone.")
def mamba2(c: Keys) -> ModelConfig:
    """Mamba-2 (arXiv 2405.21060)."""
    steps(c)
    c.only("hidden_act", "silu", "swish")
    c.only("norm_before_gate", False, True)  # neither transformers nor the published models read it
    c.ignore("rms_norm", "time_step_rank", "intermediate_size")
    eps = c("layer_norm_epsilon", 1e-5)
    mixer = spec(
        Mamba2, num_heads=c("num_heads", 128), head_dim=c("head_dim", 64), d_state=c("state_size", 128),
        n_groups=c("n_groups", 8), chunk_size=c("chunk_size", 256), d_conv=c("conv_kernel", 4), expand=c("expand", 2),
        bias=c("use_bias", False), conv_bias=c("use_conv_bias", True), dt_limit=limits(c), norm_eps=eps,
    )  # fmt: skip
    return around(c, mixer, eps, tied=False)


HYBRID_FFN = {
    row: name
    for part in ("gate_proj", "up_proj", "down_proj")
    for row, name in linear(f"{BLOCK}ffn.{part}", f"{FILE}feed_forward.{part}").items()
}
HYBRID = ENDS | ATTENTION | scan_rows(FILE + "mamba") | HYBRID_FFN | {
    "final_norm.weight": "model.final_layernorm.weight",
    BLOCK + "mixer_norm.weight": FILE + "input_layernorm.weight",
    BLOCK + "ffn_norm.weight": FILE + "pre_ff_layernorm.weight",
}  # fmt: skip
JAMBA = HYBRID | {
    BLOCK + "mixer.dt_norm.weight": FILE + "mamba.dt_layernorm.weight",
    BLOCK + "mixer.B_norm.weight": FILE + "mamba.b_layernorm.weight",
    BLOCK + "mixer.C_norm.weight": FILE + "mamba.c_layernorm.weight",
    BLOCK + "ffn.router.weight": FILE + "feed_forward.router.weight",
    **{
        f"{BLOCK}ffn.experts.{part}_proj.weight": f"{FILE}feed_forward.experts.{{e}}.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}


@family("jamba", table=JAMBA, buffers=BUFFERS)
def jamba(c: Keys) -> ModelConfig:
    """Jamba: Mamba, some attention without positions, some experts (arXiv 2403.19887)."""
    steps(c)
    c.only("hidden_act", "silu", "swish")  # the reference gives it to the scan too
    c.only("mamba_inner_layernorms", True)
    eps, rank = c("rms_norm_eps", 1e-6), c("mamba_dt_rank", "auto")
    attention = spec(Attention, **heads(c))
    scan = spec(
        Mamba, d_state=c("mamba_d_state", 16), d_conv=c("mamba_d_conv", 4), expand=c("mamba_expand", 2),
        dt_rank=None if rank == "auto" else rank, inner_norm=spec(RMSNorm, eps=eps),
        bias=c("mamba_proj_bias", False), conv_bias=c("mamba_conv_bias", True),
    )  # fmt: skip
    dense, experts = gated(c), c("num_experts", 16)
    sparse = routed(c, dense, experts) if experts > 1 else dense
    every, first = c("attn_layer_period", 8), c("attn_layer_offset", 4)
    moe_every, moe_first = c("expert_layer_period", 2), c("expert_layer_offset", 1)
    c.ignore("layers_block_type", "layer_types", "layers_num_experts", "num_experts_per_tok")
    layers = [
        Layer(attention if i % every == first else scan, sparse if i % moe_every == moe_first else dense)
        for i in range(c("num_hidden_layers"))
    ]
    return assemble(c, layers, norm=spec(RMSNorm, eps=eps))


def mamba_2(c: Keys, eps: float) -> Spec:
    """Mamba-2 by the keys of Bamba and Granite."""
    heads_wide, expand = c("mamba_d_head", "auto"), c("mamba_expand", 2)
    num_heads = c("mamba_n_heads", 128)
    return spec(
        Mamba2, num_heads=num_heads, expand=expand,
        head_dim=expand * c("hidden_size") // num_heads if heads_wide == "auto" else heads_wide,
        d_state=c("mamba_d_state", 256), n_groups=c("mamba_n_groups", 1), chunk_size=c("mamba_chunk_size", 256),
        d_conv=c("mamba_d_conv", 4), bias=c("mamba_proj_bias", False), conv_bias=c("mamba_conv_bias", True),
        dt_limit=limits(c), norm_eps=eps,
    )  # fmt: skip


@family("bamba", table=HYBRID, buffers=BUFFERS)
def bamba(c: Keys) -> ModelConfig:
    """Bamba: Mamba-2, some attention (https://huggingface.co/ibm-fms/Bamba-9B)."""
    steps(c)
    c.only("hidden_act", "silu", "swish")  # the reference gives it to the scan too
    c.only("partial_rotary_factor", 0.5)
    c.only("attn_rotary_emb", head_width(c) // 2)
    c.ignore("z_loss_coefficient", "layers_block_type", "layer_types")
    eps, at = c("rms_norm_eps", 1e-5), set(c("attn_layer_indices", []))
    attention = spec(Attention, **heads(c, bias=c("attention_bias", False)), **rotary(c, head_width(c), fraction=0.5))
    scan, ffn = mamba_2(c, eps), gated(c)
    layers = [Layer(attention if i in at else scan, ffn) for i in range(c("num_hidden_layers"))]
    return assemble(c, layers, norm=spec(RMSNorm, eps=eps))


def inside(table: dict[str, str], part: int) -> dict[str, str]:
    """The rows of a mixer, where it is one of several parallel ones."""
    return {row.replace("mixer.", f"mixer.mixers.{part}."): name for row, name in table.items()}


FALCON_H1 = {row: name for row, name in HYBRID.items() if "mixer." not in row} | (
    inside(ATTENTION, 0) | inside(scan_rows(FILE + "mamba"), 1)
)


@family("falcon_h1", table=FALCON_H1, buffers=BUFFERS)
def falcon_h1(c: Keys) -> ModelConfig:
    steps(c)
    c.only("hidden_act", "silu", "swish")  # the reference gives it to the scan too
    c.only("projectors_bias", c("mamba_proj_bias", False))
    c.only("mamba_use_mlp", True)
    c.ignore("mlp_expansion_factor", "layers_block_type", "layer_types")
    eps, head_dim, one = c("rms_norm_eps", 1e-5), head_width(c), 1.0
    options = heads(c, bias=c("attention_bias", False), scale=c("key_multiplier", one) * head_dim**-0.5)
    scan = mamba_2(c, eps).replace(
        gated_norm=c("mamba_rms_norm", False), norm_before_gate=c("mamba_norm_before_gate", True),
        part_scales=c("ssm_multipliers", 5 * (one,)),
    )  # fmt: skip
    if (width := c.nullable("mamba_d_ssm", 1024)) is not None:
        scan = scan.replace(expand=width / c("hidden_size"))
        if c("mamba_d_head", "auto") == "auto":
            scan = scan.replace(head_dim=width // c("mamba_n_heads", 128))
    mixer = spec(
        ParallelHeads, mixers=(spec(Attention, **options, **rotary(c, head_dim)), scan),
        input_scales=(c("attention_in_multiplier", one), c("ssm_in_multiplier", one)),
        output_scales=(c("attention_out_multiplier", one), c("ssm_out_multiplier", one)),
    )  # fmt: skip
    gate, output = c("mlp_multipliers", (one, one))
    ffn = spec(
        ScaledSwiGLU, d_ff=c("intermediate_size"), bias=c("mlp_bias", False), gate_scale=gate, output_scale=output
    )  # fmt: skip
    return assemble(
        c, c("num_hidden_layers") * [Layer(mixer, ffn)], norm=spec(RMSNorm, eps=eps),
        embedding_scale=c("embedding_multiplier", one), logit_scale=c("lm_head_multiplier", one),
    )  # fmt: skip


def halves(ours: str, theirs: str, step: str) -> dict[str, str]:
    """gate_proj and up_proj out of one matrix that holds both."""
    return {f"{ours}.gate_proj.weight": f"{theirs} | {step} 0/2", f"{ours}.up_proj.weight": f"{theirs} | {step} 1/2"}


GRANITE = ENDS | ATTENTION | PRE_NORMS | scan_rows(FILE + "mamba") | {
    **halves(BLOCK + "ffn", FILE + "shared_mlp.input_linear.weight", "part"),
    BLOCK + "ffn.down_proj.weight": FILE + "shared_mlp.output_linear.weight",
    **halves(BLOCK + "ffn.shared_experts", FILE + "shared_mlp.input_linear.weight", "part"),
    BLOCK + "ffn.shared_experts.down_proj.weight": FILE + "shared_mlp.output_linear.weight",
    BLOCK + "ffn.router.weight": FILE + "block_sparse_moe.router.layer.weight",
    **halves(BLOCK + "ffn.experts", FILE + "block_sparse_moe.input_linear.weight", "part1"),
    BLOCK + "ffn.experts.down_proj.weight": FILE + "block_sparse_moe.output_linear.weight",
}  # fmt: skip


@family("granitemoehybrid", table=GRANITE, buffers=BUFFERS)
def granite_hybrid(c: Keys) -> ModelConfig:
    """Granite 4: Mamba-2 or attention, dense or experts (https://huggingface.co/ibm-granite)."""
    steps(c)
    c.only("hidden_act", "silu", "swish")
    c.ignore(
        "rope_parameters", "rope_theta", "rope_scaling", "init_method", "normalization_function", "layers_block_type"
    )
    eps, turns = c("rms_norm_eps", 1e-6), c("position_embedding_type", "nope") == "rope"
    attention = spec(
        Attention,
        **heads(c, bias=c("attention_bias", False), scale=c("attention_multiplier", 1.0)),
        **(rotary(c, head_width(c)) if turns else {}),
    )
    turn = {"attention": True, "full_attention": True, "mamba": False, "linear_attention": False}
    attends = c.each("layer_types", turn, ["mamba"] * c("num_hidden_layers"))
    c.ignore("time_step_limit", *[k for k in c.data if k.startswith("mamba_")])
    scan = None if all(attends) else mamba_2(c, eps)
    ffn = shared = spec(SwiGLU, d_ff=c("shared_intermediate_size", 1024))
    if c("num_local_experts", 0):
        expert = spec(SwiGLU, d_ff=c("intermediate_size"))
        router = spec(TopKRouter, scoring="softmax_of_top_k")
        ffn = routed(c, expert, c("num_local_experts"), router=router, shared_expert=shared)
    c.ignore("intermediate_size", "num_experts_per_tok")
    layers = [Layer(attention if here else scan, ffn, residual_scale=c("residual_multiplier", 1.0)) for here in attends]
    return assemble(
        c, layers, norm=spec(RMSNorm, eps=eps), embedding_scale=c("embedding_multiplier", 1.0),
        logit_scale=1 / c("logits_scaling", 1.0),
    )  # fmt: skip


T = "backbone.layers.{i}.mixer"
NEMOTRON = BACKBONE | norm(BLOCK + "ffn_norm", "backbone.layers.{i}.norm") | {
    **{row: name for n in "qkvo" for row, name in linear(f"{BLOCK}mixer.{n}_proj", f"{T}.{n}_proj").items()},
    **linear(BLOCK + "ffn.up_proj", T + ".up_proj"),
    **linear(BLOCK + "ffn.down_proj", T + ".down_proj"),
    BLOCK + "ffn.router.weight": T + ".gate.weight",
    BLOCK + "ffn.router.e_score_correction_bias": T + ".gate.e_score_correction_bias",
    BLOCK + "ffn.experts.up_proj.weight": T + ".experts.{e}.up_proj.weight",
    BLOCK + "ffn.experts.down_proj.weight": T + ".experts.{e}.down_proj.weight",
    **linear(BLOCK + "ffn.shared_experts.up_proj", T + ".shared_experts.up_proj"),
    **linear(BLOCK + "ffn.shared_experts.down_proj", T + ".shared_experts.down_proj"),
    **linear(BLOCK + "ffn.latent_in_proj", T + ".fc1_latent_proj"),
    **linear(BLOCK + "ffn.latent_out_proj", T + ".fc2_latent_proj"),
}  # fmt: skip
KINDS = {
    "M": "mamba", "*": "attention", "-": "mlp", "E": "moe", "linear_attention": "mamba", "full_attention": "attention",
    "mamba": "mamba", "attention": "attention", "mlp": "mlp", "moe": "moe",
}  # fmt: skip


@family("nemotron_h", table=NEMOTRON, prefix="backbone.")
def nemotron_h(c: Keys) -> ModelConfig:
    """Nemotron-H: each layer one part, in any order (arXiv 2504.03624)."""
    steps(c)
    c.ignore("mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "mtp_layers_block_type", "sliding_window",
             "mtp_hybrid_override_pattern", "num_nextn_predict_layers", "norm_eps", "attention_head_dim", "expand",
             "mamba_num_groups", "num_hidden_layers", "ssm_dtype", "attention_bias", "mamba_proj_bias")  # fmt: skip
    c.only("mamba_hidden_act", "silu")
    if c("layer_norm_epsilon", None) is not None:
        c.ignore("rms_norm_eps")  # published beside it, and read by nobody
    eps, activation = c("layer_norm_epsilon", 1e-5), c.choice("mlp_hidden_act", ACTIVATIONS, "relu2")
    bias = c("mlp_bias", False)
    parts = {
        "attention": {"mixer": spec(Attention, **heads(c, head_dim=c("head_dim", 128, also=("attention_head_dim",))))},
        "mamba": {"mixer": spec(
            Mamba2, num_heads=c("mamba_num_heads", 128), head_dim=c("mamba_head_dim", 64), expand=None,
            d_state=c("ssm_state_size", 128), n_groups=c("n_groups", 8), d_conv=c("conv_kernel", 4),
            chunk_size=c("chunk_size", 128), norm_eps=eps, bias=c("use_bias", False),
            conv_bias=c("use_conv_bias", True), dt_limit=(float(c("time_step_min", 0.001)), math.inf),
        )},
        "mlp": {"ffn": spec(MLP, d_ff=c("intermediate_size"), activation=activation, bias=bias)},
    }  # fmt: skip
    c.ignore("time_step_limit")
    named = next((n for n in ("layer_types", "layers_block_type") if c(n, None)), "hybrid_override_pattern")
    kinds = c.each(named, KINDS)
    c.ignore("hybrid_override_pattern", "layers_block_type", *[k for k in c.data if "moe" in k or k in _ROUTER])
    if "moe" in kinds:
        parts["moe"] = {"ffn": _nemotron_experts(c, activation, bias)}
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=c("hidden_size"), layers=[Layer(**parts[kind]) for kind in kinds],
        norm=spec(RMSNorm, eps=eps), tie_embeddings=c("tie_word_embeddings", False), name="nemotron_h",
        max_seq_len=c("max_position_embeddings", None),
    )  # fmt: skip


_ROUTER = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
           "routed_scaling_factor")  # fmt: skip


def _nemotron_experts(c: Keys, activation: str, bias: bool) -> Spec:
    router = spec(
        TopKRouter, scoring="sigmoid", correction_bias=True, norm_topk_prob=c("norm_topk_prob", True),
        n_group=c("n_group", 1), topk_group=c("topk_group", 1), group_score="top2",
        routed_scaling_factor=float(c("routed_scaling_factor", 1.0)),
    )  # fmt: skip
    expert = spec(MLP, d_ff=c("moe_intermediate_size"), activation=activation, bias=False)
    return routed(
        c, expert, c("n_routed_experts"), router=router, latent_size=c("moe_latent_size", None), latent_bias=bias,
        shared_expert=expert.replace(d_ff=c("moe_shared_expert_intermediate_size"), bias=bias),
    )  # fmt: skip


ZAMBA = ENDS | scan_rows(FILE + "mamba") | {
    "final_norm.weight": "model.final_layernorm.weight",
    BLOCK + "mixer_norm.weight": FILE + "input_layernorm.weight",
    BLOCK + "mixer.linear.weight": FILE + "linear.weight",
    BLOCK + "mixer.norm.weight": FILE + "mamba_decoder.input_layernorm.weight",
    **{row.replace("mixer.", "mixer.mixer."): name for row, name in scan_rows(FILE + "mamba_decoder.mamba").items()},
}  # fmt: skip
ZAMBA_BLOCK = {
    "input_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "pre_ff_layernorm.weight",
    "gate_up_proj.weight": "feed_forward.gate_up_proj.weight", "down_proj.weight": "feed_forward.down_proj.weight",
    **{f"attention.{n}_proj.weight": f"self_attn.{n}_proj.weight" for n in "qkvo"},
}  # fmt: skip


def zamba_rows(config: ModelConfig, i: int) -> dict[str, str]:
    """The rows of one layer: a plain one's norm inside the mixer is Mamba-2's own; a hybrid one's adapters are stored
    with the first layer of its block, at its place in the order of hybrid layers."""
    if config.layers[i].mixer.cls is not WithSharedBlock:
        return scan_rows(FILE + "mamba")
    hybrids = [j for j, layer in enumerate(config.layers) if layer.mixer.cls is WithSharedBlock]
    name = config.layers[i].mixer.options["name"]
    first = next(j for j in hybrids if config.layers[j].mixer.options["name"] == name)
    stored, own = f"model.layers.{first}.shared_transformer.", f"_adapter_list.{hybrids.index(i)}."
    rows = {f"{BLOCK}mixer.block.{row}": stored + name for row, name in ZAMBA_BLOCK.items()}
    for k in (0, 1):
        rows[f"{BLOCK}mixer.adapter.{k}.weight"] = f"{stored}feed_forward.gate_up_proj{own}{k}.weight"
        for n in "qkv":
            row = f"{BLOCK}mixer.attention_adapters.{n}_proj.{k}.weight"
            rows[row] = f"{stored}self_attn.linear_{n}{own}{k}.weight"
    return rows


@family("zamba2", table=ZAMBA, choose=zamba_rows, buffers=BUFFERS)
def zamba2(c: Keys) -> ModelConfig:
    """Zamba2: Mamba-2, and blocks whose weights several layers share (arXiv 2411.15242)."""
    steps(c)
    c.only("add_bias_linear", False)
    c.only("use_long_context", False)
    c.ignore("use_conv_bias", "num_query_groups", "kv_channels", "ffn_hidden_size", "hybrid_layer_ids", "layer_types",
             "attention_hidden_size", "use_mem_rope", "rope_parameters", "rope_theta", "rope_scaling",
             "num_hidden_layers")  # fmt: skip
    d_model, eps = c("hidden_size"), c("rms_norm_eps", 1e-5)
    num_heads = c("num_attention_heads")
    width = c("attention_head_dim", 2 * d_model // num_heads)
    norm_spec = spec(RMSNorm, eps=eps)
    scan = spec(
        Mamba2, num_heads=c("n_mamba_heads", 8), head_dim=c("mamba_headdim", 2 * d_model // c("n_mamba_heads", 8)),
        expand=c("mamba_expand", 2), d_state=c("mamba_d_state", 64), n_groups=c("mamba_ngroups", 1),
        d_conv=c("mamba_d_conv", 4), chunk_size=c("chunk_size", 256), norm_eps=1e-5,
        dt_limit=(float(c("time_step_min", 0.001)), math.inf),
    )  # fmt: skip
    turns = rotary(c, width) if c("use_mem_rope", False) else {}
    options = heads(c, num_heads=num_heads, head_dim=width, scale=(width / 2) ** -0.5, d_out=d_model, **turns)
    block = spec(
        SharedBlock, attention=spec(Attention, **options), norm=norm_spec, d_ff=c("intermediate_size"),
        activation=c.choice("hidden_act", ACTIVATIONS, "gelu"),
    )  # fmt: skip
    use = spec(
        WithSharedBlock, name="", mixer=scan, norm=norm_spec, d_ff=c("intermediate_size"),
        adapter_rank=c("adapter_rank", 128), attention_adapter=c("use_shared_attention_adapter", False),
    )  # fmt: skip
    layers, uses, blocks = [], 0, c("num_mem_blocks", 1)
    for hybrid in c.each("layers_block_type", {"mamba": False, "linear_attention": False, "hybrid": True}):
        if not hybrid:
            layers.append(Layer(mixer=scan))
            continue
        shared = use.replace(name=f"block {uses % blocks}", block=block if uses < blocks else None)
        layers.append(Layer(mixer=shared, norm=spec(Identity)))
        uses += 1
    return assemble(c, layers, norm=norm_spec, tied=True)
