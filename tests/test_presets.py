"""Every preset against the reference implementation's count of the same published config, and against its label."""

import re

import pytest
import torch

from llmlib import ConfigError, cost, presets

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


L3 = {"vocab_size": 128256}
NEW = {"new_decoder_architecture": True, "num_kv_heads": 8}
TENTHS = (5, 15, 25, 35)
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
}  # fmt: skip
# Labels that their makers round in ways of their own.
LOOSE = {"falcon-rw-1b": 1.31e9, "llama-33b": 32.5e9, "granite-4.0-h-tiny": 6.94e9, "granite-4.0-h-micro": 3.19e9,
         "granite-4.0-micro": 3.40e9, "falcon-rw-7b": 7.54e9, "llama-3.2-1b": 1.24e9, "falcon-180b": 179e9,
         "falcon-40b": 41.3e9, "granite-4.0-h-small": 32.2e9, "llama-3.2-3b": 3.21e9}  # fmt: skip


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
    from llmlib.model import ModelConfig

    for name in presets.names():
        assert ModelConfig.from_yaml(presets.get(name).to_yaml()) == presets.get(name)


def test_presets_are_the_configs_that_their_checkpoints_give(tmp_path):
    """The same shapes, read from a published config.json, make the same layers."""
    import json

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
