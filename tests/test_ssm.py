"""The recurrences: three forms of each are one function; causality, linearity, carried states; extremes; errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmlib import ssm
from llmlib.ops import OPS, kernels

torch.set_num_threads(1)
CHUNKED = next(t.run for t in ssm.selective_scan.twins if t.name == "chunked")


def in_small_pieces(*args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmlib.ssm.scan._PIECE", 40)
        return CHUNKED(*args, **options)


def by_pieces(scan):
    """`scan` with the recurrence over chunks in pieces of a few chunks, however short the text is."""

    def run(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmlib.ssm.duality._SHORT", 0)
            patch.setattr("llmlib.ssm.duality._PIECE", 300)
            return scan(*args, **options)

    return run


SELECTIVE = {
    "reference": ssm.selective_scan.reference,
    "chunked": CHUNKED,
    "in small pieces": in_small_pieces,
    "parallel": ssm.selective_scan_parallel,
    "matrix": ssm.selective_scan_matrix,
}
SSD = {
    "recurrent": ssm.ssd_recurrent,
    "quadratic": ssm.ssd_quadratic,
    "chunk 1": lambda *a: ssm.ssd(*a, chunk_size=1),
    "chunk 5": lambda *a: ssm.ssd(*a, chunk_size=5),
    "chunk 64": lambda *a: ssm.ssd(*a, chunk_size=64),
    "chunk 3, in pieces": by_pieces(lambda *a: ssm.ssd(*a, chunk_size=3)),
}


def selective_inputs(b=2, t=7, d=3, n=4, with_D=True, seed=0, dtype=torch.float64):
    r = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(*s, generator=r, dtype=dtype) for s in [(b, t, d), (b, t, n), (b, t, n)])
    dt = torch.rand(b, t, d, generator=r, dtype=dtype) + 0.01
    A, D = -torch.rand(d, n, generator=r, dtype=dtype) * 3, torch.randn(d, generator=r, dtype=dtype)
    return [v.requires_grad_() for v in (x, dt, A, B, C, D)][: 6 if with_D else 5]


def ssd_inputs(b=2, t=7, h=4, p=3, g=2, n=5, with_D=True, seed=0, dtype=torch.float64):
    r = torch.Generator().manual_seed(seed)
    x, B, C = (torch.randn(*s, generator=r, dtype=dtype) for s in [(b, t, h, p), (b, t, g, n), (b, t, g, n)])
    dt = torch.rand(b, t, h, generator=r, dtype=dtype) + 0.01
    A, D = -torch.rand(h, generator=r, dtype=dtype) * 3, torch.randn(h, generator=r, dtype=dtype)
    return [v.requires_grad_() for v in (x, dt, A, B, C, D)][: 6 if with_D else 5]


def with_gradients(function, args):
    y = function(*args)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), args, materialize_grads=True)


def assert_forms_agree(forms, args, tolerance=1e-10):
    (first, expected), *rest = [(name, with_gradients(f, args)) for name, f in forms.items()]
    for name, found in rest:
        for what, a, b in zip(("y", "x", "dt", "A", "B", "C", "D"), found, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name} differs in {what}")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_selective_scan_has_three_equal_forms(b, t, d, n, with_D):
    assert_forms_agree(SELECTIVE, selective_inputs(b, t, d, n, with_D))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5),
    st.booleans(),
)  # fmt: skip
def test_ssd_has_three_equal_forms(b, t, g, heads_per_group, p, n, with_D):
    assert_forms_agree(SSD, ssd_inputs(b, t, g * heads_per_group, p, g, n, with_D))


def test_both_scans_are_one_recurrence():
    """With one A for all states of a channel, Mamba-1 is Mamba-2 with heads of width 1."""
    x, dt, A, B, C, D = selective_inputs(t=9, d=4, n=3)
    A = A[:, :1].expand(-1, 3)
    y = ssm.ssd(x.unsqueeze(-1), dt, A[:, 0], B.unsqueeze(2), C.unsqueeze(2), D, chunk_size=4)
    torch.testing.assert_close(y.squeeze(-1), ssm.selective_scan(x, dt, A, B, C, D), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_gradients_are_those_of_the_definition(kernel):
    with kernels(kernel):
        h = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
        scan = lambda *a: ssm.selective_scan(*a[:-1], initial_state=a[-1], return_state=True)  # noqa: E731
        assert torch.autograd.gradcheck(scan, (*selective_inputs(1, 5, 2, 3), h))
        h = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
        scan = lambda *a: ssm.ssd(*a[:-1], chunk_size=2, initial_state=a[-1], return_state=True)  # noqa: E731
        assert torch.autograd.gradcheck(scan, (*ssd_inputs(1, 5, 2, 2, 1, 2), h))
        assert torch.autograd.gradcheck(by_pieces(scan), (*ssd_inputs(1, 5, 2, 2, 1, 2), h))


@pytest.mark.parametrize("wanted", [slice(None), slice(1)], ids=["all inputs", "x alone"])
def test_twins_can_be_differentiated_twice(wanted):
    """Also where autograd is asked for some inputs only, and so might leave out an error raised on the way."""
    scans = (
        (ssm.selective_scan, selective_inputs(1, 3, 2, 2)),
        (by_pieces(lambda *a: ssm.ssd(*a, chunk_size=2)), ssd_inputs(1, 3, 2, 2, 1, 2)),
    )
    for scan, args in scans:
        rest = [w.detach() for w in args[len(args[wanted]) :]]
        assert torch.autograd.gradgradcheck(lambda *a: scan(*a, *rest).square(), args[wanted])  # noqa: B023

        def second(function, args=args):
            x, dt = args[:2]
            first = torch.autograd.grad(function(*args).square().sum(), dt, create_graph=True)[0]
            return torch.autograd.grad(first.square().sum(), (x, args[2]))

        with kernels("reference"):
            expected = second(scan)
        torch.testing.assert_close(second(scan), expected, rtol=1e-9, atol=1e-9)


def mamba3_inputs(b=2, t=7, h=4, r=2, p=3, g=2, n=6, a=2, with_D=True, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    shapes = (b, t, h, r, p), (b, t, h), (b, t, g, r, n), (b, t, g, r, n), (h, r, n), (h, r, n), (b, t, a), (h,)
    x, trap, B, C, B_bias, C_bias, angles, D = (torch.randn(*s, generator=random, dtype=dtype) for s in shapes)
    dt, A = (torch.rand(b, t, h, generator=random, dtype=dtype) + 0.01 for _ in range(2))
    args = (x, dt, -A, trap, B, C, B_bias, C_bias, angles, D)
    return [v.requires_grad_() for v in args][: 10 if with_D else 9]


MAMBA3 = {
    "recurrent": ssm.mamba3_recurrent,
    "quadratic": ssm.mamba3_quadratic,
    "chunk 1": lambda *a: ssm.mamba3_scan(*a, chunk_size=1),
    "chunk 5": lambda *a: ssm.mamba3_scan(*a, chunk_size=5),
    "chunk 64": lambda *a: ssm.mamba3_scan(*a, chunk_size=64),
    "chunk 3, in pieces": by_pieces(lambda *a: ssm.mamba3_scan(*a, chunk_size=3)),
}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 17), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3),
    st.integers(1, 3), st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_mamba3_has_three_equal_forms(b, t, g, heads_per_group, r, p, pairs, turning, with_D):
    args = mamba3_inputs(b, t, g * heads_per_group, r, p, g, 2 * pairs, min(turning, pairs), with_D)
    assert_forms_agree(MAMBA3, args)


def test_mamba3_without_its_three_ideas_is_ssd():
    """Euler's rule (λ = 1), no angle, one input: Mamba-2's recurrence, with a decay that the token chooses."""
    x, dt, A, trap, B, C, B_bias, C_bias, angles, D = mamba3_inputs(r=1)
    A = A[:1, :1].expand_as(dt)
    y = ssm.mamba3_scan(x, dt, A, torch.full_like(trap, 50.0), B, C, 0 * B_bias, 0 * C_bias, angles[..., :0], D)
    expected = ssm.ssd(x.squeeze(3), dt, A[0, 0], B.squeeze(3), C.squeeze(3), D)
    torch.testing.assert_close(y.squeeze(3), expected, rtol=1e-10, atol=1e-10)


def test_the_trapezoid_converges_faster_than_euler():
    """A ramp over one unit of time, its exact state known: halving dt quarters the error rather than halving it."""

    def error(steps, trap):
        ones = torch.ones(1, steps, 1, 1, 1, dtype=torch.float64)
        dt, A = torch.full((1, steps, 1), 1 / steps, dtype=torch.float64), -torch.ones(1, steps, 1, dtype=torch.float64)
        x = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:].view(1, steps, 1, 1, 1)
        BC = torch.cat([ones, 0 * ones], -1)
        no = torch.zeros(1, 1, 2, dtype=torch.float64)
        y = ssm.mamba3_scan(x, dt, A, torch.full_like(dt, trap), BC, BC, no, no, x.new_zeros(1, steps, 0))
        return abs(y[0, -1].item() - math.exp(-1))  # h' = −h + t from 0 is t − 1 + exp(−t)

    assert 3.9 < error(64, 0.0) / error(128, 0.0) < 4.1
    assert 1.9 < error(64, 50.0) / error(128, 50.0) < 2.1


def delta_inputs(b=2, t=7, h=3, d=4, e=5, seed=0, dtype=torch.float64):
    r = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, t, h, n, generator=r, dtype=dtype) for n in (d, d, e))
    beta, log_decay = (torch.rand(b, t, h, generator=r, dtype=dtype) for _ in range(2))
    args = (q, torch.nn.functional.normalize(k, dim=-1), v, 2 * beta, -log_decay)
    return [w.requires_grad_() for w in args]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_the_delta_rule_in_chunks_is_the_delta_rule(b, t, h, d, e):
    forms = {"recurrent": ssm.gated_delta_recurrent}
    forms |= {str(c): lambda *a, c=c: ssm.gated_delta_rule(*a, chunk_size=c) for c in (1, 4, 64)}
    assert_forms_agree(forms, delta_inputs(b, t, h, d, e))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.booleans())
def test_linear_attention_has_three_equal_forms(t, with_decay):
    q, k, v, _, log_decay = delta_inputs(t=t)
    args = [q, k, v, log_decay][: 4 if with_decay else 3]
    decay = lambda log=None: None if log is None else log.exp().unsqueeze(-1)  # noqa: E731
    forms = {
        "recurrent": lambda q, k, v, *log: ssm.matrix_recurrence(q, k, v, decay(*log)),
        "quadratic": ssm.linear_attention_quadratic,
        "chunk 3": lambda *a: ssm.linear_attention(*a, chunk_size=3),
        "chunk 64": ssm.linear_attention,
    }
    assert_forms_agree(forms, args)


# S is (e d), g the gate as it multiplies S, kk = k kᵀ, vk = v kᵀ, I the identity
UPDATES = {
    "linear attention": lambda S, g, beta, kk, vk, I: S + vk,
    "RetNet": lambda S, g, beta, kk, vk, I: g * S + vk,
    "Mamba-2": lambda S, g, beta, kk, vk, I: g * S + beta * vk,
    "GLA": lambda S, g, beta, kk, vk, I: S * g + vk,
    "DeltaNet": lambda S, g, beta, kk, vk, I: S @ (I - beta * kk) + beta * vk,
    "Gated DeltaNet": lambda S, g, beta, kk, vk, I: g * S @ (I - beta * kk) + beta * vk,
    "KDA": lambda S, g, beta, kk, vk, I: S * g @ (I - beta * kk) + beta * vk,
    "RWKV-7": lambda S, g, beta, kk, vk, I: S @ (g * I - beta * kk) + vk,
}


@pytest.mark.parametrize("member", ssm.FAMILY, ids=lambda m: m.name)
def test_each_member_is_the_update_its_paper_states(member):
    q, k, v, beta, _ = (w.detach() for w in delta_inputs(t=6))
    gate = torch.rand(2, 6, 3, 4 if member.decay == "per channel" else 1, dtype=torch.float64)
    kk, vk = torch.einsum("bthi,bthj->bthij", k, k), torch.einsum("bthi,bthj->bthij", v, k)
    S, ys = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(6):
        now = gate[:, t].unsqueeze(-2), beta[:, t, :, None, None], kk[:, t], vk[:, t]
        S = UPDATES[member.name](S, *now, torch.eye(4, dtype=torch.float64))
        ys.append(torch.einsum("bhed,bhd->bhe", S, q[:, t]))
    terms = member.terms(k, v, gate if member.decay == "per channel" else gate[..., 0], beta)
    torch.testing.assert_close(ssm.matrix_recurrence(q, **terms), torch.stack(ys, 1), rtol=1e-10, atol=1e-10)


def test_the_delta_rule_is_transformers():
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, log_decay = (w.detach().float() for w in delta_inputs(t=70, d=16, e=8))
    expected, state = module.torch_recurrent_gated_delta_rule(q, k, v, log_decay, beta, output_final_state=True)
    y, S = ssm.gated_delta_rule(q * 16**-0.5, k, v, beta, log_decay, return_state=True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(S.mT, state, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.sampled_from(["zoh", "bilinear"]), st.sampled_from(["lin", "inv", "real"]))
def test_s4d_is_a_recurrence_and_a_convolution(t, method, initial):
    modes = {"lin": ssm.s4d_lin, "inv": ssm.s4d_inv, "real": ssm.s4d_real}[initial](4).to(torch.complex128)
    dt, x = torch.rand(3, dtype=torch.float64) * 0.5 + 0.01, torch.randn(2, t, 3, dtype=torch.float64)
    C = torch.randn(3, 4, dtype=torch.complex128)
    A_bar, B_bar = ssm.discretise(modes.expand(3, 4), torch.ones(3, 4, dtype=torch.complex128), dt, method)
    assert (A_bar.abs() < 1).all()
    y, _ = ssm.s4d_recurrent(x, A_bar, B_bar, C)
    torch.testing.assert_close(ssm.s4d_convolve(x, ssm.s4d_kernel(A_bar, B_bar, C, t)), y, rtol=1e-10, atol=1e-10)
    states = ssm.associative_scan(A_bar.expand(2, t, 3, 4), B_bar * x.unsqueeze(-1))
    torch.testing.assert_close(torch.einsum("btdn,dn->btd", states, C).real, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method, dt, A", [("bilinear", 0.5, -4.0), ("zoh", 100.0, -1e4)])
def test_s4d_forgets_at_once_where_a_step_keeps_nothing(method, dt, A):
    """Ā = 0: the kernel is C B̄ and then 0, with finite gradients."""
    A = torch.full((1, 2), A, dtype=torch.complex64, requires_grad=True)
    A_bar, B_bar = ssm.discretise(A, torch.ones_like(A), torch.tensor([dt]), method)
    assert (A_bar == 0).all()
    kernel = ssm.s4d_kernel(A_bar, B_bar, torch.ones_like(A), 4)
    torch.testing.assert_close(kernel[0], torch.stack([B_bar.real.sum(), *torch.zeros(3)]))
    assert torch.autograd.grad(kernel.sum(), A)[0].isfinite().all()


def test_forms_stay_on_the_device_of_their_inputs():
    with torch.device("meta"):
        layer, x = ssm.S4D(8, d_state=4), torch.randn(1, 1, 8)
    assert layer(x, {}).device.type == "meta"
    args = [w.detach().to("meta") for w in mamba3_inputs()]
    assert ssm.mamba3_quadratic(*args).device.type == "meta"


def test_discretisations_are_scipys():
    signal = pytest.importorskip("scipy.signal")
    A, B, dt = torch.tensor([[-0.7, -2.0]]).double(), torch.tensor([[1.5, -0.3]]).double(), torch.tensor([0.3]).double()
    for method in ("zoh", "bilinear"):
        system = torch.diag(A[0]).numpy(), B.T.numpy(), torch.zeros(1, 2).numpy(), torch.zeros(1, 1).numpy()
        A_bar, B_bar = ssm.discretise(A, B, dt, method)
        expected = signal.cont2discrete(system, 0.3, method=method)
        torch.testing.assert_close(torch.diag(A_bar[0]), torch.tensor(expected[0]))
        torch.testing.assert_close(B_bar.T, torch.tensor(expected[1]))


def test_s4d_modes_come_from_hippo():
    """LegS plus a matrix of rank one is normal; its eigenvalues have real part −½, and S4D-Inv is close to them."""
    A, B = ssm.hippo_legs(64)
    modes = torch.linalg.eigvals(A + torch.outer(B, B) / 2)
    torch.testing.assert_close(modes.real, torch.full((64,), -0.5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    largest, guess = modes.imag.max().item(), ssm.s4d_inv(32).imag.max().item()
    assert abs(largest / guess - 1) < 0.05


SCANS = {
    "mamba3_scan": (ssm.mamba3_scan, mamba3_inputs, {"chunk_size": 4}),
    "gated_delta_rule": (
        lambda v, q, k, *a, **o: ssm.gated_delta_rule(q, k, v, *a, **o),
        lambda **s: [delta_inputs(**s)[i] for i in (2, 0, 1, 3, 4)],
        {"chunk_size": 4},
    ),
    "selective_scan": (ssm.selective_scan, selective_inputs, {}),
    "ssd": (ssm.ssd, ssd_inputs, {"chunk_size": 4}),
    "ssd in pieces": (by_pieces(ssm.ssd), ssd_inputs, {"chunk_size": 2}),
}
scans = pytest.mark.parametrize("name", SCANS)


@scans
@settings(max_examples=10, deadline=None)
@given(t=st.integers(2, 14), data=st.data())
def test_a_scan_is_causal(name, t, data):
    scan, inputs, options = SCANS[name]
    args = inputs(t=t, b=5)
    at = data.draw(st.integers(0, t - 1))
    timed = [w for w in args if len(w) == 5]
    for gradient in torch.autograd.grad(scan(*args, **options)[:, at].sum(), timed):
        assert (gradient[:, at + 1 :] == 0).all()


@scans
@settings(max_examples=10, deadline=None)
@given(t=st.integers(1, 14), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_a_scan_is_linear_in_x(name, t, a, b):
    scan, inputs, options = SCANS[name]
    x1, *rest = inputs(t=t)
    x2 = inputs(t=t, seed=1)[0]
    both = a * scan(x1, *rest, **options) + b * scan(x2, *rest, **options)
    torch.testing.assert_close(scan(a * x1 + b * x2, *rest, **options), both, rtol=1e-9, atol=1e-9)


@scans
@settings(max_examples=10, deadline=None)
@given(t=st.integers(2, 14), data=st.data())
def test_a_text_can_be_split_anywhere(name, t, data):
    scan, inputs, options = SCANS[name]
    args = inputs(t=t, b=5)
    cut = data.draw(st.integers(1, t - 1))
    whole, last = scan(*args, return_state=True, **options)
    first, rest = ([w[:, part] if len(w) == 5 else w for w in args] for part in (slice(cut), slice(cut, None)))
    y1, state = scan(*first, return_state=True, **options)
    y2, state = scan(*rest, initial_state=state, return_state=True, **options)
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dt, A", [(1e-6, -1e-4), (1e-6, -1e4), (0.1, -1.0), (100.0, -1e4), (100.0, -1e-4)])
@pytest.mark.parametrize("name", ["selective_scan", "ssd", "ssd in pieces"])
def test_extremes_stay_finite(name, dt, A, dtype):
    scan, inputs, _ = SCANS[name]
    sizes = {"t": 8192, "d": 2, "n": 2} if name == "selective_scan" else {"t": 8192, "h": 2, "p": 2, "g": 1, "n": 2}
    x, steps, decays, B, C, D = (v.detach() for v in inputs(b=1, **sizes, dtype=torch.float32))
    args = [x.to(dtype), torch.full_like(steps, dt), torch.full_like(decays, A), B.to(dtype), C.to(dtype), D]
    args = [v.requires_grad_() for v in args]
    y, state = scan(*args, return_state=True)
    assert y.dtype == dtype and state.dtype == torch.float32
    for value in (y, state, *torch.autograd.grad(y.float().square().mean() + state.mean(), args)):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dt, A", [(1e-6, -1e-4), (0.1, -1.0), (100.0, -1e4), (100.0, -1e-4)])
def test_extremes_of_mamba3_and_the_delta_rule_stay_finite(dt, A, dtype):
    args = [w.detach().float() for w in mamba3_inputs(b=1, t=8192, h=1, r=1, p=2, g=1, n=2, a=1)]
    args[1], args[2] = torch.full_like(args[1], dt), torch.full_like(args[2], A)
    half = {0, 3, 4, 5, 8}
    delta = [w.detach().float() for w in delta_inputs(b=1, t=8192, h=1, d=2, e=2)]
    delta[4] = torch.full_like(delta[4], dt * A)
    for scan, inputs in (
        (ssm.mamba3_scan, [w.to(dtype) if i in half else w for i, w in enumerate(args)]),
        (ssm.gated_delta_rule, [w.to(dtype) if i < 3 else w for i, w in enumerate(delta)]),
    ):
        inputs = [w.requires_grad_() for w in inputs]
        y = scan(*inputs)
        assert y.dtype == dtype and y.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.float().square().mean(), inputs))


def test_long_sums_do_not_drift():
    """8192 float32 steps against float64: cumulative sums start anew in every chunk."""
    args = [v.detach() for v in ssd_inputs(b=1, t=8192, h=2, p=4, g=1, n=4)]
    for scan in (ssm.ssd, by_pieces(ssm.ssd)):
        y = scan(*(v.float() for v in args))
        torch.testing.assert_close(y.double(), ssm.ssd_recurrent(*args), rtol=1e-4, atol=1e-4)


def relative_error(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


NARROW = {  # the inputs that a model computes in its own type
    "selective_scan": (0, 3, 4), "ssd": (0, 3, 4), "ssd in pieces": (0, 3, 4), "mamba3_scan": (0, 3, 4, 5, 8),
    "gated_delta_rule": (0, 1, 2, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_sums_stay_float32_where_inputs_are_bfloat16(name):
    """The last state, which is float32, is as exact as one of float32 inputs that have been rounded to 8 bits."""
    scan, inputs, options = SCANS[name]
    sizes = {"d": 2} if name == "selective_scan" else {}
    args = [w.detach().float() for w in inputs(b=1, t=2048, **sizes)]
    args = [w.bfloat16() if i in NARROW[name] else w for i, w in enumerate(args)]
    with kernels("reference"):
        expected = scan(*(w.double() for w in args), return_state=True, **options)
    y, state = scan(*args, return_state=True, **options)
    assert y.dtype == torch.bfloat16 and relative_error(y, expected[0]) < 4e-3
    pairs = [(state, expected[1])] if isinstance(state, torch.Tensor) else zip(state[1:], expected[1][1:], strict=True)
    for found, right in pairs:
        assert found.dtype == torch.float32 and relative_error(found, right) < 2e-5


def log_decays(t, h, big):
    """One step in ten forgets everything, and the others keep 95 %."""
    small = torch.full((1, t, h), -0.05, dtype=torch.float64)
    return torch.where(torch.rand(1, t, h, generator=torch.Generator().manual_seed(0)) < 0.1, big, small)


@pytest.mark.parametrize("big", [-160.0, -1e6, -1e30])
@pytest.mark.parametrize("scan", [ssm.ssd, by_pieces(ssm.ssd)], ids=["ssd", "ssd in pieces"])
def test_great_and_small_steps_share_a_chunk(scan, big):
    """Sums of the great ones must leave digits for the small ones, in the outputs and in every gradient."""
    x, dt, A, B, C, D = ssd_inputs(b=1, t=256, h=2, g=1, n=4)
    A, dt = torch.full_like(A, -1.0), -log_decays(256, 2, big)
    args = [w.detach().float().requires_grad_() for w in (x, dt, A, B, C, D)]
    exact = [w.detach().double().requires_grad_() for w in args]
    # the great steps' own inputs would drown the others: they feed nothing
    keep = (exact[1].detach() < 1).double()
    results = []
    for run, inputs in ((scan, args), (ssm.ssd_recurrent, exact)):
        y = run(inputs[0] * keep[..., None].to(inputs[0].dtype), *inputs[1:])
        results.append((y, *torch.autograd.grad(y.square().sum(), [inputs[i] for i in (0, 1, 3, 4)])))
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("big", [-160.0, -1e6, -torch.inf])
def test_great_and_small_decays_of_the_delta_rule(big):
    args = [w.detach() for w in delta_inputs(b=1, t=256, h=2)]
    args[4] = log_decays(256, 2, big)
    narrow = [w.float().requires_grad_() for w in args]
    y, expected = ssm.gated_delta_rule(*narrow), ssm.gated_delta_recurrent(*args)
    assert relative_error(y, expected) < 1e-4
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), narrow))


@pytest.mark.parametrize("name", ["ssd", "ssd in pieces"])
def test_a_decay_that_overflows_forgets(name):
    args = [w.detach().float() for w in SCANS[name][1](b=1, t=9)]
    args[1][:, 4], args[2] = 1e20, torch.full_like(args[2], -1e20)
    args = [w.requires_grad_() for w in args]
    y, state = SCANS[name][0](*args, return_state=True)
    assert all(w.isfinite().all() for w in (y, state, *torch.autograd.grad(y.mean(), args)))


def test_decays_have_exact_gradients_in_pieces():
    """dt up to 10 and A = −16: y · ∂y − v · ∂v, which is the same in exact numbers, has a tenth of the digits."""
    random = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(1, 2048, n, 16, generator=random) for n in (8, 1, 1))
    args = [x, torch.rand(1, 2048, 8, generator=random) * 10, torch.full((8,), -16.0), B, C]
    weights = torch.randn(x.shape, generator=random)

    def gradient(dtype, scan):
        inputs = [w.to(dtype).requires_grad_() for w in args]
        return torch.autograd.grad((scan(*inputs) * weights.to(dtype)).sum(), inputs[2])[0]

    exact = gradient(torch.float64, ssm.ssd)
    with kernels("reference"):
        reference = relative_error(gradient(torch.float32, ssm.ssd), exact)
    assert relative_error(gradient(torch.float32, by_pieces(ssm.ssd)), exact) < 3 * reference


@pytest.mark.parametrize("name", NARROW)
def test_autocast_leaves_scans_alone(name):
    scan, inputs, options = SCANS[name]
    args = [w.detach().float().requires_grad_() for w in inputs(t=50)]
    y, state = scan(*args, return_state=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found, found_state = scan(*args, return_state=True, **options)
        torch.autograd.grad(found.square().sum(), args, retain_graph=True)  # it belongs outside, and works inside
    torch.testing.assert_close((found, found_state), (y, state), rtol=0, atol=0)
    gradients = (torch.autograd.grad(w.square().sum(), args) for w in (found, y))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


associative_scans = pytest.mark.parametrize("scan", [ssm.associative_scan, ssm.associative_scan_work_efficient])


@associative_scans
@given(st.integers(1, 70), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_associative_scans_are_the_loop(scan, t, starts, turns):
    torch.manual_seed(t)
    dtype = torch.complex128 if turns else torch.float64
    a, u = (torch.randn(2, t, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    start = torch.randn(2, 3, dtype=dtype, requires_grad=True) if starts else None
    h, states = torch.zeros(2, 3, dtype=dtype) if start is None else start, []
    for i in range(t):
        h = a[:, i] * h + u[:, i]
        states.append(h)
    expected, found = torch.stack(states, 1), scan(a, u, start)
    torch.testing.assert_close(found, expected)
    inputs = [a, u, *([start] if starts else [])]
    grads = [torch.autograd.grad(y.abs().square().sum(), inputs, materialize_grads=True) for y in (found, expected)]
    torch.testing.assert_close(*grads)


@associative_scans
def test_associative_scans_carry_a_state_from_piece_to_piece(scan):
    a, u = torch.rand(2, 19, 3, dtype=torch.float64), torch.randn(2, 19, 3, dtype=torch.float64)
    head = scan(a[:, :8], u[:, :8])
    torch.testing.assert_close(torch.cat([head, scan(a[:, 8:], u[:, 8:], head[:, -1])], 1), scan(a, u))


class Multiplications(TorchDispatchMode):
    """Counts them, one for each number of each product, and how many products stand one after the other."""

    numbers, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor:
            self.numbers, self.products = self.numbers + out.numel(), self.products + 1
        return out


@pytest.mark.parametrize("t", [1, 2, 100, 1024])
def test_the_work_of_the_two_parallel_scans(t):
    a, u = torch.rand(1, t, 1), torch.randn(1, t, 1)
    rounds = math.ceil(math.log2(t))
    with Multiplications() as simple:
        ssm.associative_scan(a, u)
    assert simple.products == 2 * rounds
    assert simple.numbers == sum(2 * (t - 2**i) for i in range(rounds))  # about 2 t log t
    with Multiplications() as efficient:
        ssm.associative_scan_work_efficient(a, u)
    assert efficient.products == 3 * math.floor(math.log2(t))
    assert efficient.numbers < 3 * t


BAD_SELECTIVE = {
    "x has shape (7, 3), and must be (b, t, d)": {"x": torch.ones(7, 3)},
    "dt has shape (2, 6, 3) as (b, t, d), so t = 6, but x has t = 7": {"dt": torch.ones(2, 6, 3)},
    "A has shape (4, 4) as (d, n), so d = 4, but x has d = 3": {"A": torch.ones(4, 4)},
    "B has shape (2, 7, 5) as (b, t, n), so n = 5, but A has n = 4": {"B": torch.ones(2, 7, 5)},
    "D has shape (3, 1), and must be (d)": {"D": torch.ones(3, 1)},
    "initial_state has shape (1, 3, 4) as (b, d, n), so b = 1": {"initial_state": torch.ones(1, 3, 4)},
}
BAD_SSD = {
    "x has shape (2, 7, 12), and must be (b, t, h, p)": {"x": torch.ones(2, 7, 12)},
    "dt has shape (2, 7, 3) as (b, t, h), so h = 3, but x has h = 4": {"dt": torch.ones(2, 7, 3)},
    "B has 3 groups and x has 4 heads": {"B": torch.ones(2, 7, 3, 5), "C": torch.ones(2, 7, 3, 5)},
    "C has shape (2, 7, 1, 5) as (b, t, g, n), so g = 1, but B has g = 2": {"C": torch.ones(2, 7, 1, 5)},
    "chunk_size is 0": {"chunk_size": 0},
    "initial_state has shape (2, 4, 5, 3)": {"initial_state": torch.ones(2, 4, 5, 3)},
}


@pytest.mark.parametrize(
    "scan, inputs, bad, message",
    [(ssm.selective_scan, selective_inputs, bad, m) for m, bad in BAD_SELECTIVE.items()]
    + [(ssm.ssd, ssd_inputs, bad, m) for m, bad in BAD_SSD.items()],
    ids=[*BAD_SELECTIVE, *BAD_SSD],
)
def test_wrong_shapes_are_named(scan, inputs, bad, message):
    arguments = dict(zip(("x", "dt", "A", "B", "C", "D"), inputs(), strict=True)) | bad
    with pytest.raises(ValueError) as caught:
        scan(**arguments)
    assert message in str(caught.value)


def test_a_convolution_with_another_history_is_named():
    with pytest.raises(ValueError, match="history has 2 steps, and a filter of width 4 looks back at 3"):
        ssm.causal_conv(torch.ones(1, 5, 2), torch.ones(2, 4), history=torch.ones(1, 2, 2))


def test_angles_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="angles turn 4 pairs, and B has 6 numbers"):
        ssm.mamba3_scan(*mamba3_inputs(n=6, a=4))
    args = mamba3_inputs()
    state = [torch.zeros(2, 4, 2), torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 2, 6), torch.zeros(2, 4, 2, 3)]
    with pytest.raises(ValueError, match=r"initial state has shape \(2, 4, 3, 5\) as \(b, h, p, n\), so n = 5"):
        ssm.mamba3_scan(*args, initial_state=tuple(state))


def update_inputs():
    A, state = -torch.ones(4, 1, 1), torch.zeros(2, 4, 3, 5)
    return {"x": torch.ones(2, 4, 3), "dt": torch.ones(2, 4, 1), "A": A, "B": torch.ones(2, 2, 5),
            "C": torch.ones(2, 2, 5), "D": torch.ones(4, 1), "state": state}  # fmt: skip


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"state": torch.zeros(1, 4, 3, 5)}, r"state has shape \(1, 4, 3, 5\) as \(b, h, p, n\), so b = 1, but x has"),
        ({"state": torch.zeros(2, 4, 3, 1)}, r"state has shape \(2, 4, 3, 1\).* so n = 1, but B has n = 5"),
        ({"B": torch.ones(2, 3, 5), "C": torch.ones(2, 3, 5)}, "B has 3 groups and x has 4 heads"),
        ({"dt": torch.ones(2, 4, 2)}, r"dt has shape \(2, 4, 2\).* so p = 2, but x has p = 3"),
        ({"A": torch.ones(4, 1)}, r"A has shape \(4, 1\), and must be \(h, #p, #n\)"),
    ],
)
def test_a_step_with_wrong_shapes_is_named(bad, message):
    ssm.state_update(**update_inputs())
    with pytest.raises(ValueError, match=message):
        ssm.state_update(**update_inputs() | bad)


def test_a_chunk_of_nothing_is_named():
    q = torch.ones(1, 4, 2, 3)
    with pytest.raises(ValueError, match="chunk_size is 0, and must be at least 1"):
        ssm.linear_attention(q, q, q, chunk_size=0)


@pytest.mark.parametrize("state, message", [
    ((torch.zeros(2, 4, 2), torch.zeros(2, 4, 3, 6), torch.zeros(2, 4, 2, 6)), r"4 tensors .* it is 3, of shapes \["),
    (torch.zeros(2, 4, 3, 6), r"it is one tensor of shape \(2, 4, 3, 6\)"),
])  # fmt: skip
def test_half_a_state_of_mamba3_is_named(state, message):
    with pytest.raises(ValueError, match=message):
        ssm.mamba3_scan(*mamba3_inputs(), initial_state=state)


def test_inputs_of_two_widths_are_computed_in_the_wider():
    """The output has the type of x."""
    for name, (scan, inputs, options) in SCANS.items():
        args = [w.detach() for w in inputs()]
        expected = scan(*args, **options)
        for i in range(len(args)):
            for dtype in (torch.float32, torch.float64):
                rest = torch.float64 if dtype is torch.float32 else torch.float32
                mixed = [w.to(dtype if i == j else rest) for j, w in enumerate(args)]
                for kernel in ("auto", "reference"):
                    with kernels(kernel):
                        y = scan(*mixed, **options)
                    assert y.dtype == mixed[0].dtype
                    assert relative_error(y, expected) < 1e-5, (name, i, kernel)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_a_second_derivative_of_what_only_reads_the_states(kernel):
    """No gradient reaches the last state then."""
    scans = (
        (ssm.selective_scan, selective_inputs(1, 3, 2, 2), 4),
        (by_pieces(lambda *a, **more: ssm.ssd(*a, chunk_size=2, **more)), ssd_inputs(1, 3, 2, 2, 1, 2), 4),
    )
    for scan, args, reader in scans:
        args = [w.detach() for w in args]

        def read(C, scan=scan, args=args, reader=reader):
            y, state = scan(*args[:reader], C, *args[reader + 1 :], return_state=True)
            return y.square().sum() + state.sum()

        with kernels(kernel):
            assert torch.autograd.gradgradcheck(read, args[reader].requires_grad_())


def test_scans_inside_torch_func():
    """One gradient for each text of the batch, which hand-written backwards can't give."""
    scans = (
        (ssm.selective_scan, selective_inputs(3, 9, 2, 2)),
        (by_pieces(lambda *a: ssm.ssd(*a, chunk_size=128)), ssd_inputs(3, 9, 2, 2, 1, 2)),
    )
    for scan, args in scans:
        x, dt, A, B, C, D = (w.detach() for w in args)

        def loss(A, *text, scan=scan, D=D):
            x, dt, B, C = (w.unsqueeze(0) for w in text)
            return scan(x, dt, A, B, C, D).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(A, x, dt, B, C)
        for i, each in enumerate(found):
            alone = torch.autograd.grad(loss(A.requires_grad_(), x[i], dt[i], B[i], C[i]), A)[0]
            torch.testing.assert_close(each, alone, rtol=1e-9, atol=1e-9)


@associative_scans
def test_a_parallel_scan_of_nothing(scan):
    assert scan(torch.rand(2, 0, 3), torch.rand(2, 0, 3)).shape == (2, 0, 3)


@scans
def test_a_scan_of_no_texts(name):
    scan, inputs, options = SCANS[name]
    args = inputs(b=0)
    y = scan(*args, **options)
    assert y.shape == args[0].shape and torch.autograd.grad(y.sum(), args[0])[0].shape == y.shape


def test_no_time_is_no_scan():
    with pytest.raises(ValueError, match="at least one step of time"):
        ssm.selective_scan(*selective_inputs(t=1)[:0], *(v[:, :0] if v.ndim == 3 else v for v in selective_inputs()))


def test_twins_say_why_they_refuse():
    x, dt, A, B, C, D = selective_inputs()
    reasons = dict(ssm.selective_scan.explain(x, dt, A, B, C, D).refused)
    assert "mamba-ssm (unmeasured)" in reasons
    assert {"selective_scan", "ssd", "causal_conv", "state_update"} <= OPS.keys()
