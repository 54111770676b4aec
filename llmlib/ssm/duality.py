"""State space duality (Mamba-2): with one decay for a whole head, the recurrence is also masked attention.

Its three forms compute one function: `ssd_recurrent` steps through time, `ssd_quadratic` multiplies by one t × t matrix
for each head, `ssd` does the second within chunks and the first between them.
"""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from llmlib.errors import require_counts
from llmlib.norm import without_autocast
from llmlib.ops import differentiate_again, transformed
from llmlib.ssm.scan import (
    Recurrence,
    needs_triton,
    require_groups,
    require_shapes,
    require_time,
    widen,
)

FORGOTTEN = -100.0  # in float32 exp(-100) is nothing beside 1, and greater sums would swallow the small steps in them


@Recurrence
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


@Recurrence
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
    chunks before it left there. Log decays below −100 count as −100: the state is forgotten all the same, and since
    the a_s are sums since the chunk's start, a greater one would leave no digits for the small ones beside it.
    """
    t, h, m, p = v.shape[1:]
    g, r, n = q.shape[2:]
    size = min(chunk_size, t)
    q, k, v, since = _in_chunks(q, k, v, log_decay, size)

    decay = segments(since).exp_()[..., :, None, :, None]
    within = (decay * (q @ k.mT).view(*q.shape[:3], 1, size, r, size, m)).flatten(-2).flatten(-3, -2)
    y = (within @ v.transpose(3, 4)).transpose(3, 4)

    until = repeat((since[..., -1:] - since).exp(), "b z g i c -> b z g (c m) i 1", m=m)
    added = k.mT @ (v * until).flatten(-2)
    state = v.new_zeros(len(v), g, n, h // g * p) if state is None else _state_in(state.to(v.dtype), g)
    across = repeat(since[..., -1].exp(), "b z g i -> b z g 1 (i p)", p=p)
    since = repeat(since.exp(), "b z g i c -> b z g (c r) i 1", r=r)
    ys = []
    for q_z, y_z, since_z, decay, new in zip(*(w.unbind(1) for w in (q, y, since, across, added)), strict=True):
        ys.append(torch.addcmul(y_z, (q_z @ state).unflatten(-1, (-1, p)), since_z))
        state = torch.addcmul(new, decay, state)

    y = torch.stack(ys, 1)
    y = rearrange(y, "b z g (c r) i p -> b (z c) (g i) r p", r=r)[:, :t]
    return y, rearrange(state, "b g n (i p) -> b (g i) p n", p=p)


def _in_chunks(q, k, v, log_decay, size: int):
    """(b z g (c r) n), (b z g (c m) n), (b z g (c m) i p), and the sum of the log decays since the chunk's start."""
    # steps of zeros fill up the last chunk: they leave the state as it is
    q, k, v, since = (chunks(w, size) for w in (q, k, v, log_decay))
    g = q.shape[3]
    q, k = (rearrange(w, "b z c g r n -> b z g (c r) n") for w in (q, k))
    v = rearrange(v, "b z c (g i) m p -> b z g (c m) i p", g=g)
    return q, k, v, rearrange(since.clamp(min=FORGOTTEN), "b z c (g i) -> b z g i c", g=g).cumsum(-1)


def _state_in(state: Float[Tensor, "b h p n"], g: int) -> Float[Tensor, "b g n ip"]:
    return rearrange(state, "b (g i) p n -> b g n (i p)", g=g)


_SHORT = 2**22  # decays inside chunks, over all heads, that autograd may keep: 16 MB in float32
_PIECE = 2**18  # how many of them the twin makes at a time, so that they stay in a cache


def _pieces_why_not(q, k, v, log_decay, *, chunk_size, state=None) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile traces the reference instead"
    if q.is_cuda:
        return "it is laid out for the caches of a CPU"
    if chunk_size <= 64 and log_decay.numel() * chunk_size * q.shape[3] * k.shape[3] < _SHORT:
        return "the text is so short that keeping what the backward needs costs less than making it again"
    return transformed()


@chunked_recurrence.twin("pieces", _pieces_why_not, measured="two CPU cores, see benchmarks/ssm.py")
def _by_pieces(q, k, v, log_decay, *, chunk_size, state=None):
    """The same over pieces of time that fit in the cache; the backward, by formula, makes each piece again.

    On a CPU chunks above 64 steps only add work inside them, so longer ones are cut.
    """
    (b, t, h, m, p), (r, n) = v.shape, q.shape[3:]
    size = min(chunk_size, 64, t)
    state = v.new_zeros(b, h, p, n) if state is None else state.to(v.dtype)
    chunk = max(1, b * h * size * size * r * m)
    return _Pieces.apply(q, k, v, log_decay, state, size, size * max(1, _PIECE // chunk))


class _Pieces(torch.autograd.Function):
    """Kept for the backward: the inputs, and the state at the start of each piece."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, state, size, steps):
        ctx.size, ctx.slices = size, [slice(i, i + steps) for i in range(0, v.shape[1], steps)]
        ys, starts = [], []
        for s in ctx.slices:
            starts.append(state)
            inputs = q[:, s], k[:, s], v[:, s], log_decay[:, s]
            y, state = chunked_recurrence.reference(*inputs, chunk_size=size, state=state)
            ys.append(y)
        ctx.save_for_backward(q, k, v, log_decay, *starts)
        return torch.cat(ys, 1), state

    @staticmethod
    def backward(ctx, dy, dstate):
        inputs, starts = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        with without_autocast(dy):
            if torch.is_grad_enabled():
                readable = functools.partial(_readable, chunk_size=ctx.size)
                return *differentiate_again(readable, (*inputs, starts[0]), (dy, dstate)), None, None
            return *_pieces_backward(ctx, inputs, starts, dy, dstate), None, None


def _readable(q, k, v, log_decay, state, chunk_size):
    return chunked_recurrence.reference(q, k, v, log_decay, chunk_size=chunk_size, state=state)


def _pieces_backward(ctx, inputs, starts, dy, dstate):
    g, p = inputs[0].shape[2], inputs[2].shape[-1]
    grads, dstate = [torch.empty_like(w) for w in inputs], _state_in(dstate, g)
    for s, start in zip(reversed(ctx.slices), reversed(starts), strict=True):
        piece = (w[:, s] for w in (*inputs, dy))
        *parts, dstate = _piece_backward(*piece, _state_in(start, g), dstate, ctx.size)
        for whole, part in zip(grads, parts, strict=True):
            whole[:, s] = part
    return *grads, rearrange(dstate, "b g n (i p) -> b (g i) p n", p=p)


def _piece_backward(q, k, v, log_decay, dy, start, dend, size):
    """The gradients of q, k, v, log_decay and the first state, from those of y and the last state.

    With G_z = ∂loss/∂S after chunk z, and e_i the decay from the chunk's start to step i, d_j that from j to its end:

        ∂v = (L ∘ q kᵀ)ᵀ ∂y + d k G        ∂q = (Σ_heads L ∘ ∂y vᵀ) k + e ∂y S_{z−1}ᵀ        ∂k likewise
        ∂(Σ_{s≤i} a_s) = Σ_j W[i, j] − Σ_j W[j, i] + e_i ∂y_i · S_{z−1} q_i − d_i v_i · G k_i,  W = L ∘ q kᵀ ∘ ∂y vᵀ

    and at the chunk's last step Σ_j d_j v_j · G k_j + (decay of the chunk) S_{z−1} · G more. The sums of W are
    y_i · ∂y_i and v_i · ∂v_i in part, but as differences of those they would lose most of their digits.
    """
    (t, _, m, p), (g, r, _) = v.shape[1:], q.shape[2:]
    kept = log_decay >= FORGOTTEN
    q, k, v, since = _in_chunks(q, k, v, log_decay, size)
    dy = rearrange(chunks(dy, size), "b z c (g i) r p -> b z g (c r) i p", g=g)
    until = repeat((since[..., -1:] - since).exp(), "b z g i c -> b z g (c m) i 1", m=m)
    v_until = (v * until).flatten(-2)
    dy_since = (dy * repeat(since.exp(), "b z g i c -> b z g (c r) i 1", r=r)).flatten(-2)
    across = repeat(since[..., -1].exp(), "b z g i -> b z g 1 (i p)", p=p).unbind(1)

    after, dbefore = k.mT @ v_until, q.mT @ dy_since  # so far what each chunk adds; the loops add what passes through
    state, dstate = start, dend
    for new, decay in zip(after.unbind(1), across, strict=True):
        state = new.addcmul_(decay, state)
    for new, decay in zip(reversed(dbefore.unbind(1)), reversed(across), strict=True):
        dstate = new.addcmul_(decay, dstate)
    before, dafter = torch.cat([start[:, None], after[:, :-1]], 1), torch.cat([dbefore[:, 1:], dend[:, None]], 1)

    # nothing differentiates this exp, so what overflows above the diagonal may simply be cut off
    L = (since.unsqueeze(-1) - since.unsqueeze(-2)).exp_().tril_()
    L = L if r == m == 1 else repeat(L, "b z g i c s -> b z g i (c r) (s m)", r=r, m=m)
    dy_heads = dy.transpose(3, 4).contiguous()
    scores, fed = (q @ k.mT).unsqueeze(3), k @ dafter
    dv = ((L * scores).mT @ dy_heads).transpose(3, 4)
    dv = torch.addcmul(dv, fed.unflatten(-1, (-1, p)), until)
    W = (dy_heads @ v.transpose(3, 4).mT).mul_(L)
    dscores = W.sum(3)
    dq = dscores @ k + dy_since @ before.mT
    dk = dscores.mT @ q + v_until @ dafter.mT

    W.mul_(scores)
    rows, columns = W.sum(-1).transpose(3, 4), W.sum(-2).transpose(3, 4)
    rows += (dy_since * (q @ before)).unflatten(-1, (-1, p)).sum(-1)
    fed = (v_until * fed).unflatten(-1, (-1, p)).sum(-1)
    dsince = rows.unflatten(3, (-1, r)).sum(4) - (columns + fed).unflatten(3, (-1, m)).sum(4)
    passed = torch.stack(across, 1) * before * dafter
    dsince[:, :, :, -1] += fed.sum(3) + passed.sum(3).unflatten(-1, (-1, p)).sum(-1)
    return (
        rearrange(dq, "b z g (c r) n -> b (z c) g r n", r=r)[:, :t],
        rearrange(dk, "b z g (c m) n -> b (z c) g m n", m=m)[:, :t],
        rearrange(dv, "b z g (c m) i p -> b (z c) (g i) m p", m=m)[:, :t],
        rearrange(dsince.flip(3).cumsum(3).flip(3), "b z g c i -> b (z c) (g i)")[:, :t] * kept,
        dstate,
    )


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
    require_groups(x.shape[2], B.shape[2])
    require_counts(chunk_size=chunk_size)


def per_head(h: int, *groups: Float[Tensor, "b t g *n"]) -> list[Float[Tensor, "b t h *n"]]:
    """Each group repeated for the neighbouring heads that it serves."""
    return [w.repeat_interleave(h // w.shape[2], 2) for w in groups]


def ssd_recurrent(x, dt, A, B, C, D=None):
    """`ssd` step by step: linear in time, constant in memory, and nothing to parallelise.

    Shapes are those of `ssd`; nothing is widened or checked.
    """
    B, C = per_head(x.shape[2], B, C)
    state, ys = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        state = (dt_t * A).exp()[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C_t))
    y = torch.stack(ys, 1)
    return y if D is None else y + D[:, None] * x


def ssd_matrix(dt, A, B, C):
    """The 1-semiseparable mask L times the scores C Bᵀ: what `ssd` multiplies dt·x by, (b h t t).

    L[i, j] = exp(A Σ_{j<r≤i} dt_r) for j ≤ i, else 0 (arXiv 2405.21060, section 5). dt (b t h), A (h), and B and C
    (b t h n): one for each head.
    """
    L = segments((dt * A).cumsum(1).mT).exp()
    return L * torch.einsum("bthn,bshn->bhts", C, B)


def ssd_quadratic(x, dt, A, B, C, D=None):
    """`ssd` as attention without softmax: y = (L ∘ C Bᵀ)(dt x), one t × t matrix for each head, masked by decay.

    Shapes are those of `ssd`; nothing is widened or checked.
    """
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
