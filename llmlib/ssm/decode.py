"""What a state space layer does for each token: the short convolution, and one step of the recurrence."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llmlib.norm import at_least_float32
from llmlib.ops import available, op
from llmlib.ssm.scan import Recurrence, needs_triton, require_groups, require_shapes, widen


@op
def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d w"],
    bias: Float[Tensor, "d"] | None = None,
    *,
    history: Float[Tensor, "b w-1 d"] | None = None,
) -> Float[Tensor, "b t d"]:
    """A short convolution over the past, one filter for each channel, then SiLU (arXiv 2312.00752, section 3.4):

        y_t = silu(bias + Σ_i weight[:, i] x_{t−w+1+i})

    history holds the w − 1 inputs before x; without it they are zero. Raises ValueError for sizes that don't fit.
    """
    wide, t = at_least_float32(x.dtype), x.shape[1]
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0)) if history is None else torch.cat([history.to(x.dtype), x], 1)
    padded, weight = padded.to(wide), weight.to(wide)
    y = padded[:, :t] * weight[:, 0]
    if bias is not None:
        y = y + bias
    for i in range(1, weight.shape[1]):
        y = torch.addcmul(y, padded[:, i : i + t], weight[:, i])
    return F.silu(y).to(x.dtype)


@causal_conv.check
def _conv_fits(x, weight, bias=None, *, history=None):
    letters = {"x": "b t d", "weight": "d w", "bias": "d", "history": "b h d"}
    require_shapes(letters, x=x, weight=weight, bias=bias, history=history)
    if history is not None and history.shape[1] != weight.shape[1] - 1:
        raise ValueError(
            f"history has {history.shape[1]} steps, and a filter of width {weight.shape[1]} "
            f"looks back at {weight.shape[1] - 1}"
        )


def _conv_kernel_refuses(x, weight, bias=None, *, history=None) -> str | None:
    if not available("causal_conv1d"):
        return "the package causal_conv1d is not installed"
    if not x.is_cuda:
        return f"x is on the {x.device.type}, and this kernel runs on CUDA only"
    if x.dtype == torch.float64:
        return "float64 is not among its dtypes"
    if not 2 <= weight.shape[1] <= 4:
        return f"the filter has width {weight.shape[1]}, and it knows 2 to 4"
    return None if x.shape[2] % 8 == 0 else f"d is {x.shape[2]}, and it needs a multiple of 8"


@causal_conv.twin("causal-conv1d", _conv_kernel_refuses)
def _by_causal_conv1d(x, weight, bias=None, *, history=None):
    from causal_conv1d import causal_conv1d_fn

    before = None if history is None else history.to(x.dtype).contiguous().mT
    return causal_conv1d_fn(x.contiguous().mT, weight, bias, initial_states=before, activation="silu").mT


def _fla_conv_refuses(x, weight, bias=None, *, history=None) -> str | None:
    return needs_triton(x, "fla")


@causal_conv.twin("fla", _fla_conv_refuses)
def _conv_by_fla(x, weight, bias=None, *, history=None):
    from fla.modules.causal_conv1d import causal_conv1d

    # its state has a column more than it reads
    before = None if history is None else F.pad(history.to(x.dtype).mT, (1, 0)).contiguous()
    return causal_conv1d(x.contiguous(), weight.contiguous(), bias, initial_state=before, activation="silu")[0]


@Recurrence
def state_update(
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h #p"],
    A: Float[Tensor, "h #p #n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, "h #p"] | None = None,
    *,
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One step of `ssd`, where dt, A and D have a last axis of 1, or of `selective_scan`, with one head, p = d:

        S' = exp(dt A) S + dt x Bᵀ        y = S' C + D x

    Returns y, in the dtype of x, and the new state; the old one stays as it is. Its cost doesn't depend on how many
    tokens came before.
    Raises ValueError where ranks or sizes don't fit together.
    """
    state, u, dt, A, B, C, D = widen(state, x, dt, A, B, C, D)
    B, C = (w.repeat_interleave(x.shape[1] // w.shape[1], 1) if 1 < w.shape[1] < x.shape[1] else w for w in (B, C))
    state = torch.addcmul(torch.exp(dt.unsqueeze(-1) * A) * state, (dt * u).unsqueeze(-1), B.unsqueeze(2))
    y = (C.unsqueeze(2) @ state.mT).squeeze(2)
    return (y if D is None else torch.addcmul(y, D, u)).to(x.dtype), state


@state_update.check
def _update_fits(x, dt, A, B, C, D=None, *, state):
    letters = {
        "x": "b h p", "dt": "b h #p", "A": "h #p #n", "B": "b g n", "C": "b g n", "D": "h #p", "state": "b h p n"
    }  # fmt: skip
    require_shapes(letters, x=x, B=B, C=C, state=state, dt=dt, A=A, D=D)
    require_groups(x.shape[1], B.shape[1])


def _update_refuses(x, dt, A, B, C, D=None, *, state) -> str | None:
    if reason := needs_triton(x, "mamba_ssm"):
        return reason
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (state, x, dt, A, B, C, D)):
        return "it has no backward, and gradients are wanted"
    return None


@state_update.twin("mamba-ssm", _update_refuses)
def _by_selective_state_update(x, dt, A, B, C, D=None, *, state):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    state, dt, A = state.clone(), dt.expand_as(x), A.expand(state.shape[1:])
    D = torch.zeros_like(x[0]) if D is None else D.expand_as(x[0])
    y = selective_state_update(state, x, dt, A, B, C, D, dt_bias=torch.zeros_like(D))
    return y, state
