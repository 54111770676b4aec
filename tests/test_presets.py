"""Every preset against the reference implementation's count of the same published config, and against its label."""

import json
import re

import pytest
import torch

from llmlib import ConfigError, cost, presets
from llmlib.model import CausalLM, ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations


def llama(d, n, h, f, kv=None, **more):
    return "llama", {"hidden_size": d, "num_hidden_layers": n, "num_attention_heads": h, "intermediate_size": f,
                     "num_key_value_heads": kv or h, "vocab_size": 32000} | more  # fmt: skip


def falcon(d, n, h, **more):
    return "falcon", {"hidden_size": d, "num_hidden_layers": n, "num_attention_heads": h, "vocab_size": 65024,
                      "ffn_hidden_size": 4 * d} | more  # fmt: skip


def granite(d, n, h, kv, f, attention_at=None, experts=(0, 0, 512), **more):
    kinds = ["attention" if attention_at is None or i in attention_at else "mamba" for i in range(n)]
    scan = {"mamba_n_heads": 32, "mamba_d_head": 2 * d // 32, "mamba_d_state": 128} | more
    return "granitemoehybrid", {
        "hidden_size": d, "num_hidden_layers": n, "num_attention_heads": h, "num_key_value_heads": kv,
        "shared_intermediate_size": f, "layer_types": kinds, "vocab_size": 100352, "tie_word_embeddings": True,
        "num_local_experts": experts[0], "num_experts_per_tok": experts[1], "intermediate_size": experts[2], **scan,
    }  # fmt: skip


def jamba(d, n, h, f):
    return "jamba", {"hidden_size": d, "num_hidden_layers": n, "num_attention_heads": h, "intermediate_size": f,
                     "num_key_value_heads": 8}  # fmt: skip


def gpt2(d, n, h):
    return "gpt2", {"n_embd": d, "n_layer": n, "n_head": h}


def mamba2(d, n):
    return "mamba2", {"hidden_size": d, "num_hidden_layers": n, "num_heads": 2 * d // 64, "n_groups": 1,
                      "vocab_size": 50288, "tie_word_embeddings": True}  # fmt: skip


def zamba2(d, n, hybrid_at, **more):
    kinds = ["hybrid" if i in hybrid_at else "mamba" for i in range(n)]
    return "zamba2", {"hidden_size": d, "num_hidden_layers": n, "layers_block_type": kinds, "vocab_size": 32000,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 4 * d,
                      "attention_head_dim": 2 * d // 32, "n_mamba_heads": 2 * d // 64, "mamba_headdim": 64,
                      "adapter_rank": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | more  # fmt: skip


def nemotron_h(d, pattern, h, scan_heads, n, f):
    return "nemotron_h", {"hidden_size": d, "hybrid_override_pattern": pattern, "num_attention_heads": h,
                          "mamba_num_heads": scan_heads, "ssm_state_size": n, "intermediate_size": f,
                          "vocab_size": 131072, "num_key_value_heads": 8, "head_dim": 128, "mamba_head_dim": 64,
                          "n_groups": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192}  # fmt: skip


L3 = {"vocab_size": 128256}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 8}
TENTHS = (5, 15, 25, 35)
N8 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
N47 = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
N56 = (
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
    "M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
)
HYBRIDS = {
    "zamba2-1.2b": zamba2(
        2048, 38, (5, 11, 17, 23, 29, 35), mamba_d_state=128, num_mem_blocks=1, use_mem_rope=True, rope_theta=10000.0,
        use_shared_attention_adapter=True),
    "zamba2-2.7b": zamba2(2560, 54, (6, 12, 18, 24, 30, 36, 42, 47, 51), mamba_d_state=64, num_mem_blocks=2),
    "bamba-9b": ("bamba", {
        "attn_layer_indices": [9, 18, 27], "hidden_size": 4096, "intermediate_size": 14336, "mamba_chunk_size": 256,
        "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2,
        "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "vocab_size": 128256, "max_position_embeddings": 4096}),
    "falcon-h1-0.5b": ("falcon_h1", {
        "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "embedding_multiplier": 5.656854249492381,
        "head_dim": 64, "hidden_size": 1024, "intermediate_size": 2048, "key_multiplier": 0.39062499999999994,
        "lm_head_multiplier": 0.0390625, "mamba_chunk_size": 128, "mamba_d_head": 64, "mamba_d_ssm": 1536,
        "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_n_heads": 24, "mamba_norm_before_gate": False,
        "mamba_rms_norm": False, "mlp_multipliers": [0.8838834764831844, 0.5859375], "num_attention_heads": 8,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e11,
        "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587, "vocab_size": 32784,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "max_position_embeddings": 16384, "tie_word_embeddings": False}),
    "nemotron-h-4b": nemotron_h(3072, N8, 32, 112, 128, 12288),
    "nemotron-h-8b": nemotron_h(4096, N8, 32, 128, 128, 21504),
    "nemotron-h-47b": nemotron_h(8192, N47, 64, 256, 256, 30720),
    "nemotron-h-56b": nemotron_h(8192, N56, 64, 256, 256, 32768),
}  # fmt: skip
# What the published config.json of each says.
REFERENCE = {
    "gpt2": gpt2(768, 12, 12), "gpt2-medium": gpt2(1024, 24, 16), "gpt2-large": gpt2(1280, 36, 20),
    "gpt2-xl": gpt2(1600, 48, 25),
    "llama-7b": llama(4096, 32, 32, 11008), "llama-13b": llama(5120, 40, 40, 13824),
    "llama-33b": llama(6656, 60, 52, 17920), "llama-65b": llama(8192, 80, 64, 22016),
    "llama-2-7b": llama(4096, 32, 32, 11008), "llama-2-13b": llama(5120, 40, 40, 13824),
    "llama-2-70b": llama(8192, 80, 64, 28672, 8),
    "llama-3-8b": llama(4096, 32, 32, 14336, 8, **L3), "llama-3-70b": llama(8192, 80, 64, 28672, 8, **L3),
    "llama-3.1-8b": llama(4096, 32, 32, 14336, 8, **L3), "llama-3.1-70b": llama(8192, 80, 64, 28672, 8, **L3),
    "llama-3.1-405b": llama(16384, 126, 128, 53248, 8, **L3),
    "llama-3.2-1b": llama(2048, 16, 32, 8192, 8, tie_word_embeddings=True, **L3),
    "llama-3.2-3b": llama(3072, 28, 24, 8192, 8, tie_word_embeddings=True, **L3),
    "falcon-7b": falcon(4544, 32, 71), "falcon-40b": falcon(8192, 60, 128, **NEW),
    "falcon-180b": falcon(14848, 80, 232, **NEW),
    "falcon-11b": falcon(4096, 60, 32, num_ln_in_parallel_attn=1, tie_word_embeddings=False, **NEW),
    "falcon-rw-1b": falcon(
        2048, 24, 32, alibi=True, bias=True, multi_query=False, parallel_attn=False, vocab_size=50304),
    "falcon-rw-7b": falcon(4096, 36, 64, alibi=True, bias=True, multi_query=False, parallel_attn=False),
    "granite-4.0-h-small": granite(
        4096, 40, 32, 8, 1536, TENTHS, (72, 10, 768), mamba_n_heads=128, mamba_d_head=64),
    "granite-4.0-h-tiny": granite(1536, 40, 12, 4, 1024, TENTHS, (64, 6, 512), mamba_n_heads=48, mamba_d_head=64),
    "granite-4.0-h-micro": granite(2048, 40, 32, 8, 8192, TENTHS, mamba_n_heads=64, mamba_d_head=64),
    "granite-4.0-micro": granite(2560, 40, 40, 8, 8192),
    "granite-4.0-h-1b": granite(1536, 40, 12, 4, 4096, TENTHS, mamba_n_heads=48, mamba_d_head=64),
    "granite-4.0-1b": granite(2048, 40, 16, 4, 4096),
    "granite-4.0-h-350m": granite(768, 32, 12, 4, 2048, (10, 13, 17, 27), mamba_n_heads=48, mamba_d_head=32),
    "granite-4.0-350m": granite(1024, 28, 16, 4, 2048),
    **{f"mamba-{name}": ("mamba", {"hidden_size": d, "num_hidden_layers": n, "vocab_size": 50280})
       for name, d, n in (("130m", 768, 24), ("370m", 1024, 48), ("790m", 1536, 48), ("1.4b", 2048, 48),
                          ("2.8b", 2560, 64))},
    **{f"mamba2-{name}": mamba2(d, n)
       for name, d, n in (("130m", 768, 24), ("370m", 1024, 48), ("780m", 1536, 48), ("1.3b", 2048, 48),
                          ("2.7b", 2560, 64))},
    "falcon-mamba-7b": ("falcon_mamba", {"hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024,
                                         "tie_word_embeddings": False}),
    "jamba-v0.1": jamba(4096, 32, 32, 14336), "jamba-1.5-mini": jamba(4096, 32, 32, 14336),
    "jamba-1.5-large": jamba(8192, 72, 64, 24576),
    **HYBRIDS,
}  # fmt: skip
# Labels that their makers round in ways of their own.
LOOSE = {"falcon-rw-1b": 1.31e9, "llama-33b": 32.5e9, "granite-4.0-h-tiny": 6.94e9, "granite-4.0-h-micro": 3.19e9,
         "granite-4.0-micro": 3.40e9, "falcon-rw-7b": 7.54e9, "llama-3.2-1b": 1.24e9, "falcon-180b": 179e9,
         "falcon-40b": 41.3e9, "granite-4.0-h-small": 32.2e9, "llama-3.2-3b": 3.21e9,
         "nemotron-h-4b": 4.49e9}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_count_equals_the_references(name):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, options = REFERENCE[name]
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options))
    assert cost.parameters(presets.get(name)).total == reference.num_parameters()


@pytest.mark.parametrize("name", REFERENCE)
def test_count_rounds_to_the_label(name):
    total, label = cost.parameters(presets.get(name)).total, presets.PRESETS[name].label
    unit = {"M": 1e6, "B": 1e9}[label[-1]]
    if name in LOOSE:
        assert total == pytest.approx(LOOSE[name], rel=0.005)
    else:
        assert total == pytest.approx(float(label[:-1]) * unit, rel=0.05)


SAMBA = {"samba-421m": (421e6, 1536, 12, 4096), "samba-1.3b": (1.33e9, 2304, 18, 6144)}


@pytest.mark.parametrize("name", SAMBA)
def test_samba_by_hand(name):
    """Its code isn't in transformers: the count, term by term."""
    label, d, layers, f = SAMBA[name]
    width, rank, states = 2 * d, d // 16, 16
    mamba = d * 2 * width + (4 + 1) * width + width * (rank + 2 * states) + (rank + 1) * width
    mamba += width * states + width + width * d  # A, D, out
    attention, ffn, norm = 4 * d * d, 3 * d * f, d
    total = 32000 * d + layers // 2 * (mamba + attention + 2 * (ffn + 2 * norm)) + norm
    assert cost.parameters(presets.get(name)).total == total == pytest.approx(label, rel=0.003)


def published_attributes(module):
    plain = (bool, int, float, str, tuple, type(None))
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, plain)}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_the_models_that_their_config_files_give(name, tmp_path):
    """Layer by layer the same modules with the same sizes, scales, limits and norms, however their options are said."""
    from llmlib.hf import read_config

    kind, options = HYBRIDS[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **options}))
    found, expected = read_config(tmp_path)[0], presets.get(name)
    assert found.replace(name=None, layers=(), norm=expected.norm) == expected.replace(name=None, layers=())
    with torch.device("meta"):
        mine, theirs = CausalLM(expected), CausalLM(found)
    assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    for (where, a), (_, b) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        assert type(a) is type(b), where
        assert published_attributes(a) == published_attributes(b), where


def test_the_books_own_hybrids_are_small_and_not_published():
    dense, sparse = (presets.hybrids.book_hybrid(sparse=s) for s in (False, True))
    assert not {dense.name, sparse.name} & set(presets.names())
    for config in (dense, sparse):
        assert config.name.startswith("book's own")
        assert [layer.mixer.cls.__name__ for layer in config.layers] == 2 * [*3 * ["Mamba2"], "MLA"]
        assert ModelConfig.from_yaml(config.to_yaml()) == config
    small, (total, active) = (
        cost.parameters(dense).total,
        (cost.parameters(sparse, active=a).total for a in (False, True)),
    )
    assert active < small < total < 6e6

    torch.manual_seed(0)
    model, tokens = CausalLM(sparse).eval(), torch.randint(256, (1, 24))
    state = model.new_state()
    pieces = torch.cat([model(piece, state) for piece in tokens.split([10, 1, 13], 1)], 1)
    torch.testing.assert_close(pieces, model(tokens), rtol=1e-3, atol=1e-4)


def test_names_families_and_sources():
    assert set(presets.names("gpt2")) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    assert len(presets.names()) == len(set(presets.names())) > 50
    for name, preset in presets.PRESETS.items():
        assert presets.get(name).name == name
        assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|huggingface\.co/|openai\.com/)", preset.source)
        assert 2019 <= preset.year <= 2026


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no preset 'granite-4-h-tiny'; the nearest are granite-4.0-h-tiny"):
        presets.get("granite-4-h-tiny")


def test_every_preset_survives_yaml():
    for name in presets.names():
        assert ModelConfig.from_yaml(presets.get(name).to_yaml()) == presets.get(name)


def test_presets_are_the_configs_that_their_checkpoints_give(tmp_path):
    """The same shapes, read from a published config.json, make the same layers."""
    from llmlib.hf import read_config

    published = {
        "llama-3.1-8b": {
            "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        "gpt2": {"model_type": "gpt2", "n_ctx": 1024, "vocab_size": 50257},
    }  # fmt: skip
    for name, data in published.items():
        (tmp_path / "config.json").write_text(json.dumps(data))
        found, expected = read_config(tmp_path)[0], presets.get(name)
        assert cost.parameters(found) == cost.parameters(expected)
        for key in ("num_heads", "num_kv_heads", "rope_theta", "rope_scaling"):
            mine, theirs = (c.layers[0].mixer.options.get(key) for c in (found, expected))
            assert mine == theirs or (key == "num_kv_heads" and theirs is None), key
