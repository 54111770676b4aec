"""Positions: against their formulas, transformers' code, published values, and what they are made to keep."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib.context import Context, positions_in_text
from llmlib.errors import ConfigError
from llmlib.position import (
    SCALINGS,
    ALiBi,
    LearnedPosition,
    RoPE,
    SinusoidalPosition,
    T5Bias,
    alibi_slopes,
    half_from_interleaved,
    interleaved_from_half,
    rope,
    rope_frequencies,
)

torch.set_num_threads(1)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [1 + 0.9 * i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 32.0,
}
OPTIONS = {"linear": {"factor": 2.0}, "ntk": {"factor": 2.0}, "dynamic": YARN, "yarn": YARN, "longrope": LONG}
OPTIONS |= {"llama3": LLAMA3}


def turned(x, positions, interleaved=False, **options):
    """x (t d) rotated, in float64."""
    angles = RoPE(options.pop("dim", x.shape[-1]), **options).angles(torch.as_tensor(positions), torch.float64)
    return rope(x[None, None], *angles, interleaved=interleaved)[0, 0]


def test_rope_is_multiplication_by_a_complex_number_of_modulus_one():
    x, positions = torch.randn(5, 12, dtype=torch.float64), torch.tensor([0, 1, 7, 1000, 100_000])
    y = turned(x, positions, interleaved=True, theta=500.0)
    for p, row, got in zip(positions.tolist(), x.tolist(), y.tolist(), strict=True):
        for i in range(6):
            z = complex(row[2 * i], row[2 * i + 1]) * complex(math.cos(a := p * 500.0 ** (-2 * i / 12)), math.sin(a))
            assert abs(complex(got[2 * i], got[2 * i + 1]) - z) < 1e-9


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.booleans(), st.sampled_from(["", *SCALINGS])
)
def test_rope_keeps_norms_and_scores_depend_on_the_distance_only(i, j, shift, interleaved, kind):
    torch.manual_seed(i)
    unscaled = {"attention_factor": 1.0} if kind in ("yarn", "longrope") else {}
    options = {"scaling": {"type": kind, **OPTIONS[kind], **unscaled}} if kind else {}
    q, k = torch.randn(2, 16, dtype=torch.float64)
    rows = turned(torch.stack([q, q, k, k]), [i, i + shift, j, j + shift], interleaved, **options)
    assert torch.allclose(rows.norm(dim=-1), torch.stack([q, q, k, k]).norm(dim=-1))
    assert torch.allclose(rows[0] @ rows[2], rows[1] @ rows[3], atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "cohere", "deepseek_v3"])
def test_rope_equals_transformers(kind):
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as deepseek
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    q, k = torch.randn(2, 2, 3, 20, 16)
    r = 4 if kind == "gpt_neox" else 16
    angles = torch.arange(20)[:, None] * 10000.0 ** (-torch.arange(0, r, 2) / r)
    interleaved = kind in ("cohere", "deepseek_v3")
    doubled = angles.repeat_interleave(2, -1) if kind == "cohere" else torch.cat([angles, angles], -1)
    theirs = {"cohere": cohere, "deepseek_v3": deepseek}.get(kind, llama)
    want = theirs(q[..., :r], k[..., :r], doubled.cos()[None], doubled.sin()[None])
    if kind == "deepseek_v3":  # it returns the pairs in the split-half layout
        want = [x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for x in want]
    cos, sin = RoPE(r).angles(torch.arange(20), torch.float32)
    for x, y in zip((q, k), want, strict=True):
        got = rope(x, cos, sin, interleaved=interleaved)
        assert torch.allclose(got, torch.cat([y, x[..., r:]], -1), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "length"),
    [
        ("linear", {"factor": 4.0}, None),
        ("dynamic", {"factor": 4.0, "original_max_position_embeddings": 64}, 50),
        ("dynamic", {"factor": 4.0, "original_max_position_embeddings": 64}, 200),
        ("yarn", YARN, None),
        ("yarn", YARN | {"truncate": False}, None),
        ("yarn", YARN | {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16.0}, None),
        ("yarn", YARN | {"attention_factor": 1.3}, None),
        # slow pairs beyond the last: the ramp's end, pair 16 by its formula, is held at 15
        ("yarn", YARN | {"theta": 20.0, "original_max_position_embeddings": 2000}, None),
        ("longrope", LONG, 64),
        ("longrope", LONG, 65),
        ("llama3", LLAMA3, None),
    ],
)
def test_scalings_equal_transformers(kind, options, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = options.get("theta", 5000.0)
    options = {name: value for name, value in options.items() if name != "theta"}
    parameters = {"rope_type": kind, "rope_theta": theta, **options}
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_parameters=parameters)
    want, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    got, scale = RoPE(16, theta, {"type": kind, **options}).frequencies(length or 1)
    assert torch.allclose(got.float(), want, rtol=1e-5)
    assert scale == pytest.approx(factor)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_leaves_the_fastest():
    plain, slowed = RoPE(16).frequencies()[0], RoPE(16, scaling={"type": "ntk", "factor": 8.0}).frequencies()[0]
    assert slowed[0] == plain[0]
    assert slowed[-1] == pytest.approx(plain[-1].item() / 8)


def test_frequencies_that_depend_on_the_length_are_those_of_each_text():
    grown = RoPE(16, scaling={"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64})
    both = grown.frequencies(torch.tensor([50, 200]))[0]
    for row, length in zip(both, (50, 200), strict=True):
        assert torch.equal(row, grown.frequencies(length)[0])
    assert torch.equal(both[0], rope_frequencies(16))


def test_wavelengths_and_the_table():
    r = RoPE(8, 10000.0)
    assert torch.allclose(r.wavelengths(), 2 * math.pi * torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64))
    x = torch.zeros(1, 1, 3, 8)
    cos, sin = r(100_000, x, Context())
    exact = [math.cos((100_000 + i) * 0.1) for i in range(3)]
    assert torch.allclose(cos[:, 1], torch.tensor(exact), atol=1e-6)
    given_positions = r(0, x, Context(positions=torch.arange(100_000, 100_003)))
    assert torch.equal(given_positions[0], cos)
    assert torch.equal(given_positions[1], sin)


def test_a_table_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        RoPE(6, 77.0)(0, torch.zeros(1, 1, 4, 6), Context())
    x = torch.randn(1, 1, 4, 6, requires_grad=True)
    rope(x, *RoPE(6, 77.0)(0, x * 1, Context())).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("rope_dim", [None, 4])
def test_the_layouts_differ_by_a_permutation(rope_dim):
    weight, x = torch.randn(3 * 8, 10, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)

    def scores(w, interleaved):
        heads = (x @ w.T).unflatten(-1, (3, 8)).transpose(0, 1)[None]
        cos, sin = RoPE(rope_dim or 8).angles(torch.arange(7), torch.float64)
        y = rope(heads, cos, sin, interleaved=interleaved)
        return y @ y.mT

    half = half_from_interleaved(weight, 3, rope_dim)
    assert torch.allclose(scores(half, False), scores(weight, True), atol=1e-12)
    assert not torch.allclose(scores(weight, False), scores(weight, True), atol=1e-2)
    assert torch.equal(interleaved_from_half(half, 3, rope_dim), weight)
    if rope_dim is None:  # how Llama's own weights were turned into Hugging Face's
        assert torch.equal(half, weight.view(3, 4, 2, 10).transpose(1, 2).reshape(24, 10))
    assert half_from_interleaved(weight[:, 0], 3, rope_dim).shape == (24,)


def test_alibi_slopes_as_published():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16).tolist() == pytest.approx([2.0 ** (-i / 2) for i in range(1, 17)])
    assert alibi_slopes(12)[8:].tolist() == pytest.approx([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5])


@pytest.mark.parametrize("num_heads", [1, 2, 6, 8, 12, 71])
def test_alibi_equals_transformers(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt

    at, ones = torch.arange(30), torch.ones(1, 30, dtype=torch.long)
    bias = ALiBi(num_heads)(at, at)
    relative = bias[:, -1]  # the last query's row, to which all of them are shifted
    assert torch.allclose(relative - relative[:, :1], bloom(ones, num_heads, torch.float32)[:, 0], atol=1e-5)
    assert torch.allclose(relative, mpt(num_heads, 30)[:, 0], atol=1e-5)
    assert torch.allclose(ALiBi(num_heads, max_bias=4.0)(at, at)[:, -1], mpt(num_heads, 30, 4)[:, 0], atol=1e-5)
    rounded = ALiBi(num_heads, bfloat16=True, scale=0.5)(at, at)
    assert torch.equal(rounded[:, 0], falcon(ones, num_heads, torch.float32)[:, 0] * 0.5)


def test_falcons_rounded_alibi_behind_padding_equals_transformers():
    """slope · j in bfloat16 isn't the same up to a constant from another start, so the place behind padding counts."""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    valid = torch.arange(400) >= torch.tensor([[0], [57], [399]])
    at = positions_in_text(valid, None)
    want = build_alibi_tensor(valid.long(), 6, torch.float32).view(3, 6, 1, 400)
    assert torch.equal(ALiBi(6, bfloat16=True)(at, at), want)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets_equal_transformers(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(-500, 500)
    for count, far in ((32, 128), (8, 20)):
        want = T5Attention._relative_position_bucket(offset, not causal, count, far)
        assert torch.equal(T5Bias(4, num_buckets=count, max_distance=far, causal=causal).buckets(offset), want)


def test_t5_bias_looks_its_buckets_up():
    bias = T5Bias(4)
    y = bias(torch.tensor([5, 9]), torch.arange(10))
    assert y.shape == (4, 2, 10)
    assert y[2, 1, 6] == bias.weight[3, 2]
    assert y[1, 0, 9] == bias.weight[0, 1]


def test_sinusoids_are_the_formula_and_a_shift_is_a_rotation():
    table = SinusoidalPosition(16)(torch.zeros(1, 40, 16, dtype=torch.float64), torch.arange(40))[0]
    for i, j in ((0, 0), (3, 2), (39, 7)):
        angle = i / 10000 ** (2 * j / 16)
        assert table[i, 2 * j].item() == pytest.approx(math.sin(angle))
        assert table[i, 2 * j + 1].item() == pytest.approx(math.cos(angle))
    # (cos, sin) as the pair (x₁, x₂), so that adding an angle turns it
    pairs = table.unflatten(-1, (8, 2)).flip(-1).flatten(-2)
    assert torch.allclose(turned(pairs[:30], [5] * 30, interleaved=True), pairs[5:35], atol=1e-12)
    halves = SinusoidalPosition(16, interleaved=False)(torch.zeros(1, 40, 16, dtype=torch.float64), torch.arange(40))[0]
    assert torch.equal(halves, torch.cat([table[:, 0::2], table[:, 1::2]], -1))


def test_learned_positions_add_their_row():
    table = LearnedPosition(6, max_positions=5, offset=2)
    x = torch.randn(2, 3, 6)
    assert table.weight.shape == (7, 6)
    assert torch.equal(table(x, torch.tensor([[0, 1, 2], [2, 3, 4]]))[1, 0], x[1, 0] + table.weight[4])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rope_frequencies(7), "even"),
        (lambda: RoPE(0), "even"),
        (lambda: RoPE(8, -1.0), "rope_theta is -1"),
        (lambda: RoPE(8, math.inf), "rope_theta is inf, and must be above 0 and finite"),
        (lambda: RoPE(8, 1e4, {"type": "linear", "factor": math.inf}), "factor is inf, and must be at least 1 and fin"),
        (lambda: RoPE(8, 1e4, {"type": "yarn", **YARN, "attention_factor": 0.0}), "attention_factor is 0.0"),
        (lambda: RoPE(8, 1e4, {"type": "yarn", **YARN, "beta_fast": 0.5}), "beta_fast = 0.5 must be at least"),
        (lambda: RoPE(8, 1e4, {"type": "llama3", "factor": 4.0, "low_freq_factor": -1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 16}), "low_freq_factor is -1.0, and must be above"),
        (lambda: alibi_slopes(4, -8.0), "max_bias is -8.0, and must be above 0"),
        (lambda: RoPE(8, scaling={"type": "magic"}), "'magic'; choose one of linear, ntk"),
        (lambda: RoPE(8, scaling={"type": "linear", "factr": 2.0}), "'factr'; it has factor"),
        (lambda: RoPE(8, scaling={"type": "linear"}), "factor"),
        *[
            (lambda kind=kind, o=o: RoPE(16, scaling={"type": kind, **o, "factor": 0.5}), "0.5, and must be at least 1")
            for kind, o in OPTIONS.items()
        ],
        (lambda: RoPE(2, scaling={"type": "ntk", "factor": 2.0}), "width of 2 is one pair"),
        (lambda: RoPE(2, scaling={"type": "dynamic", **YARN}), "width of 2 is one pair"),
        (lambda: RoPE(8, 1.0, {"type": "yarn", **YARN}), "rope_theta is 1.0"),
        (lambda: RoPE(8, scaling={"type": "yarn", **YARN, "beta_slow": 0.0}), "beta_slow is 0.0"),
        *[
            (lambda kind=kind, at=at: RoPE(16, scaling={
                "type": kind, **OPTIONS[kind], "original_max_position_embeddings": at}),
             f"original_max_position_embeddings is {at}, and must be above")
            for kind, at in [("dynamic", 0), ("yarn", 0), ("llama3", 0), ("longrope", 0), ("longrope", 1)]
        ],
        (lambda: RoPE(16, scaling={"type": "longrope", **LONG, "long_factor": [1.0] * 7 + [0.0]}), "has 0.0 in it"),
        (lambda: RoPE(16, scaling={"type": "longrope", **LONG, "short_factor": [-2.0] + [1.0] * 7}), "has -2.0 in it"),
        (lambda: RoPE(8, scaling={"type": "longrope", **LONG}), "short_factor has 8 numbers, and 4 pairs"),
        (lambda: RoPE(8, scaling={"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}), "high_freq_factor"),
        (lambda: RoPE(8)(0, torch.zeros(1, 1, 2, 8), Context(positions=torch.tensor([-1, 0]))), "a position is -1"),
        (lambda: LearnedPosition(4, max_positions=5)(torch.zeros(1, 1, 4), torch.tensor([5])), "position 5 is beyond"),
        (lambda: LearnedPosition(4, max_positions=5)(torch.zeros(1, 1, 4), torch.tensor([-2])), "a position is -2"),
        (lambda: SinusoidalPosition(4)(torch.zeros(1, 1, 4), torch.tensor([-2])), "a position is -2"),
        (lambda: SinusoidalPosition(5), "even"),
        (lambda: alibi_slopes(0), "num_heads is 0"),
        (lambda: T5Bias(2, num_buckets=30), "multiple of 4"),
        (lambda: T5Bias(2, num_buckets=0), "num_buckets is 0"),
        (lambda: T5Bias(0), "num_heads is 0"),
        (lambda: LearnedPosition(4, max_positions=0), "max_positions is 0"),
        (lambda: LearnedPosition(4, max_positions=4, offset=-1), "offset is -1"),
        (lambda: T5Bias(2, max_distance=16), "max_distance = 16"),
        (lambda: half_from_interleaved(torch.zeros(10, 2), 3), "10 rows don't divide into 3 heads"),
        (lambda: half_from_interleaved(torch.zeros(12, 2), 3, rope_dim=3), "rope_dim = 3"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
