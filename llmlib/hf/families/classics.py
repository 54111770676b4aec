"""Families with LayerNorm and a plain feed-forward: GPT-2, Falcon, GPT-NeoX, Phi, Bloom, MPT."""

from llmlib.attention import Attention
from llmlib.ffn import MLP
from llmlib.hf.keys import ACTIVATIONS, Keys, rotary
from llmlib.hf.loading import family
from llmlib.hf.tables import linear, norm
from llmlib.model import Layer, ModelConfig, spec
from llmlib.norm import LayerNorm
from llmlib.position import ALiBi, LearnedPosition

B, H = "layers.{i}.", "transformer.h.{i}."


def fused(ours: str, theirs: str, step: str, names: str = "qkv") -> dict[str, str]:
    """Rows for q, k and v out of one stored matrix and its bias."""
    return {
        f"{ours}.{n}_proj.{kind}": f"{theirs}.{kind}{first} | {step} {n}"
        for n in names
        for kind, first in (("weight", ""), ("bias", ""))
    }


def conv1d(ours: str, theirs: str) -> dict[str, str]:
    """A map stored as inputs × outputs."""
    return {f"{ours}.weight": f"{theirs}.weight | T", f"{ours}.bias": f"{theirs}.bias"}


GPT2 = {
    "embedding.weight": "transformer.wte.weight",
    "position.weight": "transformer.wpe.weight",
    "head.weight": "lm_head.weight",
    **norm("final_norm", "transformer.ln_f"),
    **norm(B + "mixer_norm", H + "ln_1"),
    **norm(B + "ffn_norm", H + "ln_2"),
    **{f"{B}mixer.{n}_proj.weight": f"{H}attn.c_attn.weight | T | stacked {n}" for n in "qkv"},
    **{f"{B}mixer.{n}_proj.bias": f"{H}attn.c_attn.bias | stacked {n}" for n in "qkv"},
    **conv1d(B + "mixer.o_proj", H + "attn.c_proj"),
    **conv1d(B + "ffn.up_proj", H + "mlp.c_fc"),
    **conv1d(B + "ffn.down_proj", H + "mlp.c_proj"),
}


@family("gpt2", table=GPT2, prefix="transformer.", buffers=(r"\.attn\.(masked_)?bias$",))
def gpt2(c: Keys) -> ModelConfig:
    """GPT-2: learned positions, one matrix for q, k and v (Radford et al., 2019)."""
    c.only("add_cross_attention", False)
    c.ignore("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    d_model, num_heads = c("n_embd", 768, also=("hidden_size",)), c("n_head", 12, also=("num_attention_heads",))
    scale = (d_model // num_heads) ** -0.5 if c("scale_attn_weights", True) else 1.0
    ffn = spec(MLP, d_ff=c("n_inner", 4 * d_model), activation=c.choice("activation_function", ACTIVATIONS, "gelu_new"))
    by_depth = c("scale_attn_by_inverse_layer_idx", False)
    layers = tuple(
        Layer(spec(Attention, num_heads=num_heads, bias=True, scale=scale / (i + 1) if by_depth else scale), ffn)
        for i in range(c("n_layer", 12, also=("num_hidden_layers",)))
    )
    length = c("n_positions", 1024, also=("max_position_embeddings",))
    return ModelConfig(
        vocab_size=c("vocab_size", 50257), d_model=d_model, layers=layers,
        norm=spec(LayerNorm, eps=c("layer_norm_epsilon", 1e-5)), position=spec(LearnedPosition, max_positions=length),
        tie_embeddings=c("tie_word_embeddings", True), max_seq_len=length, name="gpt2",
    )  # fmt: skip


FALCON = {
    "embedding.weight": "transformer.word_embeddings.weight",
    "head.weight": "lm_head.weight",
    **norm("final_norm", "transformer.ln_f"),
    **fused(B + "mixer", H + "self_attention.query_key_value", "grouped"),
    **linear(B + "mixer.o_proj", H + "self_attention.dense"),
    **linear(B + "ffn.up_proj", H + "mlp.dense_h_to_4h"),
    **linear(B + "ffn.down_proj", H + "mlp.dense_4h_to_h"),
}


def falcon_norms(config: ModelConfig, i: int) -> dict[str, str]:
    """Two norms of a parallel block have names of their own."""
    layer = config.layers[i]
    two = layer.parallel and layer.parallel_norms == 2
    first, second = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    return norm(B + "mixer_norm", H + first) | norm(B + "ffn_norm", H + second)


@family("falcon", table=FALCON, prefix="transformer.", choose=falcon_norms, buffers=(r"inv_freq$", r"\.alibi$"))
def falcon(c: Keys) -> ModelConfig:
    """Falcon: 7B, 11B, 40B and RW styles, as its flags say (arXiv 2311.16867)."""
    d_model, num_heads = c("hidden_size", also=("n_embed",)), c("num_attention_heads", also=("n_head",))
    new, bias, width = c("new_decoder_architecture", False), c("bias", False), d_model // num_heads
    kv = c("num_kv_heads", num_heads, also=("n_head_kv",))
    kv = kv if new or not c("multi_query", True) else 1
    parallel = c("parallel_attn", True) or new
    norms = c("num_ln_in_parallel_attn", None) or (2 if new else 1)
    c.ignore("rope_parameters", "rope_theta", "rope_scaling", "attention_softmax_in_fp32", "rotary", "multi_query")
    c.presume("max_position_embeddings", 2048)
    if c("alibi", False):
        positions = {"position_bias": spec(ALiBi, bfloat16=True, scale=width**-0.5)}
    else:
        positions = rotary(c, width)
    layer = Layer(
        spec(Attention, num_heads=num_heads, num_kv_heads=kv, bias=bias, **positions),
        spec(MLP, d_ff=c("ffn_hidden_size", 4 * d_model), activation=c.choice("activation", ACTIVATIONS, "gelu"),
             bias=bias),
        parallel=parallel, parallel_norms=norms,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=d_model, norm=spec(LayerNorm, eps=c("layer_norm_epsilon", 1e-5)),
        layers=c("num_hidden_layers", also=("n_layer",)) * (layer,), tie_embeddings=c("tie_word_embeddings", True),
        max_seq_len=c("max_position_embeddings"), name="falcon",
    )  # fmt: skip


N = "gpt_neox.layers.{i}."
NEOX = {
    "embedding.weight": "gpt_neox.embed_in.weight",
    "head.weight": "embed_out.weight",
    **norm("final_norm", "gpt_neox.final_layer_norm"),
    **norm(B + "mixer_norm", N + "input_layernorm"),
    **norm(B + "ffn_norm", N + "post_attention_layernorm"),
    **fused(B + "mixer", N + "attention.query_key_value", "grouped"),
    **linear(B + "mixer.o_proj", N + "attention.dense"),
    **linear(B + "ffn.up_proj", N + "mlp.dense_h_to_4h"),
    **linear(B + "ffn.down_proj", N + "mlp.dense_4h_to_h"),
}


@family("gpt_neox", table=NEOX, prefix="gpt_neox.", buffers=(r"attention\.(masked_)?bias$", r"inv_freq$"))
def gpt_neox(c: Keys) -> ModelConfig:
    """GPT-NeoX and Pythia: a parallel block with two norms (arXiv 2204.06745)."""
    d_model, num_heads, bias = c("hidden_size"), c("num_attention_heads"), c("attention_bias", True)
    c.ignore("classifier_dropout", "num_labels")
    names = ("rotary_emb_base", "rotary_pct")
    turn = rotary(c, d_model // num_heads, fraction=0.25, names=names)
    for name, own, default in zip(("rope_theta", "partial_rotary_factor"), names, (10000.0, 0.25), strict=True):
        c.only(name, c(own, default))  # the reference reads these two only inside rope_parameters
    layer = Layer(
        spec(Attention, num_heads=num_heads, bias=bias, **turn),
        spec(MLP, d_ff=c("intermediate_size"), activation=c.choice("hidden_act", ACTIVATIONS, "gelu")),
        parallel=c("use_parallel_residual", True), parallel_norms=2,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=d_model, layers=c("num_hidden_layers") * (layer,),
        norm=spec(LayerNorm, eps=c("layer_norm_eps", 1e-5)), tie_embeddings=c("tie_word_embeddings", False),
        max_seq_len=c("max_position_embeddings", None), name="gpt_neox",
    )  # fmt: skip


P = "model.layers.{i}."
PHI = {
    "embedding.weight": "model.embed_tokens.weight",
    **linear("head", "lm_head"),
    **norm("final_norm", "model.final_layernorm"),
    **norm(B + "mixer_norm", P + "input_layernorm"),
    **{row: name for n in "qkv" for row, name in linear(f"{B}mixer.{n}_proj", f"{P}self_attn.{n}_proj").items()},
    **linear(B + "mixer.o_proj", P + "self_attn.dense"),
    **norm(B + "mixer.q_norm", P + "self_attn.q_layernorm"),
    **norm(B + "mixer.k_norm", P + "self_attn.k_layernorm"),
    **linear(B + "ffn.up_proj", P + "mlp.fc1"),
    **linear(B + "ffn.down_proj", P + "mlp.fc2"),
}


@family("phi", table=PHI, buffers=(r"inv_freq$",))
def phi(c: Keys) -> ModelConfig:
    """Phi-1, 1.5 (arXiv 2309.05463) and 2: a parallel block with one norm."""
    c.only("tie_word_embeddings", False)
    d_model, num_heads = c("hidden_size"), c("num_attention_heads")
    norm_spec = spec(LayerNorm, eps=c("layer_norm_eps", 1e-5))
    layer = Layer(
        spec(Attention, num_heads=num_heads, num_kv_heads=c("num_key_value_heads", num_heads), bias=True,
             qk_norm=norm_spec if c("qk_layernorm", False) else None,
             **rotary(c, d_model // num_heads, fraction=0.5)),
        spec(MLP, d_ff=c("intermediate_size"), activation=c.choice("hidden_act", ACTIVATIONS, "gelu_new")),
        parallel=True,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=d_model, layers=c("num_hidden_layers") * (layer,), norm=norm_spec,
        head_bias=True, max_seq_len=c("max_position_embeddings", None), name="phi",
    )  # fmt: skip


BLOOM = {
    "embedding.weight": "transformer.word_embeddings.weight",
    "head.weight": "lm_head.weight",
    **norm("embedding_norm", "transformer.word_embeddings_layernorm"),
    **norm("final_norm", "transformer.ln_f"),
    **norm(B + "mixer_norm", H + "input_layernorm"),
    **norm(B + "ffn_norm", H + "post_attention_layernorm"),
    **fused(B + "mixer", H + "self_attention.query_key_value", "grouped"),
    **linear(B + "mixer.o_proj", H + "self_attention.dense"),
    **linear(B + "ffn.up_proj", H + "mlp.dense_h_to_4h"),
    **linear(B + "ffn.down_proj", H + "mlp.dense_4h_to_h"),
}


@family("bloom", table=BLOOM, prefix="transformer.")
def bloom(c: Keys) -> ModelConfig:
    """Bloom: ALiBi, and a norm on the embedding (arXiv 2211.05100)."""
    c.only("apply_residual_connection_post_layernorm", False)
    c.only("slow_but_exact", False)
    c.ignore("masked_softmax_fusion", "attention_softmax_in_fp32", "bias_dropout_fusion",
             "skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "n_inner", "seq_length")  # fmt: skip
    d_model, num_heads = c("hidden_size", also=("n_embed",)), c("n_head", also=("num_attention_heads",))
    norm_spec = spec(LayerNorm, eps=c("layer_norm_epsilon", 1e-5))
    layer = Layer(
        spec(Attention, num_heads=num_heads, bias=True, position_bias=spec(ALiBi)),
        spec(MLP, d_ff=4 * d_model, activation="gelu_tanh"),
    )
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=d_model, layers=c("n_layer", also=("num_hidden_layers",)) * (layer,),
        norm=norm_spec, embedding_norm=norm_spec, tie_embeddings=c("tie_word_embeddings", True),
        max_seq_len=c("seq_length", None), name="bloom",
    )  # fmt: skip


M = "transformer.blocks.{i}."
MPT = {
    "embedding.weight": "transformer.wte.weight",
    "head.weight": "lm_head.weight",
    "final_norm.weight": "transformer.norm_f.weight",
    B + "mixer_norm.weight": M + "norm_1.weight",
    B + "ffn_norm.weight": M + "norm_2.weight",
    **{f"{B}mixer.{n}_proj.weight": f"{M}attn.Wqkv.weight | stacked {n}" for n in "qkv"},
    B + "mixer.o_proj.weight": M + "attn.out_proj.weight",
    B + "ffn.up_proj.weight": M + "ffn.up_proj.weight",
    B + "ffn.down_proj.weight": M + "ffn.down_proj.weight",
}


@family("mpt", table=MPT, prefix="transformer.")
def mpt(c: Keys) -> ModelConfig:
    """MPT: ALiBi, no biases (https://huggingface.co/mosaicml/mpt-7b)."""
    # transformers reads none of these: it always has ALiBi with slopes from 2⁻⁸, no biases, and a fourfold width
    c.ignore("no_bias", "norm_type", "embedding_fraction", "expansion_ratio", "logit_scale", "learned_pos_emb",
             "init_device", "init_config", "emb_pdrop", "verbose")  # fmt: skip
    a = c("attn_config", {})
    mixer = spec(
        Attention, num_heads=c("n_heads"), scale=a.get("softmax_scale"), clip_qkv=a.get("clip_qkv") or None,
        position_bias=spec(ALiBi),
    )  # fmt: skip
    d_model = c("d_model")
    return ModelConfig(
        vocab_size=c("vocab_size"), d_model=d_model,
        norm=spec(LayerNorm, eps=c("layer_norm_epsilon", 1e-5), bias=False),
        layers=c("n_layers") * (
            Layer(mixer, spec(MLP, d_ff=4 * d_model, activation="gelu", bias=False)),
        ),
        tie_embeddings=c("tie_word_embeddings", True), max_seq_len=c("max_seq_len", None), name="mpt",
    )  # fmt: skip
