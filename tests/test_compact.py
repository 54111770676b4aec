"""The compact YAML: each kind in the field's own words, and for each mistake an error with names and numbers."""

import pytest
import torch

from llmlib.attention import MLA, Attention
from llmlib.compact import KEYS, from_yaml
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.model import CausalLM, spec
from llmlib.moe import MoE
from llmlib.ssm import Mamba, Mamba2, Mamba3

torch.set_num_threads(1)
BASE = {"hidden_size": 32, "num_layers": 8, "vocab_size": 50}
HEADS = {"num_heads": 4, "kv_heads": 2}
MAMBA2 = {"mamba2_num_heads": 4, "mamba2_head_dim": 16, "mamba2_state_size": 8}


def write(**keys) -> str:
    return "\n".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()
    )


def kinds(config) -> list[str]:
    return [layer.mixer.cls.__name__ for layer in config.layers]


def test_a_list_says_which_layers_are_mamba():
    text = write(**BASE, **HEADS, mamba_d_state=4, mamba_layers=[0, 1, 2, 4, 5, 6])
    assert kinds(from_yaml(text)) == ["Mamba", "Mamba", "Mamba", "Attention"] * 2
    assert kinds(from_yaml(write(**BASE, **HEADS, mamba_d_state=4, attention_layers=[3, 7]))) == kinds(from_yaml(text))
    both = from_yaml(text + "\nattention_layers: [3, 7]")
    assert both == from_yaml(text)


@pytest.mark.parametrize(
    "keys, mixers",
    [
        ({**HEADS, "rope_theta": 1e4}, {spec(Attention, num_heads=4, num_kv_heads=2, rope_theta=1e4)}),
        ({"num_heads": 4, "sliding_window": 256}, {spec(Attention, num_heads=4, num_kv_heads=4, window=256)}),
        (
            {"num_heads": 4, "kv_latent_dim": 16, "q_latent_dim": 24, "d_rope": 4},
            {spec(MLA, num_heads=4, head_dim=8, kv_latent_dim=16, d_rope=4, q_latent_dim=24)},
        ),
        (
            {"mamba_d_state": 8, "mamba_d_conv": 3, "mamba_expand": 1.5},
            {spec(Mamba, d_state=8, d_conv=3, expand=1.5)},
        ),
        (
            {**MAMBA2, "mamba2_chunk_size": 16, "mamba2_n_groups": 2, "mamba2_conv_kernel": 2, "mamba2_expand": 2},
            {spec(Mamba2, num_heads=4, head_dim=16, d_state=8, chunk_size=16, n_groups=2, d_conv=2, expand=2)},
        ),
        (
            {**MAMBA2, "mamba3_enabled": True, "mamba3_complex_rope": False, "mamba3_mimo_rank": 2},
            {spec(Mamba3, num_heads=4, head_dim=16, d_state=8, complex_rope=False, mimo_rank=2)},
        ),
        (
            {**MAMBA2, "mamba3_enabled": True, "mamba3_use_conv": True, "mamba2_conv_kernel": 2, "mamba3_mimo_rank": 0},
            {spec(Mamba3, num_heads=4, head_dim=16, d_state=8, d_conv=2, use_conv=True, mimo_rank=0)},
        ),
    ],
)
def test_one_kind_of_layer(keys, mixers):
    config = from_yaml(write(**BASE, **keys))
    assert {layer.mixer for layer in config.layers} == mixers and len(config.layers) == 8
    assert CausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 50)


def test_every_key_at_once_where_they_go_together():
    mla = {"num_heads": 4, "kv_latent_dim": 16, "d_rope": 4, "rope_theta": 500000}
    experts = {"num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True, "load_balance_alpha": 0.01}
    config = from_yaml(
        write(**BASE, **mla, **MAMBA2, **experts, intermediate_size=24, max_seq_len=4096, attention_layers=[1, 5])
    )
    assert kinds(config) == ["Mamba2", "MLA", "Mamba2", "Mamba2", "Mamba2", "MLA", "Mamba2", "Mamba2"]
    expected = spec(
        MoE, num_experts=4, top_k=2, expert=spec(SwiGLU, d_ff=24), num_shared_experts=1, load_balance_alpha=0.01
    )
    assert {layer.ffn for layer in config.layers} == {expected} and config.max_seq_len == 4096
    model, tokens = CausalLM(config).double().eval(), torch.randint(50, (1, 9))
    state = model.new_state()
    logits = torch.cat([model(piece, state) for piece in tokens.split([4, 1, 4], 1)], 1)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-9, atol=1e-9)


def test_it_reads_files(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(write(**BASE, **HEADS))
    assert from_yaml(path) == from_yaml(str(path)) == from_yaml(write(**BASE, **HEADS))
    with pytest.raises(ConfigError, match="there is no file 'none.yaml'"):
        from_yaml("none.yaml")


def test_a_config_read_from_compact_yaml_is_a_config_like_any_other():
    config = from_yaml(write(**BASE, **HEADS, **MAMBA2, mamba_layers=[0, 2], intermediate_size=24))
    assert type(config).from_yaml(config.to_yaml()) == config


MISTAKES = {
    "unknown key": ({"hiden_size": 3}, "unknown key 'hiden_size' (did you mean 'hidden_size'?)"),
    "missing": ({"vocab_size": None}, "vocab_size is None, and must be a whole number above 0"),
    "a word for a number": ({"num_heads": "four"}, "num_heads is 'four', and must be a whole number above 0"),
    "a fraction": ({"num_layers": 2.5}, "num_layers is 2.5, and must be a whole number above 0"),
    "infinity": ({"rope_theta": ".inf"}, "rope_theta is inf, and must be a finite number above 0"),
    "zero": ({"mamba2_chunk_size": 0}, "mamba2_chunk_size is 0, and must be a whole number above 0"),
    "negative rank": ({"mamba3_mimo_rank": -1}, "mamba3_mimo_rank is -1, and must be a whole number from 0"),
    "not a flag": ({"mamba3_enabled": 1}, "mamba3_enabled is 1, and must be true or false"),
    "overlap": (
        {"mamba_d_state": 4, "attention_layers": [0, 1, 2], "mamba_layers": [2, 3, 4, 5, 6, 7]},
        "attention_layers and mamba_layers overlap: layers [2] are in both",
    ),
    "gap": (
        {"mamba_d_state": 4, "attention_layers": [0], "mamba_layers": [2, 3, 4, 6, 7]},
        "leave a gap: layers [1, 5] of 8 are in neither",
    ),
    "out of range": ({"attention_layers": [3, 8]}, "attention_layers names layers [8], but num_layers is 8: they go"),
    "negative index": ({"mamba_layers": [-1]}, "mamba_layers names layers [-1], but num_layers is 8"),
    "twice": ({"mamba_layers": [1, 1]}, "mamba_layers names layers [1] twice"),
    "not a list": ({"mamba_layers": 3}, "mamba_layers is 3, and must be a list of whole numbers"),
    "two kinds, no list": ({"mamba_d_state": 4}, "which layers are which? the config has keys of attention and mamba"),
    "heads": (
        {"num_heads": 5, "kv_heads": 5},
        "hidden_size must be a multiple of num_heads, and 32 is not a multiple of 5",
    ),
    "kv heads": ({"kv_heads": 3}, "num_heads must be a multiple of kv_heads, and 4 is not a multiple of 3"),
    "inner width": (
        {"mamba_layers": [0], "mamba2_num_heads": 3, "mamba2_head_dim": 16},
        "hidden_size · mamba2_expand must equal mamba2_num_heads · mamba2_head_dim, but 32 · 2 = 64 and 3 · 16 = 48",
    ),
    "groups": (
        {"mamba_layers": [0], **MAMBA2, "mamba2_n_groups": 3},
        "mamba2_num_heads must be a multiple of mamba2_n_groups, and 4 is not a multiple of 3",
    ),
    "an inner width that is no number of channels": (
        {"mamba_layers": [0], "mamba_expand": 1.3},
        "hidden_size · mamba_expand must be whole and at least 1, but 32 · 1.3 is not",
    ),
    "a head wider than the layer": (
        {"mamba_layers": [0], "mamba2_head_dim": 128},
        "but 32 · 2 = 64 and 1 · 128 = 128",
    ),
    "an odd state": (
        {"mamba_layers": [0], "mamba3_enabled": True, **MAMBA2, "mamba2_state_size": 7},
        "mamba2_state_size is 7, and Mamba-3 needs it even",
    ),
    "two Mambas": ({"mamba_layers": [0], **MAMBA2, "mamba_d_state": 4}, "mamba_d_state would have no effect: the keys"),
    "Mamba-3 not enabled": (
        {"mamba_layers": [0], **MAMBA2, "mamba3_mimo_rank": 4},
        "mamba3_mimo_rank would have no effect: mamba3_enabled is not true",
    ),
    "Mamba-1 in Mamba-3": (
        {"mamba_layers": [0], "mamba3_enabled": True, "mamba_d_conv": 4, **MAMBA2},
        "mamba_d_conv would have no effect",
    ),
    "a convolution that isn't": (
        {"mamba_layers": [0], "mamba3_enabled": True, "mamba2_conv_kernel": 4, **MAMBA2},
        "mamba2_conv_kernel would have no effect",
    ),
    "no layer of that kind": (
        {"mamba_d_state": 4, "attention_layers": list(range(8))},
        "mamba_d_state would have no effect: no layer is mamba",
    ),
    "MLA with kv heads": ({"kv_latent_dim": 8, "d_rope": 4}, "kv_heads would have no effect: attention with kv_latent"),
    "d_rope without MLA": ({"d_rope": 4}, "d_rope would have no effect: only MLA has it, and kv_latent_dim is missing"),
    "experts without a width": ({"num_experts": 4, "experts_per_tok": 2}, "num_experts, experts_per_tok would have no"),
    "experts without a number": (
        {"intermediate_size": 8, "experts_per_tok": 2},
        "experts_per_tok would have no effect: num_experts is missing",
    ),
    "experts without k": ({"intermediate_size": 8, "num_experts": 4}, "so experts_per_tok must be"),
    "too many": (
        {"intermediate_size": 8, "num_experts": 4, "experts_per_tok": 5},
        "experts_per_tok can't be above num_experts, and 5 is above 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("keys, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(keys, message):
    text = write(**(BASE | HEADS | keys)).replace("None", "null")
    with pytest.raises(ConfigError) as caught:
        from_yaml(text)
    assert message in str(caught.value)


def test_numbers_are_those_of_yaml_1_2():
    """YAML 1.1, which PyYAML reads, takes 1e4 for a word."""
    for number in ("1e4", "1E+4", "10e3", "1.e4", ".1e5", "10000.0"):
        text = write(**BASE, **HEADS) + f"\nrope_theta: {number}\n"
        assert from_yaml(text).layers[0].mixer.options["rope_theta"] == 1e4


def test_a_key_that_stands_twice_is_named():
    with pytest.raises(ConfigError, match="the mapping from line 1 on has num_heads twice"):
        from_yaml(write(**BASE, **HEADS) + "\nnum_heads: 8\n")


def test_more_mistakes():
    with pytest.raises(ConfigError, match="which layers are which.*neither attention nor mamba"):
        from_yaml(write(**BASE, mamba3_enabled=False))
    with pytest.raises(ConfigError, match="the config lacks vocab_size"):
        from_yaml(write(hidden_size=8, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="which layers are which.*neither attention nor mamba"):
        from_yaml(write(**BASE))
    with pytest.raises(ConfigError, match="num_heads is missing, and there are attention layers"):
        from_yaml(write(**BASE, mamba_d_state=4, mamba_layers=[0]))
    with pytest.raises(ConfigError, match="which needs d_rope"):
        from_yaml(write(**BASE, num_heads=4, kv_latent_dim=8))
    with pytest.raises(ConfigError, match="is a mapping of keys to values"):
        from_yaml("- 1\n- 2")


def test_every_key_of_the_design_is_known():
    words = (
        "hidden_size num_layers num_heads kv_heads vocab_size max_seq_len rope_theta intermediate_size kv_latent_dim "
        "q_latent_dim d_rope mamba_d_state mamba_d_conv mamba_expand mamba2_num_heads mamba2_head_dim "
        "mamba2_state_size mamba2_chunk_size mamba2_n_groups mamba2_conv_kernel mamba2_expand mamba3_enabled "
        "mamba3_complex_rope mamba3_mimo_rank mamba3_use_conv num_experts experts_per_tok shared_expert_enabled "
        "load_balance_alpha attention_layers mamba_layers"
    )
    assert set(words.split()) <= set(KEYS)
