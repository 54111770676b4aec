"""The layers: equal to transformers', the same in pieces, deaf to padding and to other documents, as published."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib.context import Context
from llmlib.errors import ConfigError
from llmlib.norm import RMSNorm
from llmlib.ssm import S4D, GatedDeltaNet, GatedRMSNorm, LinearAttention, Mamba, Mamba2, Mamba3

torch.set_num_threads(1)
D_MODEL = 16
LAYERS = {
    "Mamba": lambda: Mamba(D_MODEL, d_state=4),
    "Mamba, norms and biases": lambda: Mamba(
        D_MODEL, d_state=3, dt_rank=5, d_conv=3, expand=1.5, inner_norm=RMSNorm, bias=True, conv_bias=False
    ),
    "Mamba2": lambda: Mamba2(D_MODEL, num_heads=4, head_dim=8, d_state=8, n_groups=2, chunk_size=4),
    "Mamba2, norm before gate": lambda: Mamba2(
        D_MODEL, num_heads=3, head_dim=8, expand=None, d_state=5, norm_before_gate=True, bias=True, dt_limit=(0.01, 0.5)
    ),
    "Mamba2, no norm": lambda: Mamba2(D_MODEL, head_dim=16, d_state=8, gated_norm=False, d_conv=1, conv_bias=False),
    "Mamba3": lambda: Mamba3(D_MODEL, head_dim=8, d_state=8, n_groups=2, chunk_size=4),
    "Mamba3, MIMO": lambda: Mamba3(D_MODEL, head_dim=8, d_state=6, mimo_rank=2, rope_fraction=1.0, gated_norm=True),
    "Mamba3, real, convolution": lambda: Mamba3(D_MODEL, head_dim=16, d_state=4, complex_rope=False, use_conv=True),
    "S4D": lambda: S4D(D_MODEL, d_state=3),
    "S4D, bilinear": lambda: S4D(D_MODEL, d_state=3, method="bilinear", initial="inv"),
    "LinearAttention": lambda: LinearAttention(D_MODEL, num_heads=2, chunk_size=4),
    "RetNet": lambda: LinearAttention(D_MODEL, num_heads=4, decay=True),
    "GatedDeltaNet": lambda: GatedDeltaNet(D_MODEL, num_heads=2, head_dim=4, num_v_heads=4, v_head_dim=6, chunk_size=4),
    "GatedDeltaNet, negative": lambda: GatedDeltaNet(D_MODEL, num_heads=2, head_dim=8, negative=True),
}
layers = pytest.mark.parametrize("name", LAYERS)


def build(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    for parameter in layer.parameters():  # biases away from zero, so that what they do to padding shows
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@layers
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_pieces_of_any_length_give_what_one_call_gives(name, data):
    layer, x = build(name), torch.randn(2, 13, D_MODEL, dtype=torch.float64)
    cuts = sorted(data.draw(st.sets(st.integers(1, 12), max_size=5)))
    state, whole = {}, {}
    y = torch.cat([layer(piece, state) for piece in x.tensor_split(cuts, 1)], 1)
    close(y, layer(x))
    close(layer(x, whole), y)
    for key, held in whole.items():
        close(state[key], held)


@layers
def test_token_by_token_with_a_state_of_constant_size(name):
    layer, x = build(name), torch.randn(1, 40, D_MODEL, dtype=torch.float64)
    state, sizes, ys = {}, set(), []
    for token in x.split(1, 1):
        ys.append(layer(token, state))
        sizes.add(tuple((key, held.shape, held.untyped_storage().nbytes()) for key, held in sorted(state.items())))
    close(torch.cat(ys, 1), layer(x))
    assert len(sizes) == 1


@layers
def test_left_padding_changes_nothing(name):
    layer, x = build(name), torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    padded = torch.cat([torch.full((2, 4, D_MODEL), torch.nan, dtype=torch.float64), x], 1)
    padded[1, :4] = torch.randn(4, D_MODEL)
    valid = torch.arange(13) >= torch.tensor([[4], [2]])
    expected = torch.stack([F.pad(layer(x[:1]), (0, 0, 2, 0))[0], layer(padded[1:, 2:])[0]])
    close(layer(padded, None, Context(valid=valid))[:, 4:], expected[:, 2:])
    state, ys = {}, []
    for start, end in [(0, 3), (3, 5), (5, 6), (6, 13)]:
        ys.append(layer(padded[:, start:end], state, Context(valid=valid[:, :end])))
    close(torch.cat(ys, 1)[:, 4:], expected[:, 2:])


@layers
def test_nothing_crosses_a_document_boundary(name):
    layer, x = build(name), torch.randn(2, 12, D_MODEL, dtype=torch.float64)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 3 + [2] * 7])
    expected = torch.cat(
        [
            torch.cat([layer(x[:1, :5]), layer(x[:1, 5:])], 1),
            torch.cat([layer(x[1:, :2]), layer(x[1:, 2:5]), layer(x[1:, 5:])], 1),
        ]
    )
    close(layer(x, None, Context(documents=documents)), expected)
    state = {}
    y = [layer(x[:, s:e], state, Context(documents=documents[:, :e])) for s, e in [(0, 2), (2, 5), (5, 6), (6, 12)]]
    close(torch.cat(y, 1), expected)


@layers
def test_gradients_reach_every_parameter(name):
    layer = build(name)
    layer(torch.randn(2, 5, D_MODEL, dtype=torch.float64)).square().sum().backward()
    assert not [n for n, p in layer.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]


@layers
def test_half_precision_keeps_states_in_float32(name):
    layer, x = build(name).to(torch.bfloat16), torch.randn(1, 7, D_MODEL, dtype=torch.bfloat16)
    state = {}
    y = torch.cat([layer(x[:, :6], state), layer(x[:, 6:], state)], 1)
    assert y.dtype == torch.bfloat16 and state["ssm"].real.dtype == torch.float32
    torch.testing.assert_close(y.double(), build(name)(x.double()), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba3, real, convolution", "GatedDeltaNet"])
def test_a_state_of_another_layer_or_batch_is_refused(name):
    layer, x = LAYERS[name](), torch.randn(2, 3, D_MODEL)
    state = {}
    layer(x, state)
    with pytest.raises(ValueError, match=r"state\['conv'\] has shape \(2, 3, \d+\).*another batch"):
        layer(x[:1], state)
    other = {"conv": state["conv"], "ssm": torch.zeros(2, 9)}
    with pytest.raises(ValueError, match=r"state\['ssm'\] has shape \(2, 9\).*another layer"):
        layer(x, other)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Mamba2(16, num_heads=3, head_dim=8), r"16 · 2 = 32 and 3 · 8 = 24"),
        (lambda: Mamba2(16, head_dim=24), r"16 · 2 = 32 and 1 · 24 = 24"),
        (lambda: Mamba2(16, head_dim=8, n_groups=3), r"num_heads must be a multiple of n_groups, and 4 is not"),
        (lambda: Mamba2(16, head_dim=8, chunk_size=0), r"chunk_size is 0, and must be at least 1"),
        (lambda: Mamba2(16, head_dim=8, expand=None), r"num_heads and expand are both None"),
        (lambda: Mamba2(16, head_dim=8, d_conv=0), r"d_conv is 0"),
        (lambda: Mamba3(16, num_heads=3, head_dim=8), r"16 · 2 = 32 and 3 · 8 = 24"),
        (lambda: Mamba3(16, head_dim=8, d_state=7), r"d_state is 7, and must be even"),
        (lambda: Mamba3(16, head_dim=8, mimo_rank=-1), r"mimo_rank is -1"),
        (lambda: Mamba3(16, head_dim=8, rope_fraction=0), r"rope_fraction is 0"),
        (lambda: S4D(16, method="euler"), r"method is 'euler'; choose one of zoh, bilinear"),
        (lambda: S4D(16, initial="random"), r"initial is 'random'; choose one of lin, inv, real"),
        (lambda: LinearAttention(16, num_heads=3), r"d_model must be a multiple of num_heads, and 16 is not"),
        (lambda: GatedDeltaNet(16, num_heads=2, head_dim=4, num_v_heads=3), r"num_v_heads must be a multiple"),
        (lambda: Mamba(5, expand=1.5), r"must be whole, but 5 · 1.5 is not"),
        (lambda: GatedRMSNorm(10, 3), r"a norm over 10 channels can't have 3 groups"),
    ],
)
def test_sizes_that_do_not_fit_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def softplus_range(bias):
    dt = F.softplus(bias.detach())
    return dt.min().item(), dt.max().item()


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    mamba, mamba2 = Mamba(64), Mamba2(512, head_dim=8)
    assert torch.equal(mamba.A_log.exp().round(), torch.arange(1.0, 17).expand(128, 16))
    assert (mamba.D == 1).all() and (mamba2.D == 1).all()
    assert mamba.dt_rank == 4 and mamba.dt_proj.weight.abs().max() <= 4**-0.5
    A = mamba2.A_log.exp()
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16
    for bias in (mamba.dt_proj.bias, mamba2.dt_bias):
        low, high = softplus_range(bias)
        assert 0.00099 < low < 0.003 and 0.03 < high < 0.1001
    logs = F.softplus(mamba2.dt_bias.detach()).log()
    assert abs(logs.mean() - math.log(0.01)) < 0.4  # log-uniform between 0.001 and 0.1
    assert abs(mamba.in_proj.weight.std() - 0.02) < 0.001
    mamba.reset_parameters(std=0.1)
    assert abs(mamba.in_proj.weight.std() - 0.1) < 0.005


def test_what_weight_decay_must_leave_alone():
    undecayed = lambda m: {n for n, p in m.named_parameters() if getattr(p, "no_weight_decay", False)}  # noqa: E731
    assert undecayed(Mamba(16)) == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}
    assert undecayed(Mamba2(16, head_dim=8)) == {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight"}


def test_parameters_add_up():
    d, n, w, r = 64, 16, 128, 4
    mamba = 2 * d * w + (4 + 1) * w + w * (r + 2 * n) + (r + 1) * w + w * n + w + w * d
    assert sum(p.numel() for p in Mamba(d).parameters()) == mamba
    h, p, n, g = 8, 16, 32, 2
    wide = w + 2 * g * n
    mamba2 = d * (w + wide + h) + 5 * wide + 3 * h + w + w * d
    layer = Mamba2(d, num_heads=h, head_dim=p, d_state=n, n_groups=g)
    assert sum(p.numel() for p in layer.parameters()) == mamba2


def test_mamba3_starts_as_published():
    torch.manual_seed(0)
    layer = Mamba3(64, head_dim=16, d_state=32, mimo_rank=4)
    assert (layer.B_bias == 1).all() and (layer.C_bias == 1).all() and (layer.D == 1).all()
    assert (layer.mimo_x == 0.25).all() and (layer.mimo_o == 0.25).all() and (layer.mimo_z == 1).all()
    low, high = softplus_range(layer.dt_bias)
    assert low > 0.00099 and high < 0.1001
    assert layer.in_proj.out_features == 2 * 128 + 2 * 32 * 4 + 3 * 8 + 8  # z x B C dt A λ angles


def test_s4d_starts_as_published():
    layer = S4D(8, d_state=4)
    A_bar, _, _ = layer.discrete()
    A = torch.log(A_bar) / torch.exp(layer.log_dt)[:, None]
    torch.testing.assert_close(A.real, torch.full((8, 4), -0.5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(A.imag, math.pi * torch.arange(4.0).expand(8, 4), rtol=1e-3, atol=1e-3)
    assert all(getattr(p, "no_weight_decay", False) for p in (layer.log_dt, layer.log_A_real, layer.A_imag))


# transformers' own layers


def test_mamba_is_transformers_mamba():
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(hidden_size=32, state_size=8, time_step_rank=3, expand=2, use_bias=True)
    assert_like_theirs(module.MambaMixer(config, 0), Mamba(32, d_state=8, dt_rank=3, bias=True), 32)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_transformers_mamba2(groups):
    module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = module.Mamba2Config(
        hidden_size=32, state_size=8, num_heads=4, head_dim=16, n_groups=groups, chunk_size=8, use_bias=True,
        time_step_limit=(0.005, 0.05),
    )  # fmt: skip
    ours = Mamba2(32, num_heads=4, head_dim=16, d_state=8, n_groups=groups, bias=True, dt_limit=(0.005, 0.05))
    assert_like_theirs(module.Mamba2Mixer(config, 0), ours, 32)


def test_mamba_is_jambas():
    module = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    config = module.JambaConfig(
        hidden_size=32, mamba_d_state=8, mamba_dt_rank=3, num_attention_heads=4, num_key_value_heads=2
    )
    theirs = module.JambaMambaMixer(config, 0)
    ours = Mamba(32, d_state=8, dt_rank=3, inner_norm=lambda size: RMSNorm(size, eps=config.rms_norm_eps))
    names = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}
    assert_like_theirs(theirs, ours, 32, names)


def test_mamba_is_falcon_mambas():
    module = pytest.importorskip("transformers.models.falcon_mamba.modeling_falcon_mamba")
    config = module.FalconMambaConfig(hidden_size=32, state_size=8, time_step_rank=3)
    ours = Mamba(32, d_state=8, dt_rank=3, inner_norm=lambda size: RMSNorm(size, eps=1e-6, weight=False))
    theirs = module.FalconMambaMixer(config, 0, initialize_mixer_weights=False)
    theirs.init_falcon_mamba_weights()
    assert_like_theirs(theirs, ours, 32)


def test_gated_delta_net_is_qwen3_nexts():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = module.Qwen3NextConfig(
        hidden_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=6, layer_types=["linear_attention"], num_hidden_layers=1,
    )  # fmt: skip
    theirs = module.Qwen3NextGatedDeltaNet(config, 0)
    ours = GatedDeltaNet(32, num_heads=2, head_dim=8, num_v_heads=4, v_head_dim=6)
    order = torch.arange(theirs.in_proj_qkvz.out_features).view(2, -1).split([8, 8, 12, 12], 1)
    gates = torch.arange(8).view(2, 4).split(2, 1)
    weights = dict(theirs.state_dict())
    qkvz, ba = weights.pop("in_proj_qkvz.weight"), weights.pop("in_proj_ba.weight")
    weights["in_proj.weight"] = torch.cat(
        [qkvz[torch.cat([part.flatten() for part in order])], ba[torch.cat([part.flatten() for part in gates])]]
    )
    ours.load_state_dict(weights)
    x = torch.randn(2, 19, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bamba", "granitemoehybrid", "nemotron_h", "zamba2"])
def test_mamba2_is_the_hybrids(family):
    """The mixers of Bamba, Granite 4, Nemotron-H and Zamba2, each with its own names for the same options."""
    transformers = pytest.importorskip("transformers")
    build = {
        "bamba": lambda: transformers.models.bamba.modeling_bamba.BambaMixer(
            transformers.BambaConfig(
                hidden_size=32, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2,
                num_attention_heads=4, num_key_value_heads=2,
            ), 0,
        ),
        "granitemoehybrid": lambda: transformers.models.granitemoehybrid.modeling_granitemoehybrid
        .GraniteMoeHybridMambaLayer(
            transformers.GraniteMoeHybridConfig(
                hidden_size=32, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2,
                num_attention_heads=4, num_key_value_heads=2,
            ), 0,
        ),
        "nemotron_h": lambda: transformers.models.nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer(
            transformers.NemotronHConfig(
                hidden_size=32, mamba_num_heads=4, mamba_head_dim=12, ssm_state_size=8, n_groups=2
            ), 0,
        ),
        "zamba2": lambda: transformers.models.zamba2.modeling_zamba2.Zamba2MambaMixer(
            transformers.Zamba2Config(
                hidden_size=32, n_mamba_heads=4, mamba_headdim=16, mamba_d_state=8, mamba_ngroups=2,
                num_attention_heads=4,
            ), 0,
        ),
    }  # fmt: skip
    theirs = build[family]()
    ours = Mamba2(
        32, num_heads=4, head_dim=theirs.head_dim, expand=None, d_state=8, n_groups=2,
        bias=theirs.in_proj.bias is not None, conv_bias=theirs.conv1d.bias is not None,
        dt_limit=tuple(theirs.time_step_limit), norm_eps=theirs.norm.variance_epsilon,
    )  # fmt: skip
    assert_like_theirs(theirs, ours, 32)


def assert_like_theirs(theirs, ours, d_model, names=None):
    """The same weights give the same outputs and gradients of the input, in float32."""
    torch.manual_seed(0)
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    weights = theirs.state_dict()
    for old, new in (names or {}).items():
        weights = {k.replace(old, new): v for k, v in weights.items()}
    ours.load_state_dict(weights)
    x = torch.randn(2, 19, d_model, requires_grad=True)
    y, expected = ours(x), theirs.eval()(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(v.square().sum(), x)[0] for v in (y, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
