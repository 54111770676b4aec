"""State space duality (Mamba-2): with one decay for a whole head, the recurrence is also masked attention.

Its three forms compute one function: `ssd_recurrent` steps through time, `ssd_quadratic` multiplies by one t × t matrix
for each head, `ssd` does the second within chunks and the first between them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from llmlib.ops import op
from llmlib.ssm.scan import needs_triton, require_shapes, require_time, widen


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
    u, dt, A, B, C, D = widen(x, dt, A, B, C, D)
    q, k, v = C.unsqueeze(3), B.unsqueeze(3), (u * dt.unsqueeze(-1)).unsqueeze(3)
    y, state = chunked_recurrence(q, k, v, dt * A, chunk_size=chunk_size, state=initial_state)
    y = y.squeeze(3)
    y = (y if D is None else torch.addcmul(y, D[:, None], u)).to(x.dtype)
    return (y, state) if return_state else y


def chunked_recurrence(
    q: Float[Tensor, "b t g r n"],
    k: Float[Tensor, "b t g m n"],
    v: Float[Tensor, "b t h m p"],
    log_decay: Float[Tensor, "b t h"],
    *,
    chunk_size: int,
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b t h r p"], Float[Tensor, "b h p n"]]:
    """What SSD, linear attention and Mamba-3 share, with any number of inputs m and outputs r in a step:

        S_t = exp(a_t) S_{t−1} + Σ_m v_{t,m} k_{t,m}ᵀ        y_{t,r} = S_t q_{t,r}

    In a chunk y = (L ∘ q kᵀ) v with L[i, j] = exp(Σ_{j<s≤i} a_s); each chunk adds to the state, and reads what the
    chunks before it left there.
    """
    t, h, m, p = v.shape[1:]
    g, r, n = q.shape[2:]
    size = min(chunk_size, t)
    # steps of zeros fill up the last chunk: they leave the state as it is
    q, k, v, since = (chunks(w, size) for w in (q, k, v, log_decay))
    q, k = (rearrange(w, "b z c g r n -> b z g (c r) n") for w in (q, k))
    v = rearrange(v, "b z c (g i) m p -> b z g (c m) i p", g=g)
    since = rearrange(since, "b z c (g i) -> b z g i c", g=g).cumsum(-1)

    decay = segments(since).exp_()[..., :, None, :, None]
    within = (decay * (q @ k.mT).view(*q.shape[:3], 1, size, r, size, m)).flatten(-2).flatten(-3, -2)
    y = (within @ v.transpose(3, 4)).transpose(3, 4)

    until = repeat((since[..., -1:] - since).exp(), "b z g i c -> b z g (c m) i 1", m=m)
    added = k.mT @ (v * until).flatten(-2)
    state = v.new_zeros(len(v), h, p, n) if state is None else state.to(v.dtype)
    state = rearrange(state, "b (g i) p n -> b g n (i p)", g=g)
    across = repeat(since[..., -1].exp(), "b z g i -> b z g 1 (i p)", p=p)
    since = repeat(since.exp(), "b z g i c -> b z g (c r) i 1", r=r)
    ys = []
    for q_z, y_z, since_z, decay, new in zip(*(w.unbind(1) for w in (q, y, since, across, added)), strict=True):
        ys.append(torch.addcmul(y_z, (q_z @ state).unflatten(-1, (-1, p)), since_z))
        state = torch.addcmul(new, decay, state)

    y = torch.stack(ys, 1)
    y = rearrange(y, "b z g (c r) i p -> b (z c) (g i) r p", r=r)[:, :t]
    return y, rearrange(state, "b g n (i p) -> b (g i) p n", p=p)


def chunks(x: Float[Tensor, "b t *rest"], size: int) -> Float[Tensor, "b z c *rest"]:
    short = -x.shape[1] % size
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short))
    return x.unflatten(1, (-1, size))


def segments(since: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c c"]:
    """since[i] − since[j] where j ≤ i, and −∞ above the diagonal: masked before exp, or its gradient would be NaN."""
    future = torch.ones(since.shape[-1], since.shape[-1], dtype=torch.bool, device=since.device).triu(1)
    return (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill_(future, -torch.inf)


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


def require_groups(x: Float[Tensor, "b t h *p"], B: Float[Tensor, "b t g *n"]) -> None:
    if x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B has {B.shape[2]} groups and x has {x.shape[2]} heads: "
            f"the number of heads must be a multiple of the number of groups"
        )


def per_head(h: int, *groups: Float[Tensor, "b t g *n"]) -> list[Float[Tensor, "b t h *n"]]:
    """Each group repeated for the neighbouring heads that it serves."""
    return [w.repeat_interleave(h // w.shape[2], 2) for w in groups]


def ssd_recurrent(x, dt, A, B, C, D=None):
    """`ssd` step by step: linear in time, constant in memory, and nothing to parallelise."""
    B, C = per_head(x.shape[2], B, C)
    state, ys = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state = (dt_t * A).exp()[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C_t))
    y = torch.stack(ys, 1)
    return y if D is None else y + D[:, None] * x


def ssd_matrix(dt, A, B, C):
    """The 1-semiseparable mask L times the scores C Bᵀ: what `ssd` multiplies dt·x by, (b h t t)."""
    L = segments((dt * A).cumsum(1).mT).exp()
    return L * torch.einsum("bthn,bshn->bhts", C, B)


def ssd_quadratic(x, dt, A, B, C, D=None):
    """`ssd` as attention without softmax: one t × t matrix for each head, masked by decay."""
    y = torch.einsum("bhts,bshp->bthp", ssd_matrix(dt, A, *per_head(x.shape[2], B, C)), dt[..., None] * x)
    return y if D is None else y + D[:, None] * x


def _mamba_ssm_refuses(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    reason = needs_triton(x, "mamba_ssm")
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
    return needs_triton(x, "fla")


@ssd.twin("fla", _fla_refuses)
def _by_fla(x, dt, A, B, C, D=None, *, chunk_size=64, initial_state=None, return_state=False):
    """Linear attention with one gate for a head is the same recurrence: q = C, k = B, v = dt x, log gate = dt A."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k = (w.to(x.dtype) for w in per_head(x.shape[2], C, B))
    v = (x * dt[..., None]).to(x.dtype)
    before = None if initial_state is None else initial_state.mT.float().contiguous()
    y, state = chunk_simple_gla(
        q.contiguous(), k.contiguous(), v, g=(dt * A).float(), scale=1.0, initial_state=before,
        output_final_state=return_state,
    )  # fmt: skip
    y = y if D is None else (y + D[:, None] * x).to(x.dtype)
    return (y, state.mT) if return_state else y
