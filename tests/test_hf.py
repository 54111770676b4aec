"""Checkpoints of published families give the logits of transformers, the reference implementation."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmlib import CheckpointError, ConfigError, UnsupportedArchitectureError, load
from llmlib.hf import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to answer for


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def tokens(b=2, t=40, seed=0):
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(mine, theirs):
    """Within 1e-4 of the standard deviation of the logits."""
    error = (mine - theirs).abs().max() / theirs.std()
    assert error < 1e-4, f"off by {error:.2g} standard deviations"


@pytest.mark.parametrize("case", families.CASES)
@torch.no_grad()
def test_logits_equal_the_reference(case, checkpoints):
    theirs, folder = families.saved(case, checkpoints)
    mine = load(folder)
    assert mine.num_parameters() == theirs.num_parameters()
    for t in (1, 5, 40):
        assert_same_logits(mine(tokens(t=t)), theirs(tokens(t=t)).logits)


# Dynamic NTK changes the base as a text grows. A layer's old keys can be turned anew, and are, but they were made from
# what the layer below said under the old base: above one layer no cache can equal the full forward beyond the original
# length, here or in transformers, whose cache keeps the old turn too and so differs from both.
CACHED = [case for case in families.CASES if case != "llama-dynamic"]


@pytest.mark.parametrize("case", CACHED)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(case, checkpoints):
    mine = load(families.saved(case, checkpoints)[1])
    state = mine.new_state()
    pieces = [mine(piece, state) for piece in tokens().split([11, 1, 1, 9, 1, 17], dim=1)]
    assert_same_logits(torch.cat(pieces, 1)[:, -1:], mine(tokens())[:, -1:])


@pytest.mark.parametrize("case", CACHED)
@torch.no_grad()
def test_greedy_generation_is_the_references(case, checkpoints):
    theirs, folder = families.saved(case, checkpoints)
    prompt = tokens(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(load(folder).generate(prompt, 12), expected)


def copied(checkpoints, tmp_path, case="llama", **changes):
    """A copy of a saved checkpoint with keys of its config changed."""
    folder = tmp_path / "copy"
    shutil.copytree(families.saved(case, checkpoints)[1], folder)
    if changes:
        families.edit_config(folder, **changes)
    return folder


def edit_tensors(folder, edit):
    """Rewrite model.safetensors by edit(tensors)."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, file)


def shard(folder):
    """Split model.safetensors into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({n: tensors[n] for n in held}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, held in files.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def assert_read_as_the_reference(kind, keys, spelling, tmp_path):
    theirs = families.published(kind, keys, tmp_path / "published", spelling)
    mine = load(tmp_path / "published")
    assert mine.num_parameters() == theirs.num_parameters()
    for t in (1, 40):
        assert_same_logits(mine(tokens(t=t)), theirs(tokens(t=t), use_cache=False).logits)


@pytest.mark.parametrize("kind", families.SMALLEST)
def test_a_config_with_only_the_required_keys(kind, tmp_path):
    """What a file leaves out takes the value that the reference gives it."""
    assert_read_as_the_reference(kind, families.SMALLEST[kind], "raw", tmp_path)


WINDOW = {"use_sliding_window": True, "sliding_window": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
V3_LEFT_OUT = dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"))
# Keys that change the result in a way of their own, or that look as if they did.
KEYS = [
    ("deepseek_v2", {"hidden_act": "gelu"}), ("deepseek_v3", {"hidden_act": "relu"}),
    ("deepseek_v2", {"mlp_bias": True}), ("nemotron_h", {"mlp_bias": True}),
    ("nemotron_h", {"mlp_bias": True, "moe_latent_size": 12}),
    *[(kind, {"sliding_window": 8}) for kind in ("qwen2", "qwen3", "qwen3_moe")],
    *[(kind, WINDOW) for kind in ("qwen2", "qwen3", "qwen3_moe")],
    *[(kind, WINDOW | {"max_window_layers": 1}) for kind in ("qwen2", "qwen3", "qwen3_moe")],
    ("qwen3_moe", WINDOW | {"max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    ("deepseek_v3", V3_LEFT_OUT | {"n_routed_experts": 16, "num_hidden_layers": 4}),
    ("gpt_oss", {"rope_theta": 100.0}),
    ("falcon", {"rope_scaling": {"type": "linear", "factor": 4.0}}), ("falcon", {"rope_scaling": YARN}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}, "rope_scaling": YARN}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma3_text", {"_sliding_window_pattern": 3}), ("gemma3_text", {"sliding_window_pattern": 3}),
    ("gpt_neox", {"rotary_emb_base": 100, "rotary_pct": 1.0}), ("phi", {"partial_rotary_factor": 0.25}),
    ("nemotron_h", {"hybrid_override_pattern": None,
                    "layers_block_type": ["mamba", "attention", "mlp", "moe", "mamba"]}),
    # published keys that nothing reads
    ("gpt2", {"n_special": 0, "predict_special_tokens": True, "output_past": True, "_num_labels": 1}),
    ("mpt", {"tokenizer_name": "EleutherAI/gpt-neox-20b"}), ("gemma2", {"cache_implementation": "hybrid"}),
    ("gpt_neox", {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}),
    ("jamba", {"mamba_inner_layernorms": True}), ("bamba", {"partial_rotary_factor": 0.5, "attn_rotary_emb": 4}),
    ("nemotron_h", {"layer_norm_epsilon": 0.1, "rms_norm_eps": 0.5}), ("bloom", {"slow_but_exact": False}),
    ("llama", {"partial_rotary_factor": 1.0}),
    # transformers clamps no step when it decodes with a cache, so this one is compared without
    ("falcon_h1", {"time_step_limit": [0.3, 0.4]}),
    ("falcon_h1", {"mamba_use_mlp": True, "mlp_expansion_factor": 8, "attn_layer_indices": None}),
]  # fmt: skip


def name_of(value):
    return value if isinstance(value, str) else ",".join(value)


@pytest.mark.parametrize("spelling", ["raw", "saved"])
@pytest.mark.parametrize(("kind", "keys"), KEYS, ids=name_of)
def test_keys_mean_what_the_reference_takes_them_to_mean(kind, keys, spelling, tmp_path):
    assert_read_as_the_reference(kind, families.SMALLEST[kind] | keys, spelling, tmp_path)


HALF = {"partial_rotary_factor": 0.5}
WEIRD = ["weird"] * 4
# Keys that ask for what the reference doesn't do, or does and llmlib doesn't: never a guess, always the key's name.
REFUSED = [
    *[(case, {"hidden_act": "gelu"}, "hidden_act is 'gelu'") for case in ("jamba", "bamba", "falcon_h1")],
    *[(case, HALF, "partial_rotary_factor is 0.5")
      for case in ("llama", "falcon-7b-style", "mixtral", "gemma3", "granite")],
    ("llama", {"rope_parameters": {"rope_type": "default"} | HALF}, "partial_rotary_factor is 0.5"),
    ("bamba", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
    ("gpt_neox", {"rope_parameters": None, "rope_theta": 77.0}, "rope_theta is 77.0"),
    ("gpt_neox", {"rope_parameters": None} | HALF, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "'default' has unknown options {'factor'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 50.0}}}, "unknown options {'full_attention'"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"factor": 8.0}}, "unknown options {'factor': 8.0}"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters is 'rope_type'"),
    ("gemma3", {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}, "unknown options {'truncate'"),
    ("gemma3", {"rope_parameters": {"full_attention": YARN}, "original_max_position_embeddings": 8}, "original_max"),
    ("gemma3", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping is 2.0"),
    *[(case, {"layer_types": WEIRD}, "layer_types is 'weird'")
      for case in ("qwen2", "gemma2", "gemma3", "gpt_oss", "granitemoehybrid")],
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types is 'sliding_attention'"),
    ("zamba2", {"layers_block_type": WEIRD}, "layers_block_type is 'weird'"),
    ("nemotron_h", {"layer_types": None, "layers_block_type": None, "hybrid_override_pattern": "MX"},
     "hybrid_override_pattern is 'X'"),
    ("bloom", {"slow_but_exact": True}, "slow_but_exact is True"),
    ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms is False"),
    ("falcon_h1", {"projectors_bias": True}, "projectors_bias is True"),
    ("falcon_h1", {"mamba_use_mlp": False}, "mamba_use_mlp is False"),
    ("nemotron_h", {"layer_norm_epsilon": None, "rms_norm_eps": 0.1}, "rms_norm_eps = 0.1"),
    ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ("deepseek_v3", {"mlp_bias": True}, "mlp_bias is True"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED, ids=name_of)
def test_keys_that_are_refused_by_name(case, changes, message, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path, case, **changes)
    with pytest.raises(UnsupportedArchitectureError, match=re.escape(message)) as refusal:
        load(folder)
    assert str(folder / "config.json") in str(refusal.value)


# Values that fit nowhere: each is blamed on the file, in the words of whoever noticed.
MISFITS = [
    ("llama", {"num_key_value_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
    ("llama", {"num_attention_heads": 0}, "num_heads is 0"),
    ("llama", {"num_attention_heads": 4.0}, "wrong type or size"),
    ("llama", {"num_attention_heads": "4"}, "wrong type or size"),
    ("llama", {"vocab_size": -1}, "vocab_size is -1"),
    ("llama", {"head_dim": 0}, "head_dim is 0, and must be above 0"),
    ("llama", {"head_dim": 7}, "its width must be even"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', and must be a number"),
    ("llama", {"attention_bias": "no"}, "attention_bias is 'no', and must be true or false"),
    ("llama", {"rope_parameters": "x"}, "wrong type or size"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'factor'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0.0"),
    ("mpt", {"attn_config": [1]}, "wrong type or size"),
    ("granitemoehybrid", {"logits_scaling": 0}, "wrong type or size"),
    ("mixtral", {"num_experts_per_tok": 9}, "top_k is 9"),
    ("zamba2", {"mamba_expand": 3}, "d_model · expand must equal"),
    ("falcon_h1", {"mamba_d_ssm": 72}, "d_model · expand must equal"),
    ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, "part_scales has 2 factors: give 5"),
    ("falcon_h1", {"mlp_multipliers": [1.0]}, "wrong type or size"),
    ("qwen2-windows", {"sliding_window": 0}, "window is 0"),
    ("mamba2", {"time_step_limit": [0.5]}, "wrong type or size"),
]


@pytest.mark.parametrize(("case", "changes", "message"), MISFITS, ids=name_of)
def test_values_that_do_not_fit_are_blamed_on_the_file(case, changes, message, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path, case, **changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as refusal:
        load(folder)
    assert str(folder / "config.json") in str(refusal.value)


@pytest.mark.parametrize("kind", [["llama"], {"a": 1}, 3, True])
def test_a_model_type_that_is_no_name(kind, checkpoints, tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match="model_type is"):
        load(copied(checkpoints, tmp_path, model_type=kind))


def test_every_family_has_a_case():
    assert {kind for kind, _ in families.CASES.values()} == set(FAMILIES)


@torch.no_grad()
def test_dynamic_scaling_decodes_like_the_reference_within_its_original_length(checkpoints):
    theirs, folder = families.saved("llama-dynamic", checkpoints)
    expected = theirs.generate(tokens(1, 6), max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(load(folder).generate(tokens(1, 6), 10), expected)


@torch.no_grad()
def test_shards_and_bare_names_give_the_same_model(checkpoints, tmp_path):
    expected = load(families.saved("gpt2", checkpoints)[1])(tokens())
    folder = copied(checkpoints, tmp_path, "gpt2")
    edit_tensors(folder, lambda t: [t.__setitem__(n.removeprefix("transformer."), t.pop(n)) for n in list(t)])
    assert torch.equal(load(folder)(tokens()), expected)
    shard(folder)
    assert torch.equal(load(folder)(tokens()), expected)


@torch.no_grad()
def test_stored_masks_and_a_stored_tied_head_are_understood(checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path, "gpt2")

    def add(t):
        t["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        t["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        t["lm_head.weight"] = t["transformer.wte.weight"].clone()

    edit_tensors(folder, add)
    assert torch.equal(load(folder)(tokens()), load(families.saved("gpt2", checkpoints)[1])(tokens()))
    edit_tensors(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="ties the head to the embedding, and 'lm_head.weight' differs"):
        load(folder)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_weights_are_computed_in_the_type_asked_for(stored, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path)
    edit_tensors(folder, lambda t: t.update({n: x.to(stored) for n, x in t.items()}))
    theirs = type(families.saved("llama", checkpoints)[0]).from_pretrained(folder, dtype=torch.float32).eval()
    assert_same_logits(load(folder)(tokens()), theirs(tokens()).logits)
    half = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(tokens()).dtype == torch.float32


def edit_index(folder, edit):
    """Shard a checkpoint and rewrite its index's map by edit(map)."""
    shard(folder)
    file = folder / "model.safetensors.index.json"
    places = json.loads(file.read_text())["weight_map"]
    edit(places)
    file.write_text(json.dumps({"weight_map": places}))


def place_head_in(shard_name):
    return lambda folder: edit_index(folder, lambda places: places.update({"lm_head.weight": shard_name}))


def lose_head(folder):
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    shard(folder)


@torch.no_grad()
def test_a_balancing_bias_keeps_its_float32(checkpoints, tmp_path):
    """It decides among scores that differ by less than bfloat16 resolves."""
    families.saved("deepseek_v3", checkpoints)
    folder = copied(checkpoints, tmp_path, "deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_tensors(folder, lambda t: t[name].copy_(torch.linspace(0.6, 0.601, len(t[name]))))
    stored = load_file(folder / "model.safetensors")[name]
    bias = load(folder, dtype=torch.bfloat16).layers[1].ffn.router.e_score_correction_bias
    assert torch.equal(bias, stored)


def broken_files():
    """Ways to break a folder, and what the error must say."""

    def cut(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])

    def cut_shard(folder):
        shard(folder)
        file = folder / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])

    def lose_shard(folder):
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()

    def empty_index(folder):
        shard(folder)
        (folder / "model.safetensors.index.json").write_text("{}")

    def wrong_index(folder):
        shard(folder)
        file = folder / "model.safetensors.index.json"
        file.write_text(file.read_text().replace('"lm_head.weight"', '"lm_tail.weight"'))

    def twice(folder):
        shard(folder)
        file = folder / "model-00001-of-00002.safetensors"
        save_file(load_file(file) | {"model.norm.weight": torch.ones(32)}, file)

    def in_no_index(folder):
        shard(folder)
        file = folder / "model-00001-of-00002.safetensors"
        save_file(load_file(file) | {"extra": torch.ones(32)}, file)

    def pickle_only(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    return {
        "config.json": (lambda f: (f / "config.json").unlink(), "there is no .*config.json"),
        "config empty": (lambda f: (f / "config.json").write_text(""), "config.json can't be read as JSON"),
        "config list": (lambda f: (f / "config.json").write_text("[1]"), "config.json holds no JSON object"),
        "weights gone": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        "weights cut": (cut, "model.safetensors is not a whole safetensors file"),
        "shard cut": (cut_shard, "model-00002-of-00002.safetensors is not a whole"),
        "shard gone": (lose_shard, "names the shard model-00002-of-00002.safetensors"),
        "index empty": (empty_index, "index.json has no 'weight_map'"),
        "index wrong": (wrong_index, "holds 'lm_tail.weight', and it doesn't"),
        "tensor twice": (twice, "00001-of-00002.safetensors holds 'model.norm.weight', which .*places in model-00002"),
        "tensor in no index": (in_no_index, "00001-of-00002.safetensors holds 'extra', which .* doesn't name"),
        "shard a number": (
            place_head_in(7),
            "index.json puts 'lm_head.weight' in 7, which is no safetensors file's name",
        ),
        "shard a list": (place_head_in(["a"]), r"index.json puts 'lm_head.weight' in \['a'\]"),
        "shard outside": (
            place_head_in("../out.safetensors"),
            "index.json puts 'lm_head.weight' in '../out.safetensors'",
        ),
        "tensor gone": (lose_head, "index.json has no tensor 'lm_head.weight'"),
        "pickle": (pickle_only, "pytorch_model.bin holds pickled weights, which can run any code and are never opened"),
    }


@pytest.mark.parametrize("what", broken_files())
def test_broken_files_are_named(what, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path)
    damage, message = broken_files()[what]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickle_files_are_never_opened(checkpoints, tmp_path):
    mark = tmp_path / "mark"
    folder = copied(checkpoints, tmp_path)
    bomb = folder / "pytorch_model.bin"
    bomb.write_bytes(pickle.dumps(Bomb(mark)))
    pickle.loads(bomb.read_bytes())
    assert mark.exists()
    mark.unlink()
    load(folder)
    (folder / "model.safetensors").rename(tmp_path / "kept.safetensors")
    with pytest.raises(CheckpointError, match="never opened"):
        load(folder)
    bomb.rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)
    (folder / "model.safetensors").rename(bomb)
    index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="in 'pytorch_model.bin', which is no safetensors file's name"):
        load(folder)
    assert not mark.exists()


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop(K_PROJ),
            f"model.safetensors has no tensor '{K_PROJ}', which layers.1.mixer.k_proj.weight is made from",
        ),
        (
            lambda t: t.update(extra=torch.ones(2)),
            "model.safetensors holds 1 tensor that this config has no place for: extra",
        ),
        (lambda t: t.update({K_PROJ: t[K_PROJ].T}), r"has shape \(32, 16\); the config asks for \(16, 32\)"),
        (lambda t: t.update({K_PROJ: t[K_PROJ][:, :30]}), r"has shape \(16, 30\)"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.int8)}), "stored as I8.*use the unquantised"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.float8_e4m3fn)}), "stored as F8_E4M3.*use the unquantised"),
        (lambda t: t.update(extra=torch.ones(0)), "holds 1 tensor that this config has no place for: extra"),
    ],
)
def test_tensors_that_do_not_fit_are_named(edit, message, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path)
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_weights_that_an_adapter_changes_are_refused(checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(CheckpointError, match="adapter_config.json says that an adapter belongs.*merge it into"):
            load(folder)
        (folder / name).unlink()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float16"])
def test_a_dtype_that_nothing_can_be_computed_in(dtype, checkpoints):
    with pytest.raises(ConfigError, match="dtype is .*, and must be torch.float32 or torch.bfloat16"):
        load(families.saved("llama", checkpoints)[1], dtype=dtype)


def test_a_fused_matrix_of_the_wrong_shape_is_named(checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path, "gpt_neox")
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name][:90]}))
    with pytest.raises(
        CheckpointError, match=r"query_key_value.weight' has shape \(90, 32\), from which layers.0.mixer"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("case", "changes", "error", "message"),
    [
        ("llama", {"model_type": "t5"}, UnsupportedArchitectureError, "model_type is 't5'; llmlib reads bamba, bloom"),
        ("llama", {"model_type": None}, UnsupportedArchitectureError, "model_type is None"),
        ("llama", {"new_trick": 3}, UnsupportedArchitectureError, "doesn't understand new_trick = 3"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, UnsupportedArchitectureError,
         r"quantization_config says that the weights are quantised \(fp8\).*look for an unquantised copy"),
        ("llama", {"text_config": {"model_type": "llama"}}, UnsupportedArchitectureError, "understand text_config"),
        ("llama", {"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps is nan, and must be a number"),
        ("llama", {"rms_norm_eps": True}, CheckpointError, "rms_norm_eps is True, and must be a number"),
        ("llama", {"hidden_act": "mish"}, UnsupportedArchitectureError, "hidden_act is 'mish'"),
        ("llama", {"hidden_size": None}, CheckpointError, "has no 'hidden_size'"),
        ("llama", {"hidden_size": "wide"}, CheckpointError, "config.json: d_model is 'wide'"),
        ("llama", {"num_hidden_layers": "many"}, CheckpointError, "config.json: a value has the wrong type"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, CheckpointError, "config.json: .*num_heads = 5"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, UnsupportedArchitectureError, "'spiral' isn't known"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 1}},
         UnsupportedArchitectureError, "unknown options {'twist': 1}"),
        ("gpt2", {"add_cross_attention": True}, UnsupportedArchitectureError, "add_cross_attention is True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, UnsupportedArchitectureError, "apply_residual"),
        ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedArchitectureError, "scoring_func is 'softmax'"),
    ],
)  # fmt: skip
def test_configs_that_can_not_be_read_are_named(case, changes, error, message, checkpoints, tmp_path):
    with pytest.raises(error, match=message):
        load(copied(checkpoints, tmp_path, case, **changes))


PUBLISHED_SPELLINGS = {
    "llama": {"rope_parameters": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "pretraining_tp": 1},
    "llama-3.1-scaling": {
        "rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
    "llama-linear": {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2-windows": {"rope_parameters": None, "rope_theta": 10000.0, "layer_types": None},
    "gemma2": {"rope_parameters": None, "rope_theta": 10000.0, "layer_types": None, "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {"rope_parameters": None, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "layer_types": None,
               "sliding_window_pattern": 6},
    "phi": {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "gpt_neox": {"rope_parameters": None, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "falcon-7b-style": {"rope_parameters": None, "hidden_size": None, "n_embed": 32, "num_hidden_layers": None,
                        "n_layer": 3, "num_attention_heads": None, "n_head": 4, "num_kv_heads": None},
    "falcon-40b-style": {"rope_parameters": None, "num_kv_heads": None, "n_head_kv": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "rope_parameters": None, "rope_theta": 10000,
                         "position_embedding_type": "nope"},
    "nemotron_h": {"layers_block_type": None, "hybrid_override_pattern": "M*-EM"},
    "falcon_h1": {"rope_parameters": None, "rope_theta": 10000.0, "mlp_expansion_factor": 8, "mamba_use_mlp": True},
    "bamba": {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "deepseek_v3": {"rope_parameters": None, "rope_theta": 10000.0, "scoring_func": "sigmoid", "moe_layer_freq": 1,
                    "topk_method": "noaux_tc", "ep_size": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED_SPELLINGS)
@torch.no_grad()
def test_the_hubs_older_spelling_of_configs(case, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path, case, **PUBLISHED_SPELLINGS[case])
    assert torch.equal(load(folder)(tokens()), load(families.saved(case, checkpoints)[1])(tokens()))


def test_a_folder_that_is_not_there():
    with pytest.raises(CheckpointError, match="there is no folder /nowhere/at/all"):
        load("/nowhere/at/all")


@pytest.mark.parametrize("tied", [False, True])
def test_loading_needs_little_more_memory_than_the_weights(tied, tmp_path):
    """Peak resident memory of a fresh process, against the same process that only imports and allocates nothing."""
    folder = tmp_path / "big"
    folder.mkdir()
    d, f, v, n = 512, 2048, 32768, 6
    config = {"model_type": "llama", "vocab_size": v, "hidden_size": d, "intermediate_size": f, "num_hidden_layers": n,
              "num_attention_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
              "tie_word_embeddings": tied}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    names = {"model.embed_tokens": (v, d), "lm_head": (v, d), "model.norm": (d,)}
    for i in range(n):
        p = f"model.layers.{i}."
        names |= {p + "input_layernorm": (d,), p + "post_attention_layernorm": (d,)}
        names |= {p + f"self_attn.{m}_proj": (d, d) for m in "qkvo"}
        names |= {p + "mlp.gate_proj": (f, d), p + "mlp.up_proj": (f, d), p + "mlp.down_proj": (d, f)}
    save_file(
        {n + ".weight": torch.ones(s, dtype=torch.bfloat16) for n, s in names.items()}, folder / "model.safetensors"
    )
    weights = 4 * sum(torch.Size(s).numel() for n, s in names.items() if not (tied and n == "lm_head"))
    script = """
import resource, sys, torch, llmlib
import llmlib.hf.families

def peak():
    try:  # the highest mark of this program; getrusage on Linux counts the parent's before exec too
        return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

llmlib.load(llmlib.__path__[0] + "/book_model")  # what torch imports at first use is not the model's
before = peak()
model = llmlib.load(sys.argv[1])
print(peak() - before, model.num_parameters())
"""
    result = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    extra, count = map(int, result.stdout.split())
    assert 4 * count == weights
    assert weights * 0.9 < extra < weights * 1.2, f"{extra / weights:.2f} times the weights"


def test_nothing_is_left_on_the_meta_device(checkpoints):
    for case in families.CASES:
        model = load(families.saved(case, checkpoints)[1])
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                assert not (isinstance(value, torch.Tensor) and value.is_meta), f"{case}: {name}.{key}"


def test_saved_files_really_have_the_names_in_the_tables(checkpoints):
    """Guards the harness: what transformers saves is what the hub has, one tensor for each expert of Mixtral."""
    with safe_open(families.saved("mixtral", checkpoints)[1] / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in set(file.keys())


# Each feature of a case, switched off by one key of its config: if the logits stayed, the case wouldn't test it.
FEATURES = [
    ("gpt2", {"scale_attn_weights": False}), ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"layer_norm_epsilon": 0.1}), ("gpt2-scaled-by-layer", {"scale_attn_by_inverse_layer_idx": False}),
    ("falcon-7b-style", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("falcon-rw-style", {"alibi": False}), ("falcon-rw-style", {"activation": "relu"}),
    ("llama", {"rms_norm_eps": 0.1}), ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("llama", {"hidden_act": "gelu"}),
    *[(case, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}})
      for case in ("llama-yarn", "llama-linear", "llama-dynamic")],
    ("llama-3.1-scaling", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("mistral", {"sliding_window": 100}), ("qwen2-windows", {"layer_types": ["full_attention"] * 3}),
    ("gemma2", {"attn_logit_softcapping": 1000.0}), ("gemma2", {"final_logit_softcapping": 1000.0}),
    ("gemma2", {"sliding_window": 100}), ("gemma2", {"query_pre_attn_scalar": 5}),
    ("gemma2", {"hidden_activation": "silu"}), ("gemma3", {"sliding_window": 100}),
    ("gemma3", {"layer_types": ["full_attention"] * 7}),
    ("gemma3-scaled", {"rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 900.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0}}}),
    ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    ("gpt_neox", {"use_parallel_residual": False}), ("gpt_neox", {"hidden_act": "relu"}),
    ("mpt-clipped", {"attn_config": {"softmax_scale": 0.2}}), ("mpt-clipped", {"attn_config": {"clip_qkv": 0.5}}),
    ("granite", {"embedding_multiplier": 1.0}), ("granite", {"attention_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}), ("granite", {"logits_scaling": 1.0}),
    ("mixtral", {"num_experts_per_tok": 1}), ("mixtral-window", {"sliding_window": 100}),
    ("qwen3_moe-mixed", {"norm_topk_prob": False}), ("olmoe", {"norm_topk_prob": False}),
    ("olmoe-clipped", {"clip_qkv": 100.0}), ("deepseek_v2-grouped", {"routed_scaling_factor": 1.0}),
    ("deepseek_v2-grouped", {"topk_method": "greedy"}), ("deepseek_v3", {"topk_group": 3}),
    ("deepseek_v3", {"norm_topk_prob": False}), ("deepseek_v3", {"rope_interleave": False}),
    ("deepseek_v3-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("gpt_oss", {"swiglu_limit": 0.5}), ("gpt_oss", {"swiglu_alpha": 1.0}), ("gpt_oss", {"sliding_window": 100}),
    ("mamba", {"layer_norm_epsilon": 0.1}), ("falcon_mamba", {"mixer_rms_eps": 0.5}),
    ("mamba2-limits", {"time_step_limit": [0.0, 100.0]}), ("mamba2", {"n_groups": 2, "layer_norm_epsilon": 0.1}),
    ("jamba", {"rms_norm_eps": 0.1}), ("bamba", {"time_step_limit": [0.3, 0.4]}),
    *[("falcon_h1", {f"{name}_multiplier": 1.0}) for name in ("embedding", "lm_head", "key", "attention_in",
                                                              "attention_out", "ssm_in", "ssm_out")],
    *[("falcon_h1", {"mlp_multipliers": pair}) for pair in ([1.0, 0.6], [0.9, 1.0])],
    *[("falcon_h1", {"ssm_multipliers": [1.0 if i == j else s for j, s in enumerate((0.6, 0.5, 0.8, 1.5, 0.7))]})
      for i in range(5)],
    ("falcon_h1-norm-biases", {"mamba_norm_before_gate": False}), ("falcon_h1", {"time_step_limit": [0.3, 0.4]}),
    ("granitemoehybrid", {"position_embedding_type": "rope"}),
    ("granitemoehybrid-dense-rope", {"position_embedding_type": "nope"}),
    ("granitemoehybrid", {"num_experts_per_tok": 1}), ("nemotron_h", {"routed_scaling_factor": 1.0}),
    ("nemotron_h", {"time_step_min": 0.6}), ("nemotron_h", {"mlp_hidden_act": "silu"}),
    ("zamba2", {"hidden_act": "relu"}), ("zamba2-two-blocks", {"use_mem_rope": False}),
    ("qwen3", {"rms_norm_eps": 0.1}), ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("olmo2", {"rms_norm_eps": 0.1}), ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    ("bloom", {"layer_norm_epsilon": 0.1}), ("deepseek_v2", {"hidden_act": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "changes"), FEATURES, ids=lambda x: x if isinstance(x, str) else ",".join(x))
@torch.no_grad()
def test_each_feature_of_a_case_matters(case, changes, checkpoints, tmp_path):
    on = load(families.saved(case, checkpoints)[1])(tokens())
    off = load(copied(checkpoints, tmp_path, case, **changes))(tokens())
    assert (on - off).abs().max() / on.std() > 1e-2


def copy_group(x):
    """Mamba-2's B of the second group becomes that of the first: 64 rows of z, 64 of x, then 8 for each group's B."""
    return x.index_copy(0, torch.arange(136, 144), x[128:136])


# Features that no key switches off: the tensors that make them up, and what to make of those.
WEIGHTS = [
    ("qwen3", r"self_attn\.[qk]_norm", torch.ones_like), ("olmo2", r"self_attn\.[qk]_norm", torch.ones_like),
    ("olmo2", "post_feedforward_layernorm", torch.ones_like), ("bloom", "word_embeddings_layernorm", torch.ones_like),
    ("gpt_oss", "sinks", lambda x: x - 100), ("mamba2", r"in_proj\.weight", copy_group),
    ("zamba2", "_adapter_list", torch.zeros_like), ("zamba2-two-blocks", r"linear_[qkv]_adapter", torch.zeros_like),
    ("deepseek_v3", "e_score_correction_bias", torch.zeros_like),
    ("nemotron_h", "e_score_correction_bias", torch.zeros_like),
]  # fmt: skip


@pytest.mark.parametrize(("case", "pattern", "edit"), WEIGHTS, ids=lambda x: x if isinstance(x, str) else "")
@torch.no_grad()
def test_each_weight_of_a_feature_matters(case, pattern, edit, checkpoints, tmp_path):
    folder = copied(checkpoints, tmp_path, case)
    edit_tensors(folder, lambda t: t.update({n: edit(x) for n, x in t.items() if re.search(pattern, n)}))
    on, off = load(families.saved(case, checkpoints)[1])(tokens()), load(folder)(tokens())
    assert (on - off).abs().max() / on.std() > 1e-2
