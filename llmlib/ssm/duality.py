"""State space duality (Mamba-2): with one decay for a whole head, the recurrence is also masked attention.

Its three forms compute one function: `ssd_recurrent` steps through time, `ssd_quadratic` multiplies by one t × t matrix
for each head, `ssd` does the second within chunks and the first between them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from llmlib.ops import available, op
from llmlib.ssm.scan import require_shapes, require_time, widen


@op
def ssd(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    D: Float[Tensor, "h"] | None = None,
    *,
    chunk_size: int = 64,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "b t h p"] | tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Mamba-2's recurrence, computed in chunks of time (arXiv 2405.21060, section 6):

        S_t = exp(dt_t A) S_{t−1} + dt_t x_t B_tᵀ         a p × n state for each head
        y_t = S_t C_t + D x_t

    Each of the g groups of B and C serves h / g neighbouring heads. dt is final: positive, bias and softplus applied.
    Inside a chunk the outputs are (L ∘ C Bᵀ)(dt x), L[i, j] = exp(A Σ_{j<r≤i} dt_r): quadratic in chunk_size; from
    chunk to chunk only the state passes: linear in t. Decays and states are float32 (float64 for such inputs)
    whatever the dtype of x; y has the dtype of x.
    With return_state, also the last state, which the next piece of a long text takes as initial_state.
    Raises ValueError where ranks or sizes don't fit together, or chunk_size is below 1.
    """
    b, t, h, p = x.shape
    g, n, size = B.shape[2], B.shape[3], min(chunk_size, t)
    u, dt, A, B, C, D, state = widen(x, dt, A, B, C, D, initial_state)
    # steps with dt = 0 fill up the last chunk: they leave the state as it is
    v, log_decay, B, C = (_chunks(w, size) for w in (u * dt[..., None], dt * A, B, C))
    v = rearrange(v, "b z c (g r) p -> b z g c r p", g=g)
    B, C = (w.transpose(2, 3) for w in (B, C))
    since = rearrange(log_decay, "b z c (g r) -> b z g r c", g=g).cumsum(-1)

    within = _segments(since).exp() * (C @ B.mT).unsqueeze(3)
    y = rearrange(within @ v.transpose(3, 4), "b z g r c p -> b z g c r p")

    until = rearrange(since[..., -1:] - since, "b z g r c -> b z g c r 1").exp()
    added = B.mT @ (v * until).flatten(-2)
    if state is None:
        state = u.new_zeros(b, h, p, n)
    state = rearrange(state, "b (g r) p n -> b g n (r p)", g=g)
    across = repeat(since[..., -1].exp(), "b z g r -> b z g 1 (r p)", p=p)
    before = []
    for decay, new in zip(across.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = decay * state + new
    carried = (C @ torch.stack(before, 1)).unflatten(-1, (-1, p))
    y = y + carried * rearrange(since, "b z g r c -> b z g c r 1").exp()

    y = rearrange(y, "b z g c r p -> b (z c) (g r) p")[:, :t]
    y = (y if D is None else y + D[:, None] * u).to(x.dtype)
    return (y, rearrange(state, "b g n (r p) -> b (g r) p n", p=p)) if return_state else y


def _chunks(x: Float[Tensor, "b t *rest"], size: int) -> Float[Tensor, "b z c *rest"]:
    short = -x.shape[1] % size
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short))
    return x.unflatten(1, (-1, size))


def _segments(since: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c c"]:
    """since[i] − since[j] where j ≤ i, and −∞ above the diagonal: masked before exp, or its gradient would be NaN."""
    future = torch.ones(since.shape[-1], since.shape[-1], dtype=torch.bool, device=since.device).triu(1)
    return (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(future, -torch.inf)


@ssd.check
def _fits(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    letters = {
        "x": "b t h p", "dt": "b t h", "A": "h", "B": "b t g n", "C": "b t g n", "D": "h", "initial_state": "b h p n",
    }  # fmt: skip
    require_shapes(letters, x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    require_time(x)
    require_groups(x, B)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, and must be at least 1")


def require_groups(x: Float[Tensor, "b t h p"], B: Float[Tensor, "b t g n"]) -> None:
    if x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B has {B.shape[2]} groups and x has {x.shape[2]} heads: "
            f"the number of heads must be a multiple of the number of groups"
        )


def _per_head(x, B, C):
    return (w.repeat_interleave(x.shape[2] // w.shape[2], 2) for w in (B, C))


def ssd_recurrent(x, dt, A, B, C, D=None):
    """`ssd` step by step: linear in time, constant in memory, and nothing to parallelise."""
    B, C = _per_head(x, B, C)
    state, ys = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state = (dt_t * A).exp()[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C_t))
    y = torch.stack(ys, 1)
    return y if D is None else y + D[:, None] * x


def ssd_matrix(dt, A, B, C):
    """The 1-semiseparable mask L times the scores C Bᵀ: what `ssd` multiplies dt·x by, (b h t t)."""
    L = _segments((dt * A).cumsum(1).mT).exp()
    return L * torch.einsum("bthn,bshn->bhts", C, B)


def ssd_quadratic(x, dt, A, B, C, D=None):
    """`ssd` as attention without softmax: one t × t matrix for each head, masked by decay."""
    y = torch.einsum("bhts,bshp->bthp", ssd_matrix(dt, A, *_per_head(x, B, C)), dt[..., None] * x)
    return y if D is None else y + D[:, None] * x


def _needs_triton(x, package: str) -> str | None:
    if not available(package):
        return f"the package {package} is not installed"
    if not available("triton"):
        return "the package triton is not installed"
    if x.dtype == torch.float64:
        return "float64 is not among its dtypes"
    return None if x.is_cuda else f"x is on the {x.device.type}, and this kernel runs on CUDA only"


def _mamba_ssm_refuses(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    reason = _needs_triton(x, "mamba_ssm")
    if reason is None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        reason = f"chunk_size is {chunk_size}, and its blocks need a power of two from 16"
    return reason


@ssd.twin("mamba-ssm", _mamba_ssm_refuses)
def _by_mamba_ssm(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), chunk_size,
        D=None if D is None else D.float(), initial_states=initial_state, return_final_states=return_state,
    )  # fmt: skip


def _fla_refuses(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    return _needs_triton(x, "fla")


@ssd.twin("fla", _fla_refuses)
def _by_fla(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    """Linear attention with one gate for a head is the same recurrence: q = C, k = B, v = dt x, log gate = dt A."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k = (w.to(x.dtype) for w in _per_head(x, C, B))
    v = (x * dt[..., None]).to(x.dtype)
    before = None if initial_state is None else initial_state.mT.float().contiguous()
    y, state = chunk_simple_gla(
        q.contiguous(), k.contiguous(), v, g=(dt * A).float(), scale=1.0, initial_state=before,
        output_final_state=return_state,
    )  # fmt: skip
    y = y if D is None else (y + D[:, None] * x).to(x.dtype)
    return (y, state.mT) if return_state else y
