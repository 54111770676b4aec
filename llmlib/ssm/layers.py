"""The layers of Mamba and Mamba-2: projections, short convolution, recurrence, gate."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llmlib.context import Context
from llmlib.errors import require, require_counts, require_positive, require_range, require_state
from llmlib.norm import at_least_float32, init_linears_, rms_norm
from llmlib.ssm.decode import causal_conv, state_update
from llmlib.ssm.duality import ssd
from llmlib.ssm.scan import selective_scan

DT_FLOOR = 1e-4  # the smallest initial step, in every Mamba


class StateSpaceMixer(nn.Module):
    """What mixers with a state of constant size share: state dict, padding, and documents that don't see each other.

    A subclass defines `mix(x, state, valid)`: with a dict it starts from what the dict holds, and leaves there what
    the next piece of the same text starts from, under `state_names`. Every entry has the batch as its first axis.
    """

    state_names: tuple[str, ...] = ("conv", "ssm")

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        t = x.shape[1]
        require_state(state, self.state_names, type(self).__name__)
        valid = None if context is None or context.valid is None else context.valid[:, -t:]
        begins = None if context is None or context.documents is None else _document_begins(context.documents, t)
        if begins is None or not begins.any():
            return self.mix(x, state, valid)
        state, ys = {} if state is None else state, []
        cuts = sorted({0, *begins.any(0).nonzero().flatten().tolist()})
        for start, end in zip(cuts, [*cuts[1:], t], strict=True):
            forgets = begins[:, start]
            for name, kept in state.items():
                if isinstance(kept, Tensor):
                    state[name] = torch.where(forgets.view(-1, *[1] * (kept.ndim - 1)), 0, kept)
            ys.append(self.mix(x[:, start:end], state, None if valid is None else valid[:, start:end]))
        return torch.cat(ys, 1)

    def mix(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        raise NotImplementedError


def _document_begins(documents: Tensor, t: int) -> Bool[Tensor, "b t"]:
    """Where each of the last t tokens is the first of its document, as far as the text before it is known."""
    changes = documents[:, 1:] != documents[:, :-1]
    return F.pad(changes, (1, 0))[:, -t:]


def where_valid(x: Tensor, valid: Bool[Tensor, "b t"] | None) -> Tensor:
    """x, and 0 on padding."""
    return x if valid is None else torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 2)), x, 0)


def held(state: dict | None, name: str, *shape: int) -> Tensor | None:
    """`state[name]`, or None before the first token. A shape other than expected belongs to another layer or batch."""
    tensor = None if state is None else state.get(name)
    if tensor is not None and tensor.shape != shape:
        raise ValueError(
            f"state[{name!r}] has shape {tuple(tensor.shape)}, and this layer with this batch needs {shape}: "
            f"is it the state of another layer or another batch?"
        )
    return tensor


class ShortConv(nn.Conv1d):
    """`causal_conv` with its weights, shaped and initialised as PyTorch's Conv1d, and its history kept in a state."""

    def __init__(self, dim: int, width: int, bias: bool = True):
        require_counts(d_conv=width)
        super().__init__(dim, dim, width, groups=dim, bias=bias)

    def forward(self, x: Float[Tensor, "b t d"], state: dict | None) -> Float[Tensor, "b t d"]:
        back = self.kernel_size[0] - 1
        history = held(state, "conv", x.shape[0], back, x.shape[2])
        y = causal_conv(x, self.weight.squeeze(1), self.bias, history=history)
        if state is not None:
            seen = F.pad(x, (0, 0, max(0, back - x.shape[1]), 0)) if history is None else torch.cat([history, x], 1)
            state["conv"] = seen[:, seen.shape[1] - back :].clone()
        return y


class GatedRMSNorm(nn.Module):
    """rms_norm(x · silu(z)) · w, with a separate mean square in each of `groups` equal parts (arXiv 2405.21060, 7.1).

    before_gate  rms_norm(x) · w · silu(z) instead
    Raises ConfigError where groups doesn't divide dim.
    """

    def __init__(self, dim: int, groups: int = 1, *, eps: float = 1e-5, before_gate: bool = False):
        super().__init__()
        require(dim % groups == 0, f"a norm over {dim} channels can't have {groups} groups: {groups} must divide {dim}")
        self.groups, self.eps, self.before_gate = groups, eps, before_gate
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*b d"], z: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        wide = x.to(at_least_float32(x.dtype))
        gate = F.silu(z.to(wide.dtype))
        y = wide if self.before_gate else wide * gate
        y = rms_norm(y.unflatten(-1, (self.groups, -1)), eps=self.eps).flatten(-2) * self.weight
        return (y * gate if self.before_gate else y).to(x.dtype)


def initial_dt_bias(*shape: int, dt_range: tuple[float, float]) -> Tensor:
    """A bias whose softplus is spread log-uniformly over dt_range (arXiv 2312.00752, section 3.6)."""
    low, high = map(math.log, dt_range)
    dt = torch.exp(torch.rand(*shape) * (high - low) + low).clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))


def require_heads(
    d_model: int, expand: float | None, num_heads: int | None, head_dim: int, n_groups: int, chunk_size: int
) -> int:
    """The number of heads, once the sizes of a layer with heads are known to fit together."""
    require_counts(head_dim=head_dim, n_groups=n_groups, chunk_size=chunk_size)
    require_positive(expand=expand)
    if num_heads is None:
        require(expand is not None, "num_heads and expand are both None: give one, or both")
        num_heads = max(1, round(d_model * expand) // head_dim)
    require_counts(num_heads=num_heads)
    require(
        expand is None or math.isclose(d_model * expand, num_heads * head_dim),
        f"d_model · expand must equal num_heads · head_dim, but {d_model} · {expand} = {d_model * (expand or 0):g} "
        f"and {num_heads} · {head_dim} = {num_heads * head_dim}; change one of them, or pass expand=None for an inner "
        f"width of num_heads · head_dim",
    )
    require(
        num_heads % n_groups == 0,
        f"num_heads must be a multiple of n_groups, and {num_heads} is not a multiple of {n_groups}",
    )
    return num_heads


class Mamba(StateSpaceMixer):
    """Mamba-1 (arXiv 2312.00752): (x, z) = in_proj(u), x = conv(x), y = selective_scan(x), out_proj(y · silu(z)).

    d_state      numbers kept for each of the d_model · expand channels
    d_conv       width of the short convolution
    dt_rank      rank of the map that gives each channel its step; None means ⌈d_model / 16⌉
    inner_norm   a norm, such as spec(RMSNorm), on each of dt (before its projection), B and C (Jamba, Falcon-Mamba)
    bias, conv_bias  biases of in_proj and out_proj, and of the convolution
    dt_range     what the initial steps are spread over

    Its state: "conv", the last d_conv − 1 inputs of the convolution, and "ssm", (b, d_model · expand, d_state).
    Raises ConfigError for sizes that don't fit together, ValueError for a state of another layer or batch.
    """

    undecayed = ("A_log",)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        inner_norm: Callable | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        require_positive(expand=expand)
        width = round(d_model * expand)
        require(
            width >= 1 and math.isclose(width, d_model * expand),
            f"d_model · expand must be whole and at least 1, but {d_model} · {expand} is not",
        )
        self.d_state, self.dt_rank = d_state, math.ceil(d_model / 16) if dt_rank is None else dt_rank
        require_counts(d_state=d_state, dt_rank=self.dt_rank)
        require_range("dt_range", dt_range)
        self.in_proj = nn.Linear(d_model, 2 * width, bias=bias)
        self.conv1d = ShortConv(width, d_conv, conv_bias)
        self.x_proj = nn.Linear(width, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, width)
        self.A_log = nn.Parameter(torch.empty(width, d_state))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        self.dt_norm, self.B_norm, self.C_norm = (
            inner_norm and inner_norm(size) for size in (self.dt_rank, d_state, d_state)
        )
        self.dt_range = dt_range
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), except what decides the time scales: A = −1, −2 … −d_state (S4D-real), and dt."""
        init_linears_(self, std)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias.copy_(initial_dt_bias(len(self.dt_proj.bias), dt_range=self.dt_range))
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
        nn.init.ones_(self.D)

    def mix(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.conv1d(where_valid(x, valid), state)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        if self.dt_norm is not None:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = F.linear(dt, self.dt_proj.weight).to(at_least_float32(dt.dtype)) + self.dt_proj.bias
        dt = where_valid(F.softplus(dt), valid)
        y = self._scan(x, dt, -torch.exp(self.A_log.to(dt.dtype)), B, C, state)
        return self.out_proj(y * F.silu(z))

    def _scan(self, x, dt, A, B, C, state):
        h = held(state, "ssm", x.shape[0], *A.shape)
        if state is None:
            return selective_scan(x, dt, A, B, C, self.D)
        if x.shape[1] == 1 and h is not None:
            y, h = state_update(x, dt, A.unsqueeze(0), B, C, self.D.unsqueeze(0), state=h.unsqueeze(1))
            state["ssm"] = h.squeeze(1)
            return y
        y, state["ssm"] = selective_scan(x, dt, A, B, C, self.D, initial_state=h, return_state=True)
        return y


class Mamba2(StateSpaceMixer):
    """Mamba-2 (arXiv 2405.21060): one in_proj gives z, x, B, C and dt; conv over x, B, C; ssd; gated norm; out_proj.

    num_heads, head_dim, expand  d_model · expand = num_heads · head_dim; expand=None takes the width of the heads
    d_state      the state of a head is head_dim × d_state
    n_groups     how many sets of B and C the heads share; the gated norm has one mean square for each
    chunk_size   length of the chunks of `ssd`: it changes the speed, never the result
    gated_norm   False multiplies by silu(z) without a norm; norm_before_gate puts the norm before the gate
    bias, conv_bias  biases of in_proj and out_proj, and of the convolution
    dt_limit     dt is clamped to this range after softplus
    A_range, dt_range  what the initial −A and dt are spread over
    part_scales  fixed factors on z, x, B, C and dt, as in_proj gives them (Falcon-H1); None is 1 for all

    Its state: "conv", the last d_conv − 1 inputs of the convolution, and "ssm", (b, num_heads, head_dim, d_state).
    Raises ConfigError for sizes that don't fit together, ValueError for a state of another layer or batch.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        head_dim: int = 64,
        d_state: int = 128,
        n_groups: int = 1,
        chunk_size: int = 64,
        d_conv: int = 4,
        expand: float | None = 2,
        gated_norm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        A_range: tuple[float, float] = (1, 16),
        part_scales: tuple[float, float, float, float, float] | None = None,
    ):
        super().__init__()
        num_heads = require_heads(d_model, expand, num_heads, head_dim, n_groups, chunk_size)
        require_counts(d_state=d_state)
        require_range("dt_range", dt_range)
        require_range("A_range", A_range, above_0=False)
        require_range("dt_limit", dt_limit, above_0=False)
        require(
            part_scales is None or len(part_scales) == 5,
            f"part_scales has {part_scales and len(part_scales)} factors: give 5, for z, x, B, C and dt, or None",
        )
        width = num_heads * head_dim
        self.num_heads, self.head_dim, self.d_state, self.n_groups = num_heads, head_dim, d_state, n_groups
        self.chunk_size, self.dt_limit, self.dt_range, self.A_range = chunk_size, dt_limit, dt_range, A_range
        self.widths, self.part_scales = [width, width + 2 * n_groups * d_state, num_heads], part_scales
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias)
        self.conv1d = ShortConv(self.widths[1], d_conv, conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(num_heads)) for _ in range(3))
        self.norm = GatedRMSNorm(width, n_groups, eps=norm_eps, before_gate=norm_before_gate) if gated_norm else None
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²); −A uniform over A_range, softplus(dt_bias) log-uniform over dt_range, D = 1."""
        init_linears_(self, std)
        self.dt_bias.copy_(initial_dt_bias(self.num_heads, dt_range=self.dt_range))
        self.A_log.uniform_(*self.A_range).log_()
        nn.init.ones_(self.D)

    def mix(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        z, x, dt = self._parts(self.in_proj(x))
        x = self.conv1d(where_valid(x, valid), state)
        shared = self.n_groups * self.d_state
        x, B, C = x.split([self.widths[0], shared, shared], -1)
        dt = F.softplus(dt.to(at_least_float32(dt.dtype)) + self.dt_bias)
        if self.dt_limit != (0.0, math.inf):
            dt = dt.clamp(*self.dt_limit)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (w.unflatten(-1, (self.n_groups, self.d_state)) for w in (B, C))
        y = self._scan(x, where_valid(dt, valid), -torch.exp(self.A_log.to(dt.dtype)), B, C, state).flatten(2)
        return self.out_proj(y * F.silu(z) if self.norm is None else self.norm(y, z))

    def _parts(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z, the input of the convolution, and dt."""
        if self.part_scales is not None:
            width, shared = self.widths[0], self.n_groups * self.d_state
            parts = projected.split([width, width, shared, shared, self.num_heads], -1)
            projected = torch.cat([scale * part for scale, part in zip(self.part_scales, parts, strict=True)], -1)
        return projected.split(self.widths, -1)

    def _scan(self, x, dt, A, B, C, state):
        h = held(state, "ssm", x.shape[0], self.num_heads, self.head_dim, self.d_state)
        if state is None:
            return ssd(x, dt, A, B, C, self.D, chunk_size=self.chunk_size)
        if x.shape[1] == 1 and h is not None:
            dt, A, D = dt[:, 0].unsqueeze(-1), A.view(-1, 1, 1), self.D.unsqueeze(-1)
            y, state["ssm"] = state_update(x[:, 0], dt, A, B[:, 0], C[:, 0], D, state=h)
            return y.unsqueeze(1)
        y, state["ssm"] = ssd(
            x, dt, A, B, C, self.D, chunk_size=self.chunk_size, initial_state=h, return_state=True
        )  # fmt: skip
        return y
