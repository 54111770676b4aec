"""The layers: equal to transformers', the same in pieces, deaf to padding and to other documents, as published."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib.attention import MLA, Attention
from llmlib.context import Context
from llmlib.errors import ConfigError
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.ssm import S4D, GatedDeltaNet, GatedRMSNorm, LinearAttention, Mamba, Mamba2, Mamba3
from llmlib.train import spared_from_decay

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
    "Mamba2, scaled parts": lambda: Mamba2(
        D_MODEL, head_dim=16, d_state=4, n_groups=2, part_scales=(0.6, 0.5, 0.8, 1.5, 0.7)
    ),
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
def test_a_long_prompt_leaves_nothing_behind(name):
    state = {}
    LAYERS[name]()(torch.randn(1, 300, D_MODEL), state)
    for held in state.values():
        assert held.untyped_storage().nbytes() == held.numel() * held.element_size()


@layers
def test_training_under_autocast(name):
    """Under bfloat16 the recurrences stay float32, so the layer is as close to float32 as its linear maps are."""
    torch.manual_seed(0)
    layer, x, state = LAYERS[name](), torch.randn(2, 70, D_MODEL), {}
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer(x, state)
    y.float().square().sum().backward()
    assert state["ssm"].real.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    expected = layer(x)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()


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
def test_a_batch_of_no_texts(name):
    """An empty share of a batch trains along; the state of none is a state."""
    layer, x, state = LAYERS[name](), torch.ones(0, 5, D_MODEL), {}
    layer(x).sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in layer.parameters())
    assert layer(x, state).shape == x.shape and layer(x[:, :1], state).shape == (0, 1, D_MODEL)


@layers
def test_a_text_of_no_tokens_is_refused(name):
    with pytest.raises(ValueError, match="at least one step of time"):
        LAYERS[name]()(torch.ones(1, 0, D_MODEL))


@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_sums_of_a_long_text_are_beyond_float16(cast):
    """Linear attention divides by z · φ(q), which grows with the text."""
    layer, x = LinearAttention(64, num_heads=1), torch.randn(1, 4096, 64)
    expected = layer(x)
    with torch.autocast("cpu", torch.float16, enabled=cast == "autocast"):
        y = layer.half()(x.half()) if cast == "weights" else layer(x)
    assert y.dtype == torch.float16
    assert (y - expected)[:, -100:].abs().max() < 0.02 * expected[:, -100:].abs().max()


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
    other = state | {"ssm": torch.zeros(2, 9)}
    with pytest.raises(ValueError, match=r"state\['ssm'\] has shape \(2, 9\).*another layer"):
        layer(x, other)


ATTENTION = {
    "Attention": lambda: Attention(D_MODEL, num_heads=2),
    "window": lambda: Attention(D_MODEL, num_heads=2, window=4),
    "int8": lambda: Attention(D_MODEL, num_heads=2, cache="int8"),
    "MLA": lambda: MLA(D_MODEL, num_heads=2, head_dim=8, kv_latent_dim=8, d_rope=4),
}


@pytest.mark.parametrize("mine", [*LAYERS, *ATTENTION])
def test_states_of_other_layers_are_refused(mine):
    every = LAYERS | ATTENTION
    layer, x = every[mine](), torch.randn(2, 6, D_MODEL)
    own = {}
    layer(x, own)
    for other in every:
        state = {}
        every[other]()(x, state)
        like, mine_like = ({n: w.shape for n, w in s.items() if isinstance(w, torch.Tensor)} for s in (state, own))
        if like != mine_like:
            with pytest.raises(ValueError, match="is it the state of another"):
                layer(x[:, :1], state)


@pytest.mark.parametrize("mine", [*LAYERS, *ATTENTION])
@pytest.mark.parametrize("batches", [(1, 2), (2, 1)])
def test_states_of_other_batches_are_refused(mine, batches):
    layer, state = (LAYERS | ATTENTION)[mine](), {}
    layer(torch.randn(batches[0], 3, D_MODEL), state)
    for t in (1, 2):
        with pytest.raises(ValueError, match="is it the state of another layer or another batch"):
            layer(torch.randn(batches[1], t, D_MODEL), dict(state))


@layers
def test_half_a_state_is_refused(name):
    layer, x, state = LAYERS[name](), torch.randn(2, 3, D_MODEL), {}
    layer(x, state)
    for key in state.keys() if len(state) > 1 else ():
        with pytest.raises(ValueError, match="is it the state of another layer"):
            layer(x, {k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="state holds .*'more'"):
        layer(x, state | {"more": x})


def model_of(*mixers, **options):
    layers = tuple(Layer(mixer) for mixer in mixers)
    return CausalLM(ModelConfig(vocab_size=9, d_model=D_MODEL, layers=layers, norm=spec(RMSNorm), **options))


def test_the_state_of_another_model_is_refused():
    one, two = model_of(spec(Mamba)), model_of(spec(Mamba), spec(Mamba))
    with pytest.raises(ValueError, match="state has 2 layers and this model 1"):
        one(torch.zeros(1, 3, dtype=torch.long), two.new_state())


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Mamba(16, d_state=0), "d_state is 0, and must be at least 1"),
        (lambda: Mamba(16, dt_rank=0), "dt_rank is 0, and must be at least 1"),
        (lambda: Mamba(16, expand=0), "expand is 0, and must be above 0 and finite"),
        (lambda: Mamba(16, expand=math.inf), "expand is inf, and must be above 0 and finite"),
        (lambda: Mamba2(16, num_heads=2, expand=math.inf), "expand is inf, and must be above 0 and finite"),
        (lambda: Mamba2(16, head_dim=8, part_scales=(1.0, 2.0)), "part_scales has 2 factors: give 5"),
        (lambda: Mamba(16, dt_range=(0.0, 0.1)), r"dt_range is \(0.0, 0.1\), and must be .* 0 < low ≤ high"),
        (lambda: Mamba2(16, head_dim=0), "head_dim is 0, and must be at least 1"),
        (lambda: Mamba2(16, head_dim=8, d_state=0), "d_state is 0, and must be at least 1"),
        (lambda: Mamba2(16, head_dim=8, n_groups=0), "n_groups is 0, and must be at least 1"),
        (lambda: Mamba2(16, head_dim=8, num_heads=0, expand=None), "num_heads is 0, and must be at least 1"),
        (lambda: Mamba2(16, head_dim=8, expand=0), "expand is 0, and must be above 0 and finite"),
        (lambda: Mamba2(16, head_dim=128), r"16 · 2 = 32 and 1 · 128 = 128"),
        (lambda: Mamba2(16, head_dim=8, dt_limit=(0.5, 0.1)), r"dt_limit is \(0.5, 0.1\), and must be .* low ≤ high"),
        (lambda: Mamba2(16, head_dim=8, A_range=(-1, 16)), r"A_range is \(-1, 16\), and must be"),
        (lambda: Mamba3(16, head_dim=8, d_state=0), "d_state is 0, and must be at least 1"),
        (lambda: Mamba3(16, head_dim=8, d_state=2), "rope_fraction 0.5 of d_state 2 is less than a pair"),
        (lambda: S4D(16, d_state=0), "d_state is 0, and must be at least 1"),
        (lambda: LinearAttention(16, num_heads=0), "num_heads is 0, and must be at least 1"),
        (lambda: LinearAttention(16, num_heads=2, chunk_size=0), "chunk_size is 0, and must be at least 1"),
        (lambda: GatedDeltaNet(16, num_heads=2, head_dim=4, chunk_size=0), "chunk_size is 0, and must be at least 1"),
        (lambda: GatedDeltaNet(16, num_heads=0, head_dim=4), "num_heads is 0, and must be at least 1"),
        (lambda: GatedDeltaNet(16, num_heads=2, head_dim=4, num_v_heads=0), "num_v_heads is 0, and must be"),
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
        (lambda: Mamba(5, expand=1.5), r"must be whole and at least 1, but 5 · 1.5 is not"),
        (lambda: GatedRMSNorm(10, 3), r"a norm over 10 channels can't have 3 groups"),
    ],
)
def test_sizes_that_do_not_fit_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_width_is_whole_but_for_rounding():
    """1.1 · 100 is 110.00000000000001 in floating point."""
    assert len(Mamba(100, expand=1.1).D) == 110
    assert Mamba2(100, head_dim=11, expand=1.1).num_heads == 10
    assert Mamba3(100, num_heads=10, head_dim=11, d_state=4, expand=1.1).num_heads == 10


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
    assert spared_from_decay(Mamba(16)) == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}
    assert spared_from_decay(Mamba2(16, head_dim=8)) == {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight"}
    mamba3 = {"D", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight"}
    assert spared_from_decay(Mamba3(16, head_dim=8, d_state=8, mimo_rank=2)) == mamba3
    assert spared_from_decay(GatedDeltaNet(16, num_heads=2, head_dim=4)) == {"A_log", "dt_bias", "norm.weight"}
    assert spared_from_decay(S4D(16)) == {"log_dt", "log_A_real", "A_imag", "D", "out_proj.bias"}


@pytest.mark.parametrize("how", ["copied", "loaded"])
def test_copies_and_loaded_models_leave_the_same_alone(how):
    """PyTorch makes parameters anew when a module is copied or leaves the meta device, and forgets tags on them."""
    mixers = (
        spec(Mamba, inner_norm=spec(RMSNorm)),
        spec(Mamba3, head_dim=8, d_state=8),
        spec(S4D),
        spec(Attention, num_heads=2, sinks=True, bias=True, qk_norm=spec(RMSNorm)),
    )
    model = model_of(*mixers)
    with torch.device("meta"):
        loaded = model_of(*mixers)
    again = copy.deepcopy(model) if how == "copied" else loaded.to_empty(device="cpu")
    assert spared_from_decay(again) == spared_from_decay(model)
    assert {"layers.0.mixer.A_log", "layers.1.mixer.B_bias", "layers.3.mixer.sinks"} < spared_from_decay(again)


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
    low, high = layer.dt_range
    assert ((layer.log_dt.exp() >= low * 0.999) & (layer.log_dt.exp() <= high * 1.001)).all()


def test_gated_delta_net_starts_as_published():
    torch.manual_seed(0)
    layer = GatedDeltaNet(64, num_heads=32, head_dim=2)
    A = layer.A_log.detach().exp()
    assert 1 <= A.min() < 3 and 14 < A.max() <= 16
    low, high = softplus_range(layer.dt_bias)
    assert 0.00099 < low < 0.003 and 0.03 < high < 0.1001


# the layers as plain loops, from their papers


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mamba3_by_loops(layer, u):
    """arXiv 2603.15569, token by token and head by head, with the state as complex numbers; no convolution."""
    h, p, n, g, r = layer.num_heads, layer.head_dim, layer.d_state, layer.n_groups, layer.rank
    a = layer.widths[-1]
    S, last = (torch.zeros(h, p, n // 2, dtype=torch.complex128) for _ in range(2))
    pairs = lambda w: torch.complex(w[..., 0::2], w[..., 1::2])  # noqa: E731
    ones, outputs = torch.ones(h, r, p, dtype=torch.float64), []
    X, Z, O = (layer.mimo_x, layer.mimo_z, layer.mimo_o) if layer.mimo else (ones, ones, ones)  # noqa: E741
    for token in u:
        take = taker(layer.in_proj.weight @ token)
        z, x = take(h, p), take(h, p)
        B, C = rms(take(r, g, n), layer.B_norm.weight), rms(take(r, g, n), layer.C_norm.weight)
        dt, A, share = F.softplus(take(h) + layer.dt_bias), -F.softplus(take(h)).clamp(min=layer.A_floor), take(h)
        share, omega = torch.sigmoid(share), F.pad(math.pi * torch.tanh(take(a)), (0, n // 2 - a))
        y = torch.zeros(h, r, p, dtype=torch.float64)
        for i in range(h):
            b, c = (pairs(w[:, i * g // h] + bias[i]) for w, bias in ((B, layer.B_bias), (C, layer.C_bias)))
            new = sum((x[i] * X[i, k])[:, None] * b[k] for k in range(r))
            alpha = torch.exp(torch.complex(dt[i] * A[i], -dt[i] * omega))
            S[i] = alpha * (S[i] + (1 - share[i]) * dt[i] * last[i]) + share[i] * dt[i] * new
            last[i] = new
            for k in range(r):
                y[i, k] = (S[i] * c[k].conj()).sum(-1).real + layer.D[i] * x[i] * X[i, k]
        gate = F.silu(z[:, None] * Z)
        if layer.norm is not None:
            y = rms(y, layer.norm.weight.view(h, 1, p))
        outputs.append(layer.out_proj.weight @ (y * gate * O).sum(1).flatten())
    return torch.stack(outputs)


def taker(numbers):
    """A function that hands out the next of the numbers, in the shape asked for."""
    left = iter(numbers)
    return lambda *shape: torch.stack([next(left) for _ in range(math.prod(shape))] or [numbers[:0]]).view(shape)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mimo_rank": 3},
        {"gated_norm": True, "rope_fraction": 1.0},
        {"mimo_rank": 2, "gated_norm": True, "A_floor": 0.7},
        {"complex_rope": False, "A_floor": 0.7},
    ],
    ids=str,
)
def test_mamba3_is_its_paper_by_loops(options):
    torch.manual_seed(0)
    layer = Mamba3(D_MODEL, head_dim=8, d_state=8, n_groups=2, chunk_size=4, **options).double()
    for p in layer.parameters():
        p += 0.3 * torch.randn_like(p)
    u = torch.randn(1, 11, D_MODEL, dtype=torch.float64)
    close(layer(u)[0], mamba3_by_loops(layer, u[0]))


@torch.no_grad()
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_s4d_is_its_paper_by_loops(method):
    """arXiv 2206.11893: each mode stands for a pair of conjugates, so the output is twice the real part."""
    torch.manual_seed(0)
    layer = S4D(D_MODEL, d_state=3, method=method).double()
    u = torch.randn(9, D_MODEL, dtype=torch.float64)
    A, dt = torch.complex(-layer.log_A_real.exp(), layer.A_imag), layer.log_dt.exp()[:, None]
    half = dt * A / 2
    A_bar, B_bar = ((dt * A).exp(), ((dt * A).exp() - 1) / A) if method == "zoh" else (
        (1 + half) / (1 - half), dt / (1 - half)
    )  # fmt: skip
    C, S, ys = torch.complex(layer.C[..., 0], layer.C[..., 1]), 0, []
    for x in u:
        S = A_bar * S + B_bar * x[:, None]
        y = (C * S + (C * S).conj()).sum(-1).real + layer.D * x
        y = y * torch.distributions.Normal(0, 1).cdf(y)  # GELU
        value, gate = (layer.out_proj.weight @ y + layer.out_proj.bias).chunk(2)
        ys.append(value * torch.sigmoid(gate))
    close(layer(u[None])[0], torch.stack(ys))


@torch.no_grad()
@pytest.mark.parametrize("decay", [False, True])
def test_linear_attention_is_its_paper_by_loops(decay):
    """arXiv 2006.16236 with φ(x) = elu(x) + 1, and the decays of arXiv 2307.08621: 31/32, 63/64 …"""
    torch.manual_seed(0)
    layer = LinearAttention(D_MODEL, num_heads=2, decay=decay, chunk_size=4).double().requires_grad_(False)
    layer.log_decay = LinearAttention(D_MODEL, num_heads=2, decay=decay).log_decay.double()
    for p in layer.parameters():
        p += 0.3 * torch.randn_like(p)
    u = torch.randn(9, D_MODEL, dtype=torch.float64)
    phi = lambda w: torch.where(w > 0, w + 1, w.exp())  # noqa: E731
    q, k, v = ((u @ f.weight.T).view(9, 2, 8) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    y = torch.zeros(9, 2, 8, dtype=torch.float64)
    for i in range(2):
        gamma = (31 / 32, 63 / 64)[i] if decay else 1
        for t in range(9):
            scores = torch.stack([gamma ** (t - s) * (phi(q[t, i]) @ phi(k[s, i])) for s in range(t + 1)])
            y[t, i] = scores @ v[: t + 1, i] / scores.sum()
    close(layer(u[None])[0], y.flatten(1) @ layer.o_proj.weight.T, 1e-7)


@torch.no_grad()
def test_a_negative_delta_net_doubles_beta():
    torch.manual_seed(0)
    plain = GatedDeltaNet(D_MODEL, num_heads=2, head_dim=8).double()
    negative = GatedDeltaNet(D_MODEL, num_heads=2, head_dim=8, negative=True).double()
    negative.load_state_dict(plain.state_dict())
    rows = slice(-4, -2)  # of the two betas: 2 sigmoid(0) = sigmoid(40) but for e⁻⁴⁰
    for layer, token in ((plain, 40.0), (negative, 0.0)):
        layer.in_proj.weight[rows] = 0
        layer.in_proj.weight[rows, 0] = token
    x = torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    x[..., 0] = 1
    close(negative(x), plain(x))


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
    for size in (1, 1e-2):  # small inputs have small keys, where the ε under the root decides
        x = size * torch.randn(2, 19, 32)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5 * size)


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
