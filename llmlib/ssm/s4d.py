"""S4D: a linear ODE for each channel, made discrete, run as a recurrence or as one long convolution."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Inexact
from torch import Tensor, nn

from llmlib.errors import require, require_counts, require_range
from llmlib.norm import at_least_float32, init_linears_, without_autocast
from llmlib.ssm.layers import StateSpaceMixer, held, where_valid
from llmlib.ssm.scan import require_time

Diagonal = Inexact[Tensor, "d n"]
METHODS = ("zoh", "bilinear")


def hippo_legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
    """A and B of h' = A h + B x whose state holds the Legendre coefficients of all of x so far (arXiv 2008.07669):

    A[i, j] = −√(2i+1) √(2j+1) below the diagonal, −(i+1) on it, 0 above;  B[i] = √(2i+1)
    """
    i = torch.arange(n, dtype=torch.float64)
    B = torch.sqrt(2 * i + 1)
    return -(B[:, None] * B).tril(-1) - torch.diag(i + 1), B


def s4d_lin(n: int) -> Complex[Tensor, "n"]:
    """A_k = −½ + iπk: damped Fourier modes (arXiv 2206.11893, S4D-Lin)."""
    return torch.complex(torch.full((n,), -0.5), math.pi * torch.arange(n))


def s4d_inv(n: int) -> Complex[Tensor, "n"]:
    """A_k = −½ + i (n'/π) (n'/(2k+1) − 1), n' = 2n: close to the eigenvalues of HiPPO-LegS (S4D-Inv)."""
    size = 2 * n
    return torch.complex(torch.full((n,), -0.5), size / math.pi * (size / (2 * torch.arange(n) + 1) - 1))


def s4d_real(n: int) -> Complex[Tensor, "n"]:
    """A_k = −(k + 1), which Mamba took over (S4D-Real)."""
    return torch.complex(-torch.arange(1.0, n + 1), torch.zeros(n))


INITIAL = {"lin": s4d_lin, "inv": s4d_inv, "real": s4d_real}


def discretise(
    A: Diagonal, B: Diagonal, dt: Float[Tensor, "d"], method: str = "zoh"
) -> tuple[Diagonal, Diagonal]:  # fmt: skip
    """h' = A h + B x as h_t = Ā h_{t−1} + B̄ x_t, with a step dt for each channel:

        zero-order hold (x is constant within a step):   Ā = exp(dt A),                     B̄ = (Ā − 1) / A · B
        bilinear (the trapezoidal rule):                 Ā = (1 + dt A/2) / (1 − dt A/2),   B̄ = dt / (1 − dt A/2) · B

    Both keep |Ā| < 1 where Re A < 0. A has no zero entry. They are those of S4D (arXiv 2206.11893).
    Raises ConfigError for a method that isn't known.
    """
    require(method in METHODS, f"method is {method!r}; choose one of {', '.join(METHODS)}")
    step = dt[:, None] * A
    if method == "zoh":
        return torch.exp(step), torch.expm1(step) / A * B
    return (1 + step / 2) / (1 - step / 2), dt[:, None] / (1 - step / 2) * B


def s4d_kernel(A_bar: Diagonal, B_bar: Diagonal, C: Diagonal, length: int) -> Float[Tensor, "d t"]:
    """The impulse response K[l] = Re Σ_n C_n Ā_nˡ B̄_n, l < length: a Vandermonde product (arXiv 2206.11893)."""
    return torch.einsum("dn,dnt->dt", C * B_bar, _powers(A_bar, length)).real


def _complex(dtype: torch.dtype) -> torch.dtype:
    # not dtype.to_complex(), which torch.compile can't trace
    return torch.promote_types(dtype, torch.complex64)


def _powers(A_bar: Diagonal, length: int) -> Complex[Tensor, "d n t"]:
    exponents = torch.arange(length, device=A_bar.device)
    # 0⁰ by logarithms is no number; the square of this floor still is one, as the gradient of log needs
    floor = torch.finfo(A_bar.real.dtype).tiny ** 0.5
    A_bar = torch.where(A_bar.abs() < floor, floor, A_bar)
    return torch.exp(torch.log(A_bar.to(_complex(A_bar.dtype)))[..., None] * exponents)


def s4d_convolve(x: Float[Tensor, "b t d"], kernel: Float[Tensor, "d t"]) -> Float[Tensor, "b t d"]:
    """y_t = Σ_s K[s] x_{t−s} by FFT, in t log t; padded to twice the length, so that the end doesn't wrap round.

    Raises ValueError for a text of no steps.
    """
    require_time(x)
    if not len(x):
        return x.clone()  # no FFT takes an empty batch
    t = x.shape[1]
    spectrum = torch.fft.rfft(x, 2 * t, dim=1) * torch.fft.rfft(kernel.mT, 2 * t, dim=0)
    return torch.fft.irfft(spectrum, 2 * t, dim=1)[:, :t]


def s4d_recurrent(
    x: Float[Tensor, "b t d"],
    A_bar: Diagonal,
    B_bar: Diagonal,
    C: Diagonal,
    initial_state: Complex[Tensor, "b d n"] | None = None,
) -> tuple[Float[Tensor, "b t d"], Complex[Tensor, "b d n"]]:
    """h_t = Ā h_{t−1} + B̄ x_t, y_t = Re C·h_t, step by step; also the last state.

    Raises ValueError for a text of no steps.
    """
    require_time(x)
    h = initial_state
    if h is None:
        h = A_bar.new_zeros(len(x), *A_bar.shape, dtype=_complex(A_bar.dtype))
    ys = []
    for x_t in x.unbind(1):
        h = A_bar * h + B_bar * x_t.unsqueeze(-1)
        ys.append(torch.einsum("bdn,dn->bd", h, C.to(h.dtype)).real)
    return torch.stack(ys, 1), h


class S4D(StateSpaceMixer):
    """S4D (arXiv 2206.11893): y = K * x + D x for each channel, GELU, then a gated linear map between channels.

    d_state   complex modes of a channel; each stands for itself and its conjugate
    method    "zoh" or "bilinear"
    initial   "lin", "inv" or "real": where the modes start
    dt_range  what the initial steps are spread over

    Its state: "ssm", (b, d_model, d_state) complex.
    Raises ConfigError for options out of range, ValueError for a state of another layer or batch.
    """

    state_names = ("ssm",)
    undecayed = ("log_A_real", "A_imag")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 32,
        method: str = "zoh",
        initial: str = "lin",
        dt_range: tuple[float, float] = (1e-3, 1e-1),
    ):
        super().__init__()
        require(initial in INITIAL, f"initial is {initial!r}; choose one of {', '.join(INITIAL)}")
        require(method in METHODS, f"method is {method!r}; choose one of {', '.join(METHODS)}")
        require_counts(d_state=d_state)
        require_range("dt_range", dt_range)
        self.d_state, self.method, self.initial, self.dt_range = d_state, method, initial, dt_range
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real, self.A_imag = (nn.Parameter(torch.empty(d_model, d_state)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(d_model, d_state, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """out_proj from N(0, std²); dt log-uniform over dt_range; A as `initial` says; C and D from N(0, 1)."""
        init_linears_(self, std)
        A = INITIAL[self.initial](self.d_state)
        self.log_dt.uniform_(*map(math.log, self.dt_range))
        self.log_A_real.copy_(torch.log(-A.real))
        self.A_imag.copy_(A.imag)
        nn.init.normal_(self.C, std=2**-0.5)
        nn.init.normal_(self.D)

    def discrete(self) -> tuple[Complex[Tensor, "d n"], Complex[Tensor, "d n"], Complex[Tensor, "d n"]]:
        """Ā, B̄ and C, where C is doubled for the conjugate modes and B is 1."""
        wide = at_least_float32(self.C.dtype)
        A = torch.complex(-torch.exp(self.log_A_real.to(wide)), self.A_imag.to(wide))
        A_bar, B_bar = discretise(A, torch.ones_like(A), torch.exp(self.log_dt.to(wide)), self.method)
        return A_bar, B_bar, 2 * torch.view_as_complex(self.C.to(wide).contiguous())

    def mix(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        with without_autocast(x):
            y = self._filter(x, state, valid)
        return F.glu(self.out_proj(y), -1)

    def _filter(self, x: Tensor, state: dict | None, valid: Tensor | None) -> Tensor:
        A_bar, B_bar, C = self.discrete()
        u = where_valid(x, valid).to(A_bar.real.dtype)
        h = held(state, "ssm", len(x), *A_bar.shape)
        if state is not None and x.shape[1] == 1:
            y, state["ssm"] = s4d_recurrent(u, A_bar, B_bar, C, h)
        else:
            y = s4d_convolve(u, s4d_kernel(A_bar, B_bar, C, x.shape[1]))
            if state is not None:
                y = y + self._carry(u, A_bar, B_bar, C, h, state)
        return F.gelu(y + self.D * u).to(x.dtype)

    @staticmethod
    def _carry(u, A_bar, B_bar, C, h, state):
        """What the state before these inputs adds to their outputs; leaves the state after them in `state`."""
        powers = _powers(A_bar, u.shape[1] + 1)
        state["ssm"] = B_bar * torch.einsum("btd,dnt->bdn", u.to(powers.dtype), powers[..., :-1].flip(-1))
        if h is None:
            return 0
        state["ssm"] = state["ssm"] + powers[..., -1] * h
        return torch.einsum("bdn,dnt->btd", h * C, powers[..., 1:]).real
