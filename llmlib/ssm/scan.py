"""The selective scan of Mamba-1: a diagonal recurrence whose step size, input and output depend on the token.

Its three forms compute one function: `selective_scan` steps through time, `selective_scan_parallel` combines steps in
a tree, `selective_scan_matrix` writes the whole map from x to y as one matrix.
"""

import functools

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from llmlib.errors import require
from llmlib.norm import without_autocast
from llmlib.ops import Op, available, differentiate_again, transformed


class Recurrence(Op):
    """An op that runs over time: its states and sums stay float32 under autocast too."""

    def run(self, *args, **kwargs):
        with without_autocast(next(iter((*args, *kwargs.values())))):
            return super().run(*args, **kwargs)


def require_shapes(letters: dict[str, str], **tensors: Tensor | None) -> None:
    """Check each tensor's shape against its letters, such as x="b t d"; a letter has one size wherever it occurs.

    An axis may have size 1 instead where its letter has a #.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        axes, shape = letters[name].split(), tensor.shape
        if len(shape) != len(axes):
            raise ValueError(f"{name} has shape {tuple(shape)}, and must be ({', '.join(axes)})")
        for axis, size in zip(axes, shape, strict=True):
            if axis.startswith("#") and size == 1:
                continue
            axis = axis.removeprefix("#")
            seen, owner = sizes.setdefault(axis, (size, name))
            if seen != size:
                raise ValueError(
                    f"{name} has shape {tuple(shape)} as ({', '.join(axes)}), so {axis} = {size}, "
                    f"but {owner} has {axis} = {seen}"
                )


def require_groups(heads: int, groups: int) -> None:
    require(
        groups > 0 and heads % groups == 0,
        f"B has {groups} groups and x has {heads} heads: "
        f"the number of heads must be a multiple of the number of groups",
        ValueError,
    )


def require_time(x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: a scan needs at least one step of time")


def widen(*tensors: Tensor | None) -> list:
    """All tensors in float32, or in float64 where one of them is: sums over time lose too much in 16 bits."""
    wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None), torch.float32)
    return [t if t is None else t.to(wide) for t in tensors]


def needs_triton(x: Tensor, package: str) -> str | None:
    """Why a Triton kernel of this package can't take x, or None."""
    if not available(package):
        return f"the package {package} is not installed"
    if not available("triton"):
        return "the package triton is not installed"
    if x.dtype == torch.float64:
        return "float64 is not among its dtypes"
    return None if x.is_cuda else f"x is on the {x.device.type}, and this kernel runs on CUDA only"


@Recurrence
def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, "d"] | None = None,
    *,
    initial_state: Float[Tensor, "b d n"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "b t d"] | tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Mamba-1's recurrence, one channel d at a time (arXiv 2312.00752, equation 2 with the Euler step for B):

        h_t = exp(dt_t A) h_{t−1} + dt_t x_t B_t          a state of n numbers for each channel
        y_t = C_t · h_t + D x_t

    dt is final: positive, its bias and softplus applied. A is negative, so that the state fades. States are float32
    (float64 for such inputs) whatever the dtype of x; y has the dtype of x.
    With return_state, also the last state, which the next piece of a long text takes as initial_state.
    Raises ValueError where ranks or sizes don't fit together.
    """
    u, dt, A, B, C, D, h = widen(x, dt, A, B, C, D, initial_state)
    decay = torch.exp(dt[..., None] * A)
    drive = (dt * u)[..., None] * B[:, :, None]
    if h is None:
        h = torch.zeros_like(drive[:, 0])
    ys = []
    for a, b, c in zip(decay.unbind(1), drive.unbind(1), C.unbind(1), strict=True):
        h = a * h + b
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    y = torch.stack(ys, 1)
    y = (y if D is None else y + D * u).to(x.dtype)
    return (y, h) if return_state else y


@selective_scan.check
def _fits(x, dt, A, B, C, D=None, *, initial_state=None, return_state=False):
    letters = {"x": "b t d", "dt": "b t d", "A": "d n", "B": "b t n", "C": "b t n", "D": "d", "initial_state": "b d n"}
    require_shapes(letters, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    require_time(x)


def associative_scan(
    decay: Inexact[Tensor, "b t *s"],
    drive: Inexact[Tensor, "b t *s"],
    initial_state: Inexact[Tensor, "b *s"] | None = None,
) -> Inexact[Tensor, "b t *s"]:
    """All states of h_t = a_t h_{t−1} + u_t at once, in ⌈log₂ t⌉ rounds (Hillis and Steele, 1986).

    Two steps one after the other are one step: (a, u) then (a', u') is (a'a, a'u + u'), and this product is
    associative, so the steps can be combined in any grouping. Each round joins every step with the one `reach`
    before it, which doubles how far back it sees. Depth log t, work t log t. Before the first step is 0, or
    `initial_state`.
    """
    reach = 1
    while reach < decay.shape[1]:
        late, early = decay[:, reach:], decay[:, :-reach]
        drive = torch.cat([drive[:, :reach], late * drive[:, :-reach] + drive[:, reach:]], 1)
        decay = torch.cat([decay[:, :reach], late * early], 1)
        reach *= 2
    return drive if initial_state is None else drive + decay * initial_state.unsqueeze(1)


def associative_scan_work_efficient(
    decay: Inexact[Tensor, "b t *s"],
    drive: Inexact[Tensor, "b t *s"],
    initial_state: Inexact[Tensor, "b *s"] | None = None,
) -> Inexact[Tensor, "b t *s"]:
    """`associative_scan` with work t and depth 2 log t (Blelloch, 1990).

    On the way up, each pair of neighbours becomes one step, so that a scan of half the length gives every second state;
    on the way down, each of these gives the state after it.
    """
    first = drive[:, :1] if initial_state is None else decay[:, :1] * initial_state.unsqueeze(1) + drive[:, :1]
    if drive.shape[1] <= 1:
        return first
    late = decay[:, 1::2]
    early, before = decay[:, :-1:2], drive[:, :-1:2]
    odd = associative_scan_work_efficient(late * early, late * before + drive[:, 1::2], initial_state)
    later = decay[:, 2::2]
    states = odd.new_empty(drive.shape)
    states[:, 1::2] = odd
    states[:, ::2] = torch.cat([first, later * odd[:, : later.shape[1]] + drive[:, 2::2]], 1)
    return states


def selective_scan_parallel(x, dt, A, B, C, D=None):
    """`selective_scan` by `associative_scan`: log t rounds over tensors that hold every state (b t d n).

    Shapes are those of `selective_scan`; nothing is widened or checked.
    """
    states = associative_scan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])
    y = torch.einsum("btdn,btn->btd", states, C)
    return y if D is None else y + D * x


def selective_scan_matrix(x, dt, A, B, C, D=None):
    """`selective_scan` as y = M x with one lower triangular t × t matrix for each channel:

    M[t, s] = C_t · (exp(A Σ_{s<r≤t} dt_r) B_s) dt_s for s ≤ t, 0 above the diagonal (arXiv 2405.21060, section 3)

    Shapes are those of `selective_scan`; nothing is widened or checked. It holds b t² d n numbers.
    """
    total = dt.cumsum(1)
    span = (total[:, :, None] - total[:, None]).unsqueeze(-1) * A
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    decay = span.masked_fill(future[..., None, None], -torch.inf).exp()
    y = torch.einsum("btn,btsdn,bsn,bsd->btd", C, decay, B, dt * x)
    return y if D is None else y + D * x


def _any_device(*args, **kwargs) -> str | None:
    return "torch.compile traces the reference instead" if torch.compiler.is_compiling() else transformed()


def _cuda_extension(x, *args, **kwargs) -> str | None:
    if not available("mamba_ssm"):
        return "the package mamba_ssm is not installed"
    if not available("selective_scan_cuda"):
        return "mamba_ssm is installed without its compiled extension selective_scan_cuda"
    return None if x.is_cuda else f"x is on the {x.device.type}, and this kernel runs on CUDA only"


def _mamba_ssm_refuses(x, dt, A, B, C, D=None, *, initial_state=None, return_state=False) -> str | None:
    reason = _cuda_extension(x)
    if reason is None and initial_state is not None:
        reason = "it starts from an empty state, and initial_state is given"
    if reason is None and A.shape[-1] > 256:
        reason = f"the state size is {A.shape[-1]}, and its limit is 256"
    if reason is None and x.dtype == torch.float64:
        reason = "float64 is not among its dtypes"
    return reason


@selective_scan.twin("mamba-ssm", _mamba_ssm_refuses)
def _by_mamba_ssm(x, dt, A, B, C, D=None, *, initial_state=None, return_state=False):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, B, C = (v.transpose(1, 2).to(x.dtype).contiguous() for v in (x, dt, B, C))
    out = selective_scan_fn(u, dt, A.float(), B, C, None if D is None else D.float(), return_last_state=return_state)
    return (out[0].transpose(1, 2), out[1]) if return_state else out.transpose(1, 2)


@selective_scan.twin("chunked", _any_device, measured="two CPU cores, see benchmarks/ssm.py")
def _by_chunks(x, dt, A, B, C, D=None, *, initial_state=None, return_state=False):
    """The same loop over pieces of time that fit in the cache; the backward recomputes each piece's states."""
    u, dt, A, B, C, D, h = widen(x, dt, A, B, C, D, initial_state)
    if h is None:
        h = u.new_zeros(u.shape[0], *A.shape)
    y, h = _Scan.apply(u, dt, A, B, C, h)
    y = (y if D is None else y + D * u).to(x.dtype)
    return (y, h) if return_state else y


class _Scan(torch.autograd.Function):
    """y and the last state. Kept for the backward: the inputs, and the state at the start of each piece.

    Inside, states are (b n d), so that the long axis is the one in a row of memory. With g_t = ∂loss/∂h_t,

        g_t = C_t ∂y_t + a_{t+1} g_{t+1}        a_t = exp(dt_t A)
        ∂C_t = h_t ∂y_t     ∂B_t = g_t (dt_t x_t)     ∂(dt_t x_t) = B_t · g_t     ∂(dt_t A) = g_t a_t h_{t−1}
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, h):
        inputs = x, dt, A, B, C, h
        x, dt, A, B, C, h = _time_first(*inputs)
        ctx.pieces = list(_pieces(x, A))
        ys, starts = [], []
        for s in ctx.pieces:
            starts.append(h)
            states = _states(x[s], dt[s], A, B[s], h)[1]
            ys.append(_over_state(C[s], states))
            h = states[-1].clone()
        ctx.save_for_backward(*inputs, *starts)
        return torch.cat(ys).transpose(0, 1), h.transpose(1, 2)

    @staticmethod
    def backward(ctx, dy, dh):
        inputs, starts = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        with without_autocast(dy):
            if torch.is_grad_enabled():
                return tuple(differentiate_again(_readable, inputs, (dy, dh)))
            return _scan_backward(ctx.pieces, inputs, starts, dy, dh)


def _readable(x, dt, A, B, C, h):
    return selective_scan.reference(x, dt, A, B, C, initial_state=h, return_state=True)


def _time_first(x, dt, A, B, C, h):
    x, dt, B, C = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
    return x, dt, A.t().contiguous(), B, C, h.transpose(1, 2).contiguous()


def _scan_backward(pieces, inputs, starts, dy, dh):
    x, dt, A, B, C, _ = _time_first(*inputs)
    dy = dy.transpose(0, 1).contiguous()
    g_next = dh.transpose(1, 2).contiguous()
    dx, ddt, dB, dC = (torch.empty_like(v) for v in (x, dt, B, C))
    dA = torch.zeros_like(A)
    for s, h in zip(reversed(pieces), reversed(starts), strict=True):
        a, states = _states(x[s], dt[s], A, B[s], h)
        dC[s] = _over_width(dy[s], states)
        g = C[s].unsqueeze(3) * dy[s].unsqueeze(2)
        steps, decays = g.unbind(0), a.unbind(0)
        steps[-1].add_(g_next)
        for i in range(len(steps) - 2, -1, -1):
            steps[i].addcmul_(decays[i + 1], steps[i + 1])
        g_next = a[0] * g[0]
        dB[s] = _over_width(dt[s] * x[s], g)
        du = _over_state(B[s], g)
        q = g.mul_(a)
        q[1:].mul_(states[:-1])
        q[0].mul_(h)
        torch.mul(du, dt[s], out=dx[s])
        torch.addcmul(torch.mul(q, A, out=a).sum(2), du, x[s], out=ddt[s])
        dA += q.mul_(dt[s].unsqueeze(2)).sum((0, 1))
    dx, ddt, dB, dC = (g.transpose(0, 1) for g in (dx, ddt, dB, dC))
    return dx, ddt, dA.t(), dB, dC, g_next.transpose(1, 2)


def _over_state(weights: Float[Tensor, "t b n"], states: Float[Tensor, "t b n d"]) -> Float[Tensor, "t b d"]:
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1), states.flatten(0, 1)).view(*states.shape[:2], states.shape[3])


def _over_width(weights: Float[Tensor, "t b d"], states: Float[Tensor, "t b n d"]) -> Float[Tensor, "t b n"]:
    # the row vector on the left: ten times as fast on a CPU as the column vector on the right
    flat = torch.bmm(weights.flatten(0, 1).unsqueeze(1), states.flatten(0, 1).transpose(1, 2))
    return flat.view(*states.shape[:3])


_PIECE = 2**19  # numbers in one tensor of states: four of them are 8 MB, which stays in a cache


def _pieces(x: Float[Tensor, "t b d"], A: Float[Tensor, "n d"]):
    steps = max(1, _PIECE // max(1, x.shape[1] * A.numel()))
    return (slice(i, i + steps) for i in range(0, len(x), steps))


def _states(x, dt, A, B, h):
    """Decays and states (t b n d) of one piece, from the state h before it."""
    a = (dt.unsqueeze(2) * A).exp_()
    states = B.unsqueeze(3) * (dt * x).unsqueeze(2)
    before = h
    for step, decay in zip(states.unbind(0), a.unbind(0), strict=True):
        before = step.addcmul_(decay, before)
    return a, states
