"""Feed-forward: against formulas, transformers' modules, and published widths."""

import math

import pytest
import torch
import torch.nn.functional as F

from llmlib.errors import ConfigError
from llmlib.ffn import (
    ACTIVATIONS,
    GLU,
    MLP,
    ClampedSwiGLU,
    GeGLU,
    ReGLU,
    ScaledSwiGLU,
    SwiGLU,
    clamped_swiglu,
    glu,
    glu_width,
)
from llmlib.ops import kernels
from llmlib.train import spared_from_decay

torch.set_num_threads(1)
FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name):
    x = torch.linspace(-6, 6, 49, dtype=torch.float64)
    want = torch.tensor([FORMULAS[name](v) for v in x.tolist()], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](x), want, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "relu2", "gelu_tanh", "quick_gelu"])
def test_activations_equal_transformers(name):
    from transformers.activations import ACT2FN

    theirs = {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
    x = torch.randn(100)
    assert torch.allclose(ACTIVATIONS[name](x), ACT2FN[theirs](x), atol=1e-6)


def test_layers_equal_transformers():
    from transformers import GPTNeoXConfig, LlamaConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    x, sizes = torch.randn(2, 3, 16), {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2}
    for activation, ours in (
        ("silu", SwiGLU), ("gelu", GeGLU), ("relu", ReGLU), ("sigmoid", GLU),
        ("gelu_pytorch_tanh", lambda d, **k: GeGLU(d, tanh=True, **k)),
    ):  # fmt: skip
        theirs = LlamaMLP(LlamaConfig(**sizes, hidden_act=activation, mlp_bias=True))
        layer = ours(16, d_ff=40, bias=True)
        layer.load_state_dict(theirs.state_dict())
        assert torch.allclose(layer(x), theirs(x), atol=1e-6)
    theirs, layer = GPTNeoXMLP(GPTNeoXConfig(**sizes, hidden_act="gelu")), MLP(16, d_ff=40)
    names = {"dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj"}
    layer.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()})
    assert torch.allclose(layer(x), theirs(x), atol=1e-6)


def test_the_factors_of_a_scaled_glu():
    layer, x = ScaledSwiGLU(8, d_ff=24, gate_scale=0.3, output_scale=1.7), torch.randn(3, 8)
    gate = 0.3 * (x @ layer.gate_proj.weight.T)
    hidden = gate / (1 + (-gate).exp()) * (x @ layer.up_proj.weight.T)
    torch.testing.assert_close(layer(x), 1.7 * (hidden @ layer.down_proj.weight.T))


def test_clamped_swiglu_equals_gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=24, num_local_experts=2))
    gate_up = 8 * torch.randn(5, 48)
    want = experts._apply_gate(gate_up)
    assert torch.allclose(clamped_swiglu(gate_up[:, ::2], gate_up[:, 1::2]), want, atol=1e-5)
    layer, x = ClampedSwiGLU(8, d_ff=24, alpha=1.3, limit=0.01), torch.randn(3, 8)
    assert torch.equal(layer(x), layer.down_proj(clamped_swiglu(layer.gate_proj(x), layer.up_proj(x), 1.3, 0.01)))
    huge = clamped_swiglu(torch.full((1,), 6e4).half(), torch.full((1,), 6e4).half())
    assert huge.item() == pytest.approx(56, rel=1e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_a_backward_the_product_overwrites_what_nobody_needs(activation):
    gate, up = torch.randn(2, 3, 8).unbind(0)
    kept = gate.clone(), up.clone()
    assert glu.explain(gate, up, activation).kernel == "in-place"
    assert torch.equal(glu(gate, up, activation), glu.reference(*kept, activation))
    assert torch.equal(gate, kept[0]) and torch.equal(up, kept[1])
    up.requires_grad_()
    assert glu.explain(gate, up, activation).refused[0] == ("in-place", "the backward needs what it would overwrite")
    with torch.no_grad():
        assert glu.explain(gate, up, activation).kernel == "in-place"


def test_the_recomputing_swiglu_keeps_two_tensors():
    gate, up = torch.randn(2, 3, 50, requires_grad=True)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda _: None):
            glu(gate, up)
        return sum(sizes)

    with kernels("recompute"):
        assert kept() == 2 * gate.numel()
        assert torch.autograd.gradcheck(
            glu, (gate.detach().double().requires_grad_(), up.detach().double().requires_grad_())
        )
    assert kept() == 3 * gate.numel()


@pytest.mark.parametrize(
    ("d_model", "options", "width"),
    [
        (4096, {}, 11008),  # Llama 7B
        (5120, {}, 13824),  # Llama 13B
        (8192, {"multiplier": 1.3, "multiple_of": 4096}, 28672),  # Llama-2 70B
        (4096, {"multiplier": 1.3, "multiple_of": 1024}, 14336),  # Llama-3 8B
    ],
)
def test_published_widths_follow_from_the_rule(d_model, options, width):
    assert glu_width(d_model, **options) == width


def test_two_thirds_of_the_width_is_as_many_parameters():
    plain, gated = MLP(768, d_ff=4 * 768, bias=False), SwiGLU(768, d_ff=glu_width(768, multiple_of=1))
    assert sum(p.numel() for p in gated.parameters()) == sum(p.numel() for p in plain.parameters())


def test_initial_weights_and_their_decay():
    layer = SwiGLU(256, d_ff=512, bias=True)
    assert layer.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    layer.reset_parameters(std=0.1)
    assert layer.down_proj.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not layer.gate_proj.bias.any()
    assert spared_from_decay(layer) == {f"{name}_proj.bias" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(4, d_ff=8, activation="gelo"), "'gelo'; choose one of relu"),
        (lambda: GLU(4, d_ff=8, activation="gelo"), "'gelo'; choose one of relu"),
        (lambda: MLP(4, d_ff=0), "d_ff is 0"),
        (lambda: MLP(4, d_ff=2.5), "d_ff is 2.5, and must be a whole number"),
        (lambda: glu_width(64, multiplier=0.0), "multiplier is 0.0, and must be above 0"),
        (lambda: ClampedSwiGLU(4, d_ff=8, limit=float("nan")), "limit is nan, and must be above 0"),
        (lambda: glu_width(64, multiple_of=0), "multiple_of is 0"),
        (lambda: glu_width(64, multiple_of=-8), "multiple_of is -8"),
        (lambda: SwiGLU(4, d_ff=0), "d_ff is 0"),
        (lambda: ClampedSwiGLU(4, d_ff=8, limit=0.0), "limit is 0"),
    ],
)
def test_errors_name_what_is_wrong(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_ten_line_formula():
    layer, x = SwiGLU(6, d_ff=10), torch.randn(2, 6)
    g, u = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    assert torch.allclose(layer(x), (g * F.sigmoid(g) * u) @ layer.down_proj.weight.T, atol=1e-7)
