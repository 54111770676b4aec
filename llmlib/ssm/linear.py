"""Linear attention and its relatives: matrices S_t = S_{t−1} M_t + v_t k_tᵀ that are read by a query.

What separates the members is M_t: nothing, a decay, an erasure, or both. `FAMILY` is the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.errors import require, require_counts, require_range
from llmlib.norm import at_least_float32, init_linears_
from llmlib.ssm.duality import FORGOTTEN, chunked_recurrence, chunks, segments
from llmlib.ssm.layers import (
    GatedRMSNorm,
    ShortConv,
    StateSpaceMixer,
    held,
    initial_dt_bias,
    where_valid,
)
from llmlib.ssm.scan import Recurrence, needs_triton, require_shapes, require_time, widen


def matrix_recurrence(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h e"],
    decay: Float[Tensor, "b t h #d"] | None = None,
    a: Float[Tensor, "b t h d"] | None = None,
    b: Float[Tensor, "b t h d"] | None = None,
    *,
    initial_state: Float[Tensor, "b h e d"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "b t h e"] | tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h e d"]]:
    """The whole family, step by step:

        S_t = S_{t−1} (diag(decay_t) + a_t b_tᵀ) + v_t k_tᵀ        y_t = S_t q_t

    decay, which is the same for a whole head or one number for each channel of the key, None is 1; a and b None are 0.
    Sums stay in the type of the inputs. `FAMILY` says which paper has which terms.
    """
    S = v.new_zeros(*v.shape[:1], *v.shape[2:], k.shape[-1]) if initial_state is None else initial_state
    ys = []
    for t in range(q.shape[1]):
        kept = S if decay is None else S * decay[:, t].unsqueeze(-2)
        if a is not None:
            kept = kept + torch.einsum("bhed,bhd,bhc->bhec", S, a[:, t], b[:, t])
        S = kept + torch.einsum("bhe,bhd->bhed", v[:, t], k[:, t])
        ys.append(torch.einsum("bhed,bhd->bhe", S, q[:, t]))
    y = torch.stack(ys, 1)
    return (y, S) if return_state else y


@dataclass(frozen=True)
class Member:
    """One line of the table: what a model's decay and erasure are, in the terms of `matrix_recurrence`.

    decay   what M_t's diagonal is: 1, one number for a head that is fixed or follows the token, or one per channel
    erase   what M_t takes away besides: nothing, or a direction
    terms   (k, v, gate, beta) → the keywords k, v, decay, a, b; gate is in (0, 1), (b t h) or (b t h d), beta (b t h)
    """

    name: str
    paper: str
    update: str
    decay: str
    erase: str
    terms: Callable[..., dict]


def _delta(k, v, gate, beta) -> dict:
    """Erase what stands under the key, write beta of the new value; `gate` decays all the rest first."""
    beta, decay = beta.unsqueeze(-1), gate if gate.ndim == 4 else gate.unsqueeze(-1)
    return {"k": k, "v": beta * v, "decay": decay, "a": -beta * decay * k, "b": k}


def _rwkv7(k, v, gate, beta) -> dict:
    """RWKV-7 with the erased direction on the unit sphere and one learning rate for each head."""
    unit = F.normalize(k, dim=-1)
    return {"k": k, "v": v, "decay": gate, "a": -unit, "b": beta.unsqueeze(-1) * unit}


FAMILY = (
    Member("linear attention", "2006.16236", "S + v kᵀ", "1", "—", lambda k, v, gate, beta: {"k": k, "v": v}),
    Member(
        "RetNet", "2307.08621", "γ S + v kᵀ", "fixed, per head", "—",
        lambda k, v, gate, beta: {"k": k, "v": v, "decay": gate.unsqueeze(-1)},
    ),
    Member(
        "Mamba-2", "2405.21060", "α_t S + dt_t x Bᵀ", "per head", "—",
        lambda k, v, gate, beta: {"k": k, "v": beta.unsqueeze(-1) * v, "decay": gate.unsqueeze(-1)},
    ),
    Member(
        "GLA", "2312.06635", "S diag(α_t) + v kᵀ", "per channel", "—",
        lambda k, v, gate, beta: {"k": k, "v": v, "decay": gate},
    ),
    Member(
        "DeltaNet", "2406.06484", "S (I − β k kᵀ) + β v kᵀ", "1", "β k kᵀ",
        lambda k, v, gate, beta: _delta(k, v, torch.ones_like(beta), beta),
    ),
    Member("Gated DeltaNet", "2412.06464", "α_t S (I − β k kᵀ) + β v kᵀ", "per head", "β k kᵀ", _delta),
    Member("KDA", "2510.26692", "S diag(α_t) (I − β k kᵀ) + β v kᵀ", "per channel", "β k kᵀ", _delta),
    Member("RWKV-7", "2503.14456", "S (diag(w_t) − κ (a ∘ κ)ᵀ) + v kᵀ", "per channel", "κ (a ∘ κ)ᵀ", _rwkv7),
)  # fmt: skip


def linear_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h e"],
    log_decay: Float[Tensor, "b t h"] | None = None,
    *,
    chunk_size: int = 64,
    initial_state: Float[Tensor, "b h e d"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "b t h e"] | tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h e d"]]:
    """S_t = exp(log_decay_t) S_{t−1} + v_t k_tᵀ, y_t = S_t q_t, in chunks: `ssd` with q = C, k = B, v = dt x.

    Without a decay: linear attention (arXiv 2006.16236); with one that is fixed: RetNet (arXiv 2307.08621).
    Feature maps and normalisation are the caller's. States are float32 or better; y has the dtype of v.
    Raises ValueError where ranks or sizes don't fit together, ConfigError where chunk_size is below 1.
    """
    letters = {"q": "b t h d", "k": "b t h d", "v": "b t h e", "log_decay": "b t h", "initial_state": "b h e d"}
    require_shapes(letters, q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    require_time(q)
    require_counts(chunk_size=chunk_size)
    *qkv, log_decay = widen(q, k, v, log_decay)
    log_decay = qkv[2].new_zeros(v.shape[:3]) if log_decay is None else log_decay
    y, state = chunked_recurrence(
        *(w.unsqueeze(3) for w in qkv), log_decay, chunk_size=chunk_size, state=initial_state
    )  # fmt: skip
    y = y.squeeze(3).to(v.dtype)
    return (y, state) if return_state else y


def linear_attention_quadratic(q, k, v, log_decay=None):
    """`linear_attention` as one matrix: (L ∘ q kᵀ) v, L[i, j] = exp(Σ_{j<s≤i} log_decay_s) for j ≤ i, else 0.

    Shapes are those of `linear_attention`; nothing is widened or checked.
    """
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    since = v.new_zeros(v.shape[:3]) if log_decay is None else log_decay.cumsum(1)
    return torch.einsum("bhts,bshe->bthe", segments(since.mT).exp() * scores, v)


@Recurrence
def gated_delta_rule(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t h d"],
    v: Float[Tensor, "b t h e"],
    beta: Float[Tensor, "b t h"],
    log_decay: Float[Tensor, "b t h"],
    *,
    chunk_size: int = 64,
    initial_state: Float[Tensor, "b h e d"] | None = None,
    return_state: bool = False,
) -> Float[Tensor, "b t h e"] | tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h e d"]]:
    """Gated DeltaNet's recurrence, in chunks (arXiv 2412.06464; the chunks are those of arXiv 2406.06484):

        S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ        y_t = S_t q_t        α_t = exp(log_decay_t)

    It is decayed linear attention over u_t = β_t (v_t − α_t S_{t−1} k_t), what is new in v_t. Inside a chunk the u
    solve a triangular system, U = T⁻¹ (β v − β γ k S₀ᵀ), T = I + tril(β_i (γ_i / γ_j) k_i·k_j, −1), with
    γ_i = exp(Σ_{s≤i} log_decay_s).
    Keys should have length 1, and beta lies in (0, 1), or (0, 2) for eigenvalues down to −1 (arXiv 2411.12537).
    log_decay ≤ 0; zeros give DeltaNet, and what lies below −100 counts as −100. States are float32 or better; y has
    the dtype of v.
    Raises ValueError where ranks or sizes don't fit together, ConfigError where chunk_size is below 1.
    """
    y_dtype, t = v.dtype, v.shape[1]
    q, k, v, beta, log_decay, S = widen(q, k, v, beta, log_decay, initial_state)
    size = min(chunk_size, t)
    q, k, v = (rearrange(chunks(w, size), "b z c h d -> b z h c d") for w in (q, k, v))
    beta, since = (rearrange(chunks(w, size), "b z c h -> b z h c") for w in (beta, log_decay.clamp(min=FORGOTTEN)))
    since = since.cumsum(-1)
    L, gamma, until = segments(since).exp(), since.exp().unsqueeze(-1), (since[..., -1:] - since).exp().unsqueeze(-1)
    T = (beta.unsqueeze(-1) * L * (k @ k.mT)).tril(-1)
    rows = beta.unsqueeze(-1) * torch.cat([v, gamma * k], -1)
    # unitriangular: the ones on T's diagonal are implied
    new, read = torch.linalg.solve_triangular(T, rows, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    if S is None:
        S = v.new_zeros(*v.shape[:1], v.shape[2], v.shape[-1], k.shape[-1])
    ys = []
    parts = (q * gamma, L * (q @ k.mT), new, read, k * until, gamma[..., -1:, :])
    for q_z, scores, new_z, read_z, k_z, decay in zip(*(w.unbind(1) for w in parts), strict=True):
        u = new_z - read_z @ S.mT
        ys.append(q_z @ S.mT + scores @ u)
        S = decay * S + u.mT @ k_z
    y = rearrange(torch.stack(ys, 1), "b z h c e -> b (z c) h e")[:, :t].to(y_dtype)
    return (y, S) if return_state else y


@gated_delta_rule.check
def _fits(q, k, v, beta, log_decay, *, chunk_size=64, initial_state=None, return_state=False):
    letters = {
        "q": "b t h d", "k": "b t h d", "v": "b t h e", "beta": "b t h", "log_decay": "b t h",
        "initial_state": "b h e d",
    }  # fmt: skip
    require_shapes(letters, q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)
    require_time(q)
    require_counts(chunk_size=chunk_size)


def gated_delta_recurrent(q, k, v, beta, log_decay):
    """`gated_delta_rule` step by step, by `matrix_recurrence`. Shapes are the same; nothing is widened or checked."""
    return matrix_recurrence(q, **_delta(k, v, log_decay.exp(), beta))


def _fla_refuses(q, *args, **options) -> str | None:
    return needs_triton(q, "fla")


@gated_delta_rule.twin("fla", _fla_refuses)
def _by_fla(q, k, v, beta, log_decay, *, chunk_size=64, initial_state=None, return_state=False):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    before = None if initial_state is None else initial_state.mT.float().contiguous()
    y, state = chunk_gated_delta_rule(
        q, k.to(q.dtype), v.to(q.dtype), log_decay.float(), beta.to(q.dtype), scale=1.0, initial_state=before,
        output_final_state=return_state,
    )  # fmt: skip
    return (y.to(v.dtype), state.mT) if return_state else y.to(v.dtype)


class LinearAttention(StateSpaceMixer):
    """Multi-head linear attention: a feature map φ in place of the softmax, and a matrix in place of the cache.

    y_t = S_t φ(q_t) / (z_t · φ(q_t)), S_t = γ S_{t−1} + v_t φ(k_t)ᵀ, z_t = γ z_{t−1} + φ(k_t), φ(x) = elu(x) + 1
    (arXiv 2006.16236).

    decay  False: γ = 1. True: RetNet's fixed γ = 1 − 2^(−5−i) for head i (arXiv 2307.08621)

    Its state: "ssm", (b, num_heads, head_dim + 1, head_dim): z is one more row of S, for a value that is always 1.
    Raises ConfigError for sizes that don't fit together, ValueError for a state of another layer or batch.
    """

    state_names = ("ssm",)

    def __init__(self, d_model: int, *, num_heads: int, decay: bool = False, chunk_size: int = 64):
        super().__init__()
        require_counts(num_heads=num_heads, chunk_size=chunk_size)
        require(
            d_model % num_heads == 0,
            f"d_model must be a multiple of num_heads, and {d_model} is not a multiple of {num_heads}",
        )
        self.num_heads, self.chunk_size = num_heads, chunk_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        rates = torch.log1p(-(2.0 ** (-5 - torch.arange(num_heads)))) if decay else torch.zeros(num_heads)
        self.register_buffer("log_decay", rates, persistent=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²)."""
        init_linears_(self, std)

    def mix(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = F.elu(q) + 1, where_valid(F.elu(k) + 1, valid)
        # wide, for the sum z · φ(q) of a long text is beyond float16
        v = F.pad(where_valid(widen(v)[0], valid), (0, 1), value=1.0)
        log_decay = where_valid(self.log_decay.expand(*x.shape[:2], -1), valid)
        S = held(state, "ssm", len(x), self.num_heads, v.shape[-1], k.shape[-1])
        y, S = linear_attention(
            q, k, v, log_decay, chunk_size=self.chunk_size, initial_state=S, return_state=True
        )  # fmt: skip
        if state is not None:
            state["ssm"] = S
        y = y[..., :-1] / y[..., -1:].clamp(min=1e-6)
        return self.o_proj(y.flatten(2).to(k.dtype))


def _unit(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """x / √(Σ x² + ε): the ε inside the root keeps the gradient of small keys bounded."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class GatedDeltaNet(StateSpaceMixer):
    """Gated DeltaNet (arXiv 2412.06464), as Qwen3-Next builds it: short convolution over q, k and v, keys and queries
    of length 1, `gated_delta_rule`, a norm for each head, a gate.

    num_heads, head_dim      heads of queries and keys, and their width
    num_v_heads, v_head_dim  heads of values, a multiple of num_heads, and their width; None: as the keys
    negative                 beta in (0, 2) rather than (0, 1), so that the state can change sign (arXiv 2411.12537)
    dt_range, A_range        what the initial steps and −A are spread over; the decay is exp(A softplus(a + dt_bias))

    Its state: "conv", the last d_conv − 1 inputs of the convolution, and "ssm", (b, num_v_heads, v_head_dim, head_dim).
    Raises ConfigError for sizes that don't fit together, ValueError for a state of another layer or batch.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        head_dim: int,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        d_conv: int = 4,
        chunk_size: int = 64,
        negative: bool = False,
        norm_eps: float = 1e-6,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        A_range: tuple[float, float] = (1, 16),
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        require_counts(
            num_heads=num_heads, head_dim=head_dim, num_v_heads=self.num_v_heads, v_head_dim=self.v_head_dim,
            chunk_size=chunk_size,
        )  # fmt: skip
        require_range("dt_range", dt_range)
        require_range("A_range", A_range, above_0=False)
        require(
            self.num_v_heads % num_heads == 0,
            f"num_v_heads must be a multiple of num_heads, and {self.num_v_heads} is not a multiple of {num_heads}",
        )
        self.chunk_size, self.negative, self.dt_range, self.A_range = chunk_size, negative, dt_range, A_range
        keys, values = num_heads * head_dim, self.num_v_heads * self.v_head_dim
        self.widths = [2 * keys + values, values, self.num_v_heads, self.num_v_heads]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv1d = ShortConv(self.widths[0], d_conv, bias=False)
        self.dt_bias, self.A_log = (nn.Parameter(torch.empty(self.num_v_heads)) for _ in range(2))
        self.norm = GatedRMSNorm(self.v_head_dim, eps=norm_eps, before_gate=True)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²); −A uniform over A_range, softplus(dt_bias) log-uniform over dt_range."""
        init_linears_(self, std)
        self.dt_bias.copy_(initial_dt_bias(self.num_v_heads, dt_range=self.dt_range))
        self.A_log.uniform_(*self.A_range).log_()

    def mix(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        x, z, beta, dt = self.in_proj(x).split(self.widths, -1)
        x = self.conv1d(where_valid(x, valid), state)
        keys = self.num_heads * self.head_dim
        q, k, v = x.split([keys, keys, self.widths[1]], -1)
        q, k = (_unit(w.unflatten(-1, (self.num_heads, -1)).to(at_least_float32(w.dtype))) for w in (q, k))
        repeats = self.num_v_heads // self.num_heads
        q, k = (w.to(v.dtype).repeat_interleave(repeats, 2) for w in (q * self.head_dim**-0.5, k))
        v, z = (w.unflatten(-1, (self.num_v_heads, -1)) for w in (v, z))
        beta = where_valid(torch.sigmoid(beta) * (2 if self.negative else 1), valid)
        dt = F.softplus(dt.to(at_least_float32(dt.dtype)) + self.dt_bias)
        log_decay = where_valid(-torch.exp(self.A_log.to(dt.dtype)) * dt, valid)
        S = held(state, "ssm", len(x), self.num_v_heads, self.v_head_dim, self.head_dim)
        y = gated_delta_rule(
            q, k, v, beta, log_decay, chunk_size=self.chunk_size, initial_state=S, return_state=state is not None
        )  # fmt: skip
        if state is not None:
            y, state["ssm"] = y
        return self.out_proj(self.norm(y, z).flatten(2))
