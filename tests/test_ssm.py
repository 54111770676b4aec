"""The recurrences: three forms of each are one function; causality, linearity, carried states; extremes; errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib import ssm
from llmlib.ops import OPS, kernels

torch.set_num_threads(1)
SELECTIVE = {
    "reference": ssm.selective_scan.reference,
    "chunked": next(t.run for t in ssm.selective_scan.twins if t.name == "chunked"),
    "parallel": ssm.selective_scan_parallel,
    "matrix": ssm.selective_scan_matrix,
}
SSD = {
    "recurrent": ssm.ssd_recurrent,
    "quadratic": ssm.ssd_quadratic,
    "chunk 1": lambda *a: ssm.ssd(*a, chunk_size=1),
    "chunk 5": lambda *a: ssm.ssd(*a, chunk_size=5),
    "chunk 64": lambda *a: ssm.ssd(*a, chunk_size=64),
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


SCANS = {
    "selective_scan": (ssm.selective_scan, selective_inputs, {}),
    "ssd": (ssm.ssd, ssd_inputs, {"chunk_size": 4}),
}
scans = pytest.mark.parametrize("name", SCANS)


@scans
@settings(max_examples=10, deadline=None)
@given(t=st.integers(2, 14), data=st.data())
def test_a_scan_is_causal(name, t, data):
    scan, inputs, options = SCANS[name]
    args = inputs(t=t)
    at = data.draw(st.integers(0, t - 1))
    for gradient in torch.autograd.grad(scan(*args, **options)[:, at].sum(), [args[i] for i in (0, 1, 3, 4)]):
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
    x, dt, A, B, C, D = inputs(t=t)
    cut = data.draw(st.integers(1, t - 1))
    whole, last = scan(x, dt, A, B, C, D, return_state=True, **options)
    y1, state = scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, return_state=True, **options)
    y2, state = scan(
        x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, initial_state=state, return_state=True, **options
    )
    torch.testing.assert_close(torch.cat([y1, y2], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dt, A", [(1e-6, -1e-4), (1e-6, -1e4), (0.1, -1.0), (100.0, -1e4), (100.0, -1e-4)])
@scans
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


def test_long_sums_do_not_drift():
    """8192 float32 steps against float64: cumulative sums start anew in every chunk."""
    args = [v.detach() for v in ssd_inputs(b=1, t=8192, h=2, p=4, g=1, n=4)]
    y = ssm.ssd(*(v.float() for v in args))
    torch.testing.assert_close(y.double(), ssm.ssd_recurrent(*args), rtol=1e-4, atol=1e-4)


def test_the_work_of_the_parallel_scan_grows_as_t_log_t():
    a, u = torch.rand(1, 100, 3, dtype=torch.float64), torch.randn(1, 100, 3, dtype=torch.float64)
    h = torch.zeros(1, 3, dtype=torch.float64)
    for t in range(100):
        h = a[:, t] * h + u[:, t]
    torch.testing.assert_close(ssm.associative_scan(a, u)[:, -1], h)
    calls = []
    original = torch.cat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", lambda *args: calls.append(1) or original(*args))
        ssm.associative_scan(a, u)
    assert len(calls) == 2 * math.ceil(math.log2(100))


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


def test_no_time_is_no_scan():
    with pytest.raises(ValueError, match="at least one step of time"):
        ssm.selective_scan(*selective_inputs(t=1)[:0], *(v[:, :0] if v.ndim == 3 else v for v in selective_inputs()))


def test_twins_say_why_they_refuse():
    x, dt, A, B, C, D = selective_inputs()
    reasons = dict(ssm.selective_scan.explain(x, dt, A, B, C, D).refused)
    assert "mamba-ssm (unmeasured)" in reasons
    assert {"selective_scan", "ssd", "causal_conv", "state_update"} <= OPS.keys()
