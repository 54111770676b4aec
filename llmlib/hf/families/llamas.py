"""Llama and its relatives: RMSNorm, rotary positions, gated feed-forwards."""

from llmlib.attention import Attention
from llmlib.errors import require
from llmlib.ffn import GLU, SwiGLU
from llmlib.hf.keys import ACTIVATIONS, Keys, rotary
from llmlib.hf.loading import family
from llmlib.hf.tables import linear, norm
from llmlib.model import Layer, ModelConfig, Spec, spec
from llmlib.norm import RMSNorm

BLOCK, FILE = "layers.{i}.", "model.layers.{i}."

ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
ATTENTION = {
    row: name
    for part in ("q_proj", "k_proj", "v_proj", "o_proj")
    for row, name in linear(f"{BLOCK}mixer.{part}", f"{FILE}self_attn.{part}").items()
}
FFN = {
    row: name
    for part in ("gate_proj", "up_proj", "down_proj")
    for row, name in linear(f"{BLOCK}ffn.{part}", f"{FILE}mlp.{part}").items()
}
PRE_NORMS = {
    **norm(BLOCK + "mixer_norm", FILE + "input_layernorm"),
    **norm(BLOCK + "ffn_norm", FILE + "post_attention_layernorm"),
}
QK_NORMS = {**norm(BLOCK + "mixer.q_norm", FILE + "self_attn.q_norm"),
            **norm(BLOCK + "mixer.k_norm", FILE + "self_attn.k_norm")}  # fmt: skip
LLAMA = ENDS | ATTENTION | FFN | PRE_NORMS
SANDWICH = LLAMA | {
    BLOCK + "mixer_post_norm.weight": FILE + "post_attention_layernorm.weight",
    BLOCK + "ffn_norm.weight": FILE + "pre_feedforward_layernorm.weight",
    BLOCK + "ffn_post_norm.weight": FILE + "post_feedforward_layernorm.weight",
}
OLMO2 = ENDS | ATTENTION | QK_NORMS | FFN | {
    BLOCK + "mixer_post_norm.weight": FILE + "post_attention_layernorm.weight",
    BLOCK + "ffn_post_norm.weight": FILE + "post_feedforward_layernorm.weight",
}  # fmt: skip
BUFFERS = (r"rotary_emb\.inv_freq$",)


def heads(c: Keys, **more) -> dict:
    """Options of `Attention` that all these families spell alike."""
    num_heads = c("num_attention_heads")
    return {
        "num_heads": num_heads,
        "num_kv_heads": c("num_key_value_heads", num_heads),
        "head_dim": stated_width(c),
    } | more


def stated_width(c: Keys) -> int | None:
    """The width of one head, where the file states it."""
    width = c("head_dim", None)
    require(width is None or width > 0, f"head_dim is {width}, and must be above 0")
    return width


def head_width(c: Keys) -> int:
    """The width of one head."""
    return stated_width(c) or c("hidden_size") // c("num_attention_heads")


def gated(c: Keys, activation: str = "hidden_act", default: str = "silu", width: str = "intermediate_size") -> Spec:
    """The gated feed-forward with the activation that the config names."""
    kind = c.choice(activation, ACTIVATIONS, default)
    options = {"d_ff": c(width), "bias": c("mlp_bias", False)}
    return spec(SwiGLU, **options) if kind == "silu" else spec(GLU, activation=kind, **options)


def assemble(c: Keys, layers, *, norm: Spec | None = None, tied: bool = False, **fields) -> ModelConfig:
    """The config around these layers."""
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=c("hidden_size"), layers=tuple(layers),
        norm=norm or spec(RMSNorm, eps=c("rms_norm_eps", 1e-6)), tie_embeddings=c("tie_word_embeddings", tied),
        max_seq_len=c("max_position_embeddings", None), name=c.data["model_type"], **fields,
    )  # fmt: skip


def windows(c: Keys, window: int | None) -> list[int | None]:
    """Each layer's window by `layer_types`, which must not ask for one where there is none."""
    sliding = {} if window is None else {"sliding_attention": window}
    return c.each("layer_types", {"full_attention": None} | sliding)


def qwen_window(c: Keys) -> int | None:
    """The window of Qwen's layers that have one; it is off unless the file turns it on."""
    window = c.nullable("sliding_window", 4096)
    return window if c("use_sliding_window", False) else None


def qwen_windows(c: Keys) -> list[int | None]:
    """Each layer's window: from the layer `max_window_layers` on, unless `layer_types` says which."""
    window, count = qwen_window(c), c("num_hidden_layers")
    first = count if window is None else c("max_window_layers", 28)
    c.ignore("max_window_layers")
    c.presume("layer_types", ["sliding_attention" if i >= first else "full_attention" for i in range(count)])
    return windows(c, window)


@family("llama", table=LLAMA, buffers=BUFFERS)
def llama(c: Keys) -> ModelConfig:
    """Llama 1 to 3.2, and what is built alike (arXiv 2302.13971, 2307.09288, 2407.21783)."""
    bias = c("attention_bias", False)
    mixer = spec(Attention, **heads(c, bias=bias, **rotary(c, head_width(c))))
    return assemble(c, c("num_hidden_layers") * (Layer(mixer, gated(c)),))


@family("mistral", table=LLAMA, buffers=BUFFERS)
def mistral(c: Keys) -> ModelConfig:
    """Mistral: Llama with a window (arXiv 2310.06825)."""
    mixer = spec(Attention, **heads(c, window=c.nullable("sliding_window", 4096), **rotary(c, head_width(c))))
    return assemble(c, c("num_hidden_layers") * (Layer(mixer, gated(c)),))


@family("qwen2", table=LLAMA, buffers=BUFFERS)
def qwen2(c: Keys) -> ModelConfig:
    """Qwen2: Llama with biases on q, k and v, and windows in some layers (arXiv 2407.10671)."""
    mixer = spec(Attention, **heads(c, bias=("q_proj", "k_proj", "v_proj"), **rotary(c, head_width(c))))
    return assemble(c, [Layer(mixer.replace(window=w), gated(c)) for w in qwen_windows(c)])


@family("qwen3", table=LLAMA | QK_NORMS, buffers=BUFFERS)
def qwen3(c: Keys) -> ModelConfig:
    """Qwen3: norms on each head's queries and keys in place of biases (arXiv 2505.09388)."""
    c.presume("head_dim", 128)
    mixer = spec(
        Attention,
        **heads(c, bias=c("attention_bias", False), qk_norm=spec(RMSNorm, eps=c("rms_norm_eps", 1e-6))),
        **rotary(c, head_width(c)),
    )
    return assemble(c, [Layer(mixer.replace(window=w), gated(c)) for w in qwen_windows(c)])


def gemma_norm(c: Keys) -> Spec:
    """RMSNorm with gain 1 + w."""
    return spec(RMSNorm, eps=c("rms_norm_eps", 1e-6), unit_offset=True)


def gemma_attention(c: Keys, **more) -> Spec:
    """Attention with Gemma's own scale and caps."""
    return spec(
        Attention,
        **heads(c, bias=c("attention_bias", False), scale=c("query_pre_attn_scalar", 256) ** -0.5, **more),
    )


def gemma(c: Keys, layers, cap: float | None) -> ModelConfig:
    """The config around Gemma's layers: an embedding times √d and a tied head."""
    c.only("use_bidirectional_attention", False)
    return assemble(
        c, layers, norm=gemma_norm(c), tied=True, embedding_scale=c("hidden_size") ** 0.5,
        logit_softcap=c.nullable("final_logit_softcapping", cap),
    )  # fmt: skip


@family("gemma2", table=SANDWICH, buffers=BUFFERS)
def gemma2(c: Keys) -> ModelConfig:
    """Gemma 2: capped scores, windows in turn, norms around each part (arXiv 2408.00118)."""
    c.ignore("hidden_act")
    alternating = ["sliding_attention", "full_attention"] * c("num_hidden_layers")
    c.presume("layer_types", alternating[: c("num_hidden_layers")])
    c.presume("head_dim", 256)
    mixer = gemma_attention(c, softcap=c.nullable("attn_logit_softcapping", 50.0), **rotary(c, head_width(c)))
    ffn = gated(c, "hidden_activation", "gelu_pytorch_tanh")
    sizes = windows(c, c.nullable("sliding_window", 4096))
    return gemma(c, [Layer(mixer.replace(window=w), ffn, placement="sandwich") for w in sizes], 30.0)


@family("gemma3_text", table=SANDWICH | QK_NORMS, buffers=BUFFERS)
def gemma3(c: Keys) -> ModelConfig:
    """Gemma 3, the text model: five windows to each full layer (arXiv 2503.19786)."""
    c.ignore("hidden_act", "_sliding_window_pattern")
    c.only("attn_logit_softcapping", None)
    c.presume("head_dim", 256)
    every, window = c("sliding_window_pattern", 6), c.nullable("sliding_window", 4096)
    local = {"theta": 1e4, "names": ("rope_local_base_freq", "partial_rotary_factor")}
    mixer = gemma_attention(c, qk_norm=gemma_norm(c))
    mixers = {
        kind: mixer.replace(**rotary(c, head_width(c), layer_type=kind, **options))
        for kind, options in (("full_attention", {"theta": 1e6}), ("sliding_attention", local))
    }
    mixers["sliding_attention"] = mixers["sliding_attention"].replace(window=window)
    ffn = gated(c, "hidden_activation", "gelu_pytorch_tanh")
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c("num_hidden_layers"))]
    layers = [Layer(m, ffn, placement="sandwich") for m in c.each("layer_types", mixers, kinds)]
    return gemma(c, layers, None)


@family("olmo2", table=OLMO2, buffers=BUFFERS)
def olmo2(c: Keys) -> ModelConfig:
    """OLMo 2: norms after each part, and on whole queries and keys (arXiv 2501.00656)."""
    eps = c("rms_norm_eps", 1e-5)
    mixer = spec(
        Attention, **heads(c, bias=c("attention_bias", False), **rotary(c, head_width(c))),
        qk_norm=spec(RMSNorm, eps=eps), qk_norm_over="width",
    )  # fmt: skip
    layer = Layer(mixer, gated(c), placement="inside")
    return assemble(c, c("num_hidden_layers") * (layer,), norm=spec(RMSNorm, eps=eps))


@family("granite", table=LLAMA, buffers=BUFFERS)
def granite(c: Keys) -> ModelConfig:
    """Granite 3: Llama with four multipliers (https://huggingface.co/ibm-granite)."""
    mixer = spec(
        Attention,
        **heads(c, bias=c("attention_bias", False), scale=c("attention_multiplier", 1.0), **rotary(c, head_width(c))),
    )
    layer = Layer(mixer, gated(c), residual_scale=c("residual_multiplier", 1.0))
    return assemble(
        c, c("num_hidden_layers") * (layer,), embedding_scale=c("embedding_multiplier", 1.0),
        logit_scale=1 / c("logits_scaling", 1.0),
    )  # fmt: skip
