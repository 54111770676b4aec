"""A model in thirty words: the flat YAML that people write for hybrids, read into a `ModelConfig`.

    hidden_size: 512
    num_layers: 8
    vocab_size: 32000
    num_heads: 8
    kv_heads: 2
    intermediate_size: 1408
    mamba2_num_heads: 16
    mamba2_head_dim: 64
    mamba_layers: [0, 1, 2, 4, 5, 6]        # the others are attention

Every key is checked, and every key counts: one that would have no effect is an error.
"""

import difflib
import math
from collections.abc import Callable
from pathlib import Path

from llmlib.attention import MLA, Attention
from llmlib.errors import ConfigError, require
from llmlib.ffn import SwiGLU
from llmlib.model import Layer, ModelConfig, Spec, spec
from llmlib.moe import MoE
from llmlib.norm import RMSNorm
from llmlib.ssm import Mamba, Mamba2, Mamba3
from llmlib.yaml12 import read_yaml

SIZES = ("hidden_size", "num_layers", "vocab_size")
ATTENTION = ("num_heads", "kv_heads", "rope_theta", "sliding_window", "kv_latent_dim", "q_latent_dim", "d_rope")
MAMBA = {"mamba_d_state": "d_state", "mamba_d_conv": "d_conv", "mamba_expand": "expand"}
MAMBA2 = {
    "mamba2_num_heads": "num_heads",
    "mamba2_head_dim": "head_dim",
    "mamba2_state_size": "d_state",
    "mamba2_chunk_size": "chunk_size",
    "mamba2_n_groups": "n_groups",
    "mamba2_conv_kernel": "d_conv",
    "mamba2_expand": "expand",
}
MAMBA3 = {
    "mamba3_complex_rope": "complex_rope",
    "mamba3_mimo_rank": "mimo_rank",
    "mamba3_use_conv": "use_conv",
}
EXPERTS = ("num_experts", "experts_per_tok", "shared_expert_enabled", "load_balance_alpha")
KEYS = (
    *SIZES, "max_seq_len", "intermediate_size", *ATTENTION, *MAMBA, *MAMBA2, "mamba3_enabled", *MAMBA3, *EXPERTS,
    "attention_layers", "mamba_layers",
)  # fmt: skip
FLAGS = ("mamba3_enabled", "mamba3_complex_rope", "mamba3_use_conv", "shared_expert_enabled")
NUMBERS = ("rope_theta", "mamba_expand", "mamba2_expand", "load_balance_alpha")
MAY_BE_ZERO = ("mamba3_mimo_rank", "load_balance_alpha")


def from_yaml(source: str | Path) -> ModelConfig:
    """The model that a compact YAML describes; `source` is its text, or the path of a file.

    hidden_size, num_layers, vocab_size   always there; max_seq_len is information
    attention_layers, mamba_layers        which layers are which, counted from 0. One list is enough: the rest are the
                                          other kind. Without either, the model is of the one kind whose keys it has
    num_heads, kv_heads, rope_theta, sliding_window    attention; without rope_theta it has no positions
    kv_latent_dim, d_rope, q_latent_dim                attention is MLA
    mamba_*, mamba2_*, mamba3_enabled with mamba2_* and mamba3_*    which Mamba, and its sizes
    intermediate_size                     a SwiGLU in every layer; none without it
    num_experts, experts_per_tok, shared_expert_enabled, load_balance_alpha    its experts

    Raises ConfigError for unknown or idle keys, values of the wrong type, sizes that don't fit together, and layer
    lists that overlap, leave a gap, or name a layer that isn't there.
    """
    data = read_yaml(_text(source))
    require(isinstance(data, dict), f"a compact config is a mapping of keys to values, and this is {data!r}")
    _check_values(data)
    kinds = _kinds(data)
    parts = {"attention": _attention, "mamba": _mamba}
    for kind in parts.keys() - set(kinds):
        idle = [key for key in _keys_of(kind) if key in data]
        require(not idle, f"{', '.join(idle)} would have no effect: no layer is {kind}")
    mixers = {kind: parts[kind](data) for kind in parts if kind in kinds}
    ffn = _ffn(data)
    return ModelConfig(
        vocab_size=data["vocab_size"],
        d_model=data["hidden_size"],
        layers=tuple(Layer(mixer=mixers[kind], ffn=ffn) for kind in kinds),
        norm=spec(RMSNorm, eps=1e-5),
        max_seq_len=data.get("max_seq_len"),
    )


def _text(source: str | Path) -> str:
    if isinstance(source, str) and ("\n" in source or ":" in source):
        return source
    require(Path(source).is_file(), f"there is no file {str(source)!r}, and it isn't YAML with key: value lines either")
    return Path(source).read_text(encoding="utf-8")


def _check_values(data: dict) -> None:
    for key, value in data.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            raise ConfigError(
                f"unknown key {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}; the keys are {KEYS}"
            )
        if key in ("attention_layers", "mamba_layers"):
            continue
        if key in FLAGS:
            require(isinstance(value, bool), f"{key} is {value!r}, and must be true or false")
            continue
        number = isinstance(value, int | float if key in NUMBERS else int) and not isinstance(value, bool)
        least = 0 if key in MAY_BE_ZERO else "above 0"
        require(
            number and (0 < value < math.inf or (value == 0 and least == 0)),
            f"{key} is {value!r}, and must be a {'finite' if key in NUMBERS else 'whole'} number "
            f"{'from 0' if least == 0 else least}",
        )
    missing = [key for key in SIZES if key not in data]
    require(not missing, f"the config lacks {', '.join(missing)}")


def _keys_of(kind: str) -> tuple[str, ...]:
    return ATTENTION if kind == "attention" else (*MAMBA, *MAMBA2, "mamba3_enabled", *MAMBA3)


def _kinds(data: dict) -> list[str]:
    """ "attention" or "mamba" for each layer."""
    n = data["num_layers"]
    given = {kind: _layer_list(data, f"{kind}_layers") for kind in ("attention", "mamba") if f"{kind}_layers" in data}
    if not given:
        given_keys = {key for key, value in data.items() if value is not False}
        present = [kind for kind in ("attention", "mamba") if given_keys & set(_keys_of(kind))]
        require(
            len(present) == 1,
            f"which layers are which? the config has keys of {' and '.join(present) or 'neither attention nor mamba'}: "
            f"give attention_layers or mamba_layers",
        )
        return present * n
    if len(given) == 2:
        both = sorted(given["attention"] & given["mamba"])
        require(not both, f"attention_layers and mamba_layers overlap: layers {both} are in both")
        neither = sorted(set(range(n)) - given["attention"] - given["mamba"])
        require(not neither, f"attention_layers and mamba_layers leave a gap: layers {neither} of {n} are in neither")
    (kind, layers), other = next(iter(given.items())), {"attention": "mamba", "mamba": "attention"}
    return [kind if i in layers else other[kind] for i in range(n)]


def _layer_list(data: dict, key: str) -> set[int]:
    n, layers = data["num_layers"], data[key]
    require(
        isinstance(layers, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers),
        f"{key} is {layers!r}, and must be a list of whole numbers",
    )
    outside = [i for i in layers if not 0 <= i < n]
    require(not outside, f"{key} names layers {outside}, but num_layers is {n}: they go from 0 to {n - 1}")
    twice = sorted({i for i in layers if layers.count(i) > 1})
    require(not twice, f"{key} names layers {twice} twice")
    return set(layers)


def _attention(data: dict) -> Spec:
    d, heads = data["hidden_size"], data.get("num_heads")
    require(heads is not None, "num_heads is missing, and there are attention layers")
    require(d % heads == 0, f"hidden_size must be a multiple of num_heads, and {d} is not a multiple of {heads}")
    if "kv_latent_dim" in data:
        _refuse(data, ("kv_heads", "sliding_window"), "attention with kv_latent_dim is MLA, which has none")
        require("d_rope" in data, "kv_latent_dim makes attention MLA, which needs d_rope: the rotary width of a head")
        options = _options(data, {"q_latent_dim": "q_latent_dim", "rope_theta": "rope_theta"})
        latent, d_rope = data["kv_latent_dim"], data["d_rope"]
        return spec(MLA, num_heads=heads, head_dim=d // heads, kv_latent_dim=latent, d_rope=d_rope, **options)
    _refuse(data, ("q_latent_dim", "d_rope"), "only MLA has it, and kv_latent_dim is missing")
    kv_heads = data.get("kv_heads", heads)
    require(
        heads % kv_heads == 0, f"num_heads must be a multiple of kv_heads, and {heads} is not a multiple of {kv_heads}"
    )
    options = _options(data, {"rope_theta": "rope_theta", "sliding_window": "window"})
    return spec(Attention, num_heads=heads, num_kv_heads=kv_heads, **options)


def _mamba(data: dict) -> Spec:
    if data.get("mamba3_enabled"):
        _refuse(
            data, (*MAMBA, *(["mamba2_conv_kernel"] if not data.get("mamba3_use_conv") else [])), "Mamba-3 has none"
        )
        states = data.get("mamba2_state_size", 128)
        require(states % 2 == 0, f"mamba2_state_size is {states}, and Mamba-3 needs it even: its numbers turn in pairs")
        return spec(Mamba3, **_heads(data), **_options(data, MAMBA3))
    _refuse(data, tuple(MAMBA3), "mamba3_enabled is not true")
    if any(key in data for key in MAMBA2):
        _refuse(data, tuple(MAMBA), "the keys that start with mamba2_ make it Mamba-2")
        return spec(Mamba2, **_heads(data))
    d, expand = data["hidden_size"], data.get("mamba_expand", 2)
    require(
        round(d * expand) >= 1 and math.isclose(d * expand, round(d * expand)),
        f"hidden_size · mamba_expand must be whole and at least 1, but {d} · {expand} is not",
    )
    return spec(Mamba, **_options(data, MAMBA))


def _heads(data: dict) -> dict:
    """The options of Mamba-2 and Mamba-3, once their heads fit the width."""
    d, expand, p = data["hidden_size"], data.get("mamba2_expand", 2), data.get("mamba2_head_dim", 64)
    heads = data.get("mamba2_num_heads", max(1, round(d * expand) // p))
    require(
        math.isclose(d * expand, heads * p),
        f"hidden_size · mamba2_expand must equal mamba2_num_heads · mamba2_head_dim, "
        f"but {d} · {expand} = {d * expand:g} and {heads} · {p} = {heads * p}",
    )
    groups = data.get("mamba2_n_groups", 1)
    require(
        heads % groups == 0,
        f"mamba2_num_heads must be a multiple of mamba2_n_groups, and {heads} is not a multiple of {groups}",
    )
    return _options(data, MAMBA2)


def _ffn(data: dict) -> Callable | None:
    if "intermediate_size" not in data:
        _refuse(data, EXPERTS, "experts need intermediate_size, the width of one")
        return None
    expert = spec(SwiGLU, d_ff=data["intermediate_size"])
    if "num_experts" not in data:
        _refuse(data, EXPERTS, "num_experts is missing")
        return expert
    require("experts_per_tok" in data, "num_experts is given, so experts_per_tok must be: how many a token takes")
    experts, taken = data["num_experts"], data["experts_per_tok"]
    require(taken <= experts, f"experts_per_tok can't be above num_experts, and {taken} is above {experts}")
    shared = {"num_shared_experts": 1} if data.get("shared_expert_enabled") else {}
    alpha = _options(data, {"load_balance_alpha": "load_balance_alpha"})
    return spec(MoE, num_experts=experts, top_k=taken, expert=expert, **shared, **alpha)


def _options(data: dict, names: dict[str, str]) -> dict:
    return {option: data[key] for key, option in names.items() if key in data}


def _refuse(data: dict, keys: tuple[str, ...], reason: str) -> None:
    idle = [key for key in keys if data.get(key) not in (None, False)]
    require(not idle, f"{', '.join(idle)} would have no effect: {reason}")
