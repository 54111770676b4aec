"""Norms: against their formulas in float64, transformers' modules, and what they are made to ignore."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmlib.errors import ConfigError
from llmlib.norm import (
    ClosedFormRMSNorm,
    DyT,
    LayerNorm,
    RMSNorm,
    deepnorm,
    deepnorm_encoder,
    fold_gain_,
    layer_norm,
    rms_norm,
)
from llmlib.ops import kernels
from llmlib.train import parameter_groups

torch.set_num_threads(1)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_norms_are_their_formulas(mode):
    x, w, b = np.random.default_rng(0).normal(2, 3, (3, 5, 16)), *np.random.default_rng(1).normal(size=(2, 16))
    rms = w * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
    layer = w * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) + b
    x, w, b = map(torch.from_numpy, (x, w, b))
    with kernels(mode):
        assert torch.allclose(rms_norm(x, w, eps=1e-3), torch.from_numpy(rms), rtol=1e-12)
        assert torch.allclose(layer_norm(x, w, b, eps=1e-3), torch.from_numpy(layer), rtol=1e-12)


def test_norms_equal_transformers():
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

    pairs = [
        (RMSNorm(24, eps=1e-5), LlamaRMSNorm(24, eps=1e-5)),
        (RMSNorm(24, unit_offset=True), Gemma2RMSNorm(24, eps=1e-6)),
        (LayerNorm(24), nn.LayerNorm(24)),
        (LayerNorm(24, bias=False), CohereLayerNorm(24, eps=1e-5)),
        (LayerNorm(24, weight=False, bias=False), OlmoLayerNorm(24)),
        (LayerNorm(24, num_heads=3, bias=False), CohereLayerNorm((3, 24), eps=1e-5)),
    ]
    x = 3 * torch.randn(2, 5, 3, 24) + 1
    for ours, theirs in pairs:
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        theirs.load_state_dict(ours.state_dict())
        assert torch.allclose(ours(x), theirs(x), atol=2e-6), (ours, theirs)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(2, 40))
def test_what_norms_ignore(scale, shift, width):
    torch.manual_seed(width)
    x = torch.randn(3, width, dtype=torch.float64)
    assert torch.allclose(rms_norm(scale * x, eps=0.0), rms_norm(x, eps=0.0))
    assert torch.allclose(layer_norm(scale * x + shift, eps=0.0), layer_norm(x, eps=0.0), atol=1e-6)
    assert torch.allclose(rms_norm(x, eps=0.0).square().mean(-1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(layer_norm(x, eps=0.0).mean(-1), torch.zeros(3, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_half_types_are_summed_in_float32(mode):
    """300² is beyond float16's 65504, and bfloat16 can't add 1 to 256."""
    with kernels(mode):
        y = RMSNorm(64).half()(torch.full((1, 64), 300.0, dtype=torch.float16))
        assert torch.allclose(y, torch.ones_like(y), atol=2e-3)
        x = torch.cat([torch.full((1, 2048), 1.0), torch.full((1, 2048), 3.0)], -1).bfloat16()
        assert layer_norm(x, eps=0.0).unique().tolist() == [-1, 1]


def test_the_unit_offset_survives_bfloat16():
    """1 + 2⁻⁹ is 1 in bfloat16, so a gain formed there would be lost."""
    norm, x = RMSNorm(512, unit_offset=True).bfloat16(), torch.randn(20, 512).bfloat16()
    assert not norm.weight.any()
    nn.init.constant_(norm.weight, 2.0**-9)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt() * (1 + 2.0**-9)
    assert norm(x).dtype is torch.bfloat16
    assert (norm(x) == exact.bfloat16()).double().mean() > 0.99


def test_the_closed_form_has_derivatives_of_any_order():
    x, w = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    inputs = (x, w.requires_grad_(), 1e-3)
    assert torch.autograd.gradcheck(ClosedFormRMSNorm.apply, inputs)
    assert torch.autograd.gradgradcheck(ClosedFormRMSNorm.apply, inputs)
    jacobian = torch.func.jacrev(lambda x: ClosedFormRMSNorm.apply(x, w, 1e-3))(x)
    assert torch.allclose(jacobian, torch.func.jacrev(lambda x: rms_norm.reference(x, w, eps=1e-3))(x))


def test_the_closed_form_on_one_long_vector():
    """No axes before the last one: the gain's gradient is a sum over a single row."""
    x, w = (torch.randn(2**15, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with kernels("closed-form"):
        got = torch.autograd.grad(rms_norm(x, w).square().sum(), (x, w))
    want = torch.autograd.grad(rms_norm.reference(x, w).square().sum(), (x, w))
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


def test_dyt_is_its_formula_and_starts_at_tanh():
    norm, x = DyT(8, alpha=0.7), torch.randn(3, 8)
    assert torch.allclose(norm(x), torch.tanh(0.7 * x))
    for p in norm.parameters():
        nn.init.normal_(p)
    assert torch.allclose(norm(x), norm.weight * torch.tanh(norm.alpha * x) + norm.bias)


@pytest.mark.parametrize(
    "norm",
    [RMSNorm(12), RMSNorm(12, unit_offset=True), LayerNorm(12), RMSNorm(12, weight=False), LayerNorm(12, weight=False)],
)
def test_a_folded_gain_changes_nothing(norm):
    x, linears = torch.randn(4, 12), [nn.Linear(12, 5), nn.Linear(12, 7, bias=True)]
    for p in norm.parameters():
        nn.init.normal_(p)
    before = [linear(norm(x)) for linear in linears]
    fold_gain_(norm, linears)
    for linear, y in zip(linears, before, strict=True):
        assert torch.allclose(linear(norm(x)), y, atol=1e-5)
    assert torch.allclose(norm(x), type(norm)(12)(x), atol=1e-6)


def test_folding_a_bias_needs_somewhere_to_put_it():
    norm = LayerNorm(4)
    nn.init.ones_(norm.bias)
    nn.init.constant_(norm.weight, 3.0)
    roomy, bare = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    before = [p.clone() for p in (*norm.parameters(), *roomy.parameters(), *bare.parameters())]
    with pytest.raises(ConfigError, match="has none"):
        fold_gain_(norm, [roomy, bare])
    for p, old in zip((*norm.parameters(), *roomy.parameters(), *bare.parameters()), before, strict=True):
        assert torch.equal(p, old)  # nothing is half folded
    with pytest.raises(ConfigError, match="weight=False leaves it out"):
        RMSNorm(4, weight=False, unit_offset=True)
    with pytest.raises(ConfigError, match="num_layers is 0"):
        deepnorm(0)
    with pytest.raises(ConfigError, match="decoder_layers is 0"):
        deepnorm_encoder(4, 0)


def test_deepnorm_constants():
    """Table 2 of the paper, and its figures for 100 layers."""
    assert deepnorm(8) == (2.0, pytest.approx(0.35355339))
    assert deepnorm(100) == (pytest.approx(3.7606, abs=1e-4), pytest.approx(0.18803, abs=1e-5))
    assert deepnorm(27, encoder_layers=9) == (3.0, pytest.approx(324**-0.25))
    assert deepnorm_encoder(1, 1) == (0.81, 0.87)
    assert deepnorm_encoder(16, 16) == (pytest.approx(0.81 * 2**1.25), pytest.approx(0.87 / 2**1.25))
    # N⁴M: the encoder's own N = 16 layers weigh four times as much as the decoder's M = 1
    assert deepnorm_encoder(16, 1) == (pytest.approx(0.81 * 2), pytest.approx(0.87 / 2))
    assert deepnorm_encoder(1, 2**16) == (pytest.approx(0.81 * 2), pytest.approx(0.87 / 2))


def test_gains_are_free_of_weight_decay():
    for norm in (RMSNorm(4), RMSNorm(4, num_heads=2), LayerNorm(4), LayerNorm(4, num_heads=2), DyT(4)):
        assert parameter_groups(norm, 0.1)[0]["params"] == []
