"""Tiny random checkpoints of published families, made by transformers, weights scaled so that everything matters."""

import functools
import json
import math
from pathlib import Path

import torch

SMALL = {"vocab_size": 97, "max_position_embeddings": 64}
LLAMA = SMALL | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
NEOX = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GEMMA = LLAMA | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4}
MOE = LLAMA | {"num_experts_per_tok": 2}
DEEPSEEK = MOE | {
    "num_key_value_heads": 4, "n_routed_experts": 6, "moe_intermediate_size": 24, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "first_k_dense_replace": 1, "n_group": 3,
    "topk_group": 2,
}  # fmt: skip
MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2}
SCAN2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}
GRANITE = {
    "shared_intermediate_size": 40, "embedding_multiplier": 6.0, "attention_multiplier": 0.3,
    "residual_multiplier": 0.6, "logits_scaling": 3.0,
}  # fmt: skip
NEMOTRON = LLAMA | {
    "hybrid_override_pattern": "M*-EM", "num_hidden_layers": 5, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 20, "head_dim": 8, "n_group": 3, "topk_group": 2,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
ZAMBA = LLAMA | {
    "num_key_value_heads": 4, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1, "adapter_rank": 6,
}  # fmt: skip

CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-scaled-by-layer": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40}),
    "gpt2-unscaled": ("gpt2", GPT2 | {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "reorder_and_upcast_attn": True}),
    "falcon-7b-style": ("falcon", FALCON),
    "falcon-40b-style": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b-style": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw-style": (
        "falcon",
        FALCON | {"alibi": True, "parallel_attn": False, "bias": True, "multi_query": False, "ffn_hidden_size": 80},
    ),
    "falcon-multihead-rotary": ("falcon", FALCON | {"multi_query": False, "bias": True, "tie_word_embeddings": False}),
    "llama": ("llama", LLAMA),
    "llama-biases-tied": (
        "llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "llama-3.1-scaling": (
        "llama",
        LLAMA | {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
    ),
    "llama-yarn": (
        "llama",
        LLAMA | {"head_dim": 16, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "llama-linear": (
        "llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}
    ),
    "llama-dynamic": (
        "llama",
        LLAMA | {"max_position_embeddings": 16,
                 "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", LLAMA | {"sliding_window": 8}),
    "mistral-no-window": ("mistral", LLAMA | {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-windows": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12}),
    "qwen3-biases": ("qwen3", LLAMA | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0}),
    "gemma2-uncapped": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 20}),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                 "final_logit_softcapping": 10.0, "rope_parameters": {
                     "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                     "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0}}},
    ),
    "olmo2": ("olmo2", LLAMA),
    "phi": ("phi", LLAMA),
    "phi-qk-norm": ("phi", LLAMA | {"qk_layernorm": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25}}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": (
        "gpt_neox", NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}
    ),
    "bloom": ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "bloom-six-heads": ("bloom", {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "mpt": ("mpt", {"vocab_size": 97, "d_model": 32, "n_layers": 3, "n_heads": 4}),
    "mpt-clipped": (
        "mpt",
        {"vocab_size": 97, "d_model": 48, "n_layers": 2, "n_heads": 6, "tie_word_embeddings": False,
         "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2}},
    ),
    "granite": (
        "granite",
        LLAMA | {"embedding_multiplier": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4,
                 "logits_scaling": 3.0, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", MOE | {"num_local_experts": 4}),
    "mixtral-window": ("mixtral", MOE | {"num_local_experts": 3, "sliding_window": 8, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", MOE | {"num_experts": 5, "moe_intermediate_size": 24, "head_dim": 12}),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        MOE | {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [0],
               "decoder_sparse_step": 2, "head_dim": 8, "attention_bias": True},
    ),
    "olmoe": ("olmoe", MOE | {"num_experts": 4, "norm_topk_prob": True}),
    "olmoe-clipped": ("olmoe", MOE | {"num_experts": 4, "clip_qkv": 0.7}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v2-grouped": (
        "deepseek_v2",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "topk_group": 1, "q_lora_rank": None,
                    "routed_scaling_factor": 3.0, "attention_bias": True},
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        DEEPSEEK | {"norm_topk_prob": False, "n_shared_experts": 2, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 16,
            "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
    ),
    "gpt_oss": (
        "gpt_oss",
        MOE | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 4},
    ),
    "mamba": ("mamba", MAMBA),
    "mamba-biases": ("mamba", MAMBA | {"use_bias": True, "use_conv_bias": False, "time_step_rank": 5,
                                       "tie_word_embeddings": False, "expand": 3, "conv_kernel": 3}),
    "falcon_mamba": ("falcon_mamba", MAMBA),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2-limits": (
        "mamba2",
        MAMBA2 | {"n_groups": 1, "chunk_size": 8, "time_step_limit": (0.3, 0.9), "use_bias": True,
                  "use_conv_bias": False, "tie_word_embeddings": True},
    ),
    "jamba": (
        "jamba",
        MOE | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
               "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8},
    ),
    "jamba-dense": (
        "jamba",
        MOE | {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 2, "num_experts": 1,
               "mamba_d_state": 8, "mamba_proj_bias": True, "mamba_conv_bias": False},
    ),
    "bamba": ("bamba", LLAMA | SCAN2 | {"attn_layer_indices": [1], "mamba_n_groups": 2}),
    "granitemoehybrid": (
        "granitemoehybrid",
        MOE | SCAN2 | GRANITE | {"num_local_experts": 4, "layer_types": ["mamba", "attention", "mamba"]},
    ),
    "granitemoehybrid-dense-rope": (
        "granitemoehybrid",
        LLAMA | SCAN2 | GRANITE | {"num_local_experts": 0, "layer_types": ["mamba", "attention", "mamba"],
                                   "position_embedding_type": "rope"},
    ),
    "granitemoehybrid-attention-only": (
        "granitemoehybrid",
        MOE | SCAN2 | GRANITE | {"num_local_experts": 4, "layer_types": ["attention"] * 3,
                                 "position_embedding_type": "rope"},
    ),
    "falcon_h1": (
        "falcon_h1",
        LLAMA | SCAN2 | {"mamba_d_ssm": 64, "mamba_n_groups": 2, "rms_norm_eps": 1e-5, "embedding_multiplier": 3.0,
                         "lm_head_multiplier": 0.4, "key_multiplier": 0.6, "attention_in_multiplier": 0.8,
                         "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.5,
                         "ssm_multipliers": [0.6, 0.5, 0.8, 1.5, 0.7], "mlp_multipliers": [0.9, 0.6]},
    ),
    "falcon_h1-norm-biases": (
        "falcon_h1",
        LLAMA | SCAN2 | {"mamba_d_ssm": 48, "mamba_d_head": "auto", "mamba_n_groups": 2, "mamba_rms_norm": True,
                         "mamba_norm_before_gate": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
                         "mamba_proj_bias": True, "projectors_bias": True, "tie_word_embeddings": True},
    ),
    "falcon_h1-norm-after-gate": (
        "falcon_h1",
        LLAMA | SCAN2 | {"mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
                         "mamba_conv_bias": False},
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "zamba2": ("zamba2", ZAMBA),
    "zamba2-two-blocks": (
        "zamba2",
        ZAMBA | {"num_mem_blocks": 2, "use_mem_rope": True, "use_shared_attention_adapter": True, "mamba_ngroups": 2,
                 "num_hidden_layers": 5,
                 "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid"]},
    ),
    "nemotron_h-dense": ("nemotron_h", NEMOTRON | {"hybrid_override_pattern": "M*-M-", "mlp_bias": True,
                                                   "attention_bias": True}),
}  # fmt: skip


EAGER = ("gemma2", "gemma3_text", "gpt_oss")  # transformers caps scores and has sinks only in its eager attention


def reference(case: str, seed: int = 0):
    """transformers' model for a case, float32, every weight drawn anew."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, options = CASES[case]
    config = CONFIG_MAPPING[kind](**options)
    torch.manual_seed(seed)
    kernel = {"attn_implementation": "eager"} if kind in EAGER else {}
    model = AutoModelForCausalLM.from_config(config, **kernel).eval().float()
    scale_weights_(model)
    return model


@torch.no_grad()
def scale_weights_(model) -> None:
    """Gains spread around their mean, biases away from 0, matrices with gain one: leaving anything out shows."""
    for name, p in model.named_parameters():
        if p.ndim >= 2 and "conv1d" not in name and "A_log" not in name:
            fan_in = p.shape[0] if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else p.shape[-1]
            embedding = any(word in name for word in ("embed", "wte", "wpe"))
            p.normal_(0, 1.0 if embedding else 1.3 / math.sqrt(fan_in))
        elif not name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            p.add_(torch.randn_like(p) * 0.3)
    for name, b in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            b.normal_(0, 0.3)


@functools.cache
def saved(case: str, folder: Path) -> tuple[object, Path]:
    """The reference and the folder that `save_pretrained` made of it."""
    model = reference(case)
    place = folder / case
    model.save_pretrained(place)
    return model, place


SMALLEST = {kind: keys for kind, keys in reversed(CASES.values())}  # the first case of each family


def published(kind: str, keys: dict, folder: Path, spelling: str = "raw"):
    """transformers' model of a config.json with just these keys, saved beside it.

    spelling  "raw": config.json stays as it is given here; "saved": as save_pretrained writes it anew
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    text = json.dumps({"model_type": kind} | {k: v for k, v in keys.items() if v is not None})
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    scale_weights_(model.eval().float())
    model.save_pretrained(folder)
    if spelling == "raw":
        (folder / "config.json").write_text(text)
    return model


def small_tokenizer(special):
    """Characters as tokens: enough of them for the 97 of the tiny models."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {token: i for i, token in enumerate([*special, *(chr(33 + i) for i in range(94)), " "])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def edit_config(folder: Path, **changes) -> None:
    """Set keys of a saved config.json; None removes one."""
    file = folder / "config.json"
    data = json.loads(file.read_text())
    for key, value in changes.items():
        data.pop(key, None) if value is None else data.__setitem__(key, value)
    file.write_text(json.dumps(data))
