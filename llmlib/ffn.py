"""Feed-forward: the plain two-layer kind, the gated kind, and rules for their width."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.errors import require, require_counts, require_positive
from llmlib.norm import init_linears_
from llmlib.ops import available, op


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)². So et al., "Primer: Searching for Efficient Transformers for Language Modeling", arXiv:2109.08668."""
    return F.relu(x).square()


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ the distribution function of the standard normal: Hendrycks and Gimpel, "Gaussian Error Linear Units",
    arXiv:1606.08415."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))): the approximation that GPT-2 was trained with.
    Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the coarser approximation of GELU in Hendrycks and Gimpel, "Gaussian Error Linear Units",
    arXiv:1606.08415."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": relu2,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


@op
def glu(gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"], activation: str = "silu") -> Float[Tensor, "*b f"]:
    """activation(gate) ⊙ up: SwiGLU with "silu", GeGLU with "gelu", ReGLU with "relu", GLU with "sigmoid".

    Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202.
    """
    return ACTIVATIONS[activation](gate) * up


def _in_place_why_not(gate, up, activation="silu") -> str | None:
    if gate.device.type != "cpu" or torch.compiler.is_compiling():
        return "it saves a CPU from fetching new memory, and a GPU or a compiler has better ways"
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return "the backward needs what it would overwrite"
    return None if gate.dtype is up.dtype else f"the gate is {gate.dtype}, and up {up.dtype}"


@glu.twin("in-place", _in_place_why_not, measured="two CPU cores, see benchmarks/checkpoints.py")
def _in_place(gate, up, activation="silu"):
    return ACTIVATIONS[activation](gate).mul_(up)


def _recompute_why_not(gate, up, activation="silu") -> str | None:
    return None if activation == "silu" else f"its gradient is written for silu, not for {activation}"


@glu.twin("recompute", _recompute_why_not, auto=False)
def _recomputed(gate, up, activation="silu"):
    return RecomputedSwiGLU.apply(gate, up)


class RecomputedSwiGLU(torch.autograd.Function):
    """silu(g) ⊙ u that keeps g and u for the backward and makes silu(g) again: two tensors in place of three."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        """silu(g) = g σ(g), so d silu/dg = σ (1 + g (1 − σ))."""
        gate, up = ctx.saved_tensors
        sigma = torch.sigmoid(gate)
        return dy * up * sigma * (1 + gate * (1 - sigma)), dy * gate * sigma


def _liger_why_not(gate, up, activation="silu") -> str | None:
    if not gate.is_cuda:
        return "it is a GPU kernel, and the input is on the " + gate.device.type.upper()
    if activation not in ("silu", "gelu_tanh"):
        return f"it has silu and gelu_tanh, not {activation}"
    return None if available("liger_kernel") else "liger-kernel is not installed: pip install liger-kernel"


@glu.twin("liger", _liger_why_not)
def _liger_glu(gate, up, activation="silu"):
    if activation == "silu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Fused
    else:
        from liger_kernel.ops.geglu import LigerGELUMulFunction as Fused
    return Fused.apply(gate, up)


@op
def clamped_swiglu(
    gate: Float[Tensor, "*b f"], up: Float[Tensor, "*b f"], alpha: float = 1.702, limit: float = 7.0
) -> Float[Tensor, "*b f"]:
    """g σ(α g) ⊙ (u + 1), with g = min(gate, limit) and u = up held within ± limit.

    The feed-forward of gpt-oss, arXiv:2508.10925.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def glu_width(d_model: int, *, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Llama's width of a GLU: ⌊8/3 d_model⌋ · multiplier, rounded up to a multiple of `multiple_of`.

    Three matrices of width 8/3 d hold as many numbers as two of width 4 d: 3 · (8/3) = 2 · 4. ConfigError for sizes
    below 1. Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971.
    """
    require_counts(d_model=d_model, multiple_of=multiple_of)
    require_positive(multiplier=multiplier)
    width = int(multiplier * (8 * d_model // 3))
    return multiple_of * -(-width // multiple_of)


class MLP(nn.Module):
    """down_proj(activation(up_proj(x))): the feed-forward of 2017, with d_ff = 4 d_model there.

    activation  one of `ACTIVATIONS`; bias  both maps have one

    ConfigError for another activation, and d_ff below 1. Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.
    """

    def __init__(self, d_model: int, *, d_ff: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        require(activation in ACTIVATIONS, f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        require_counts(d_ff=d_ff)
        self.activation = activation
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        init_linears_(self, std)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))


class GLU(nn.Module):
    """down_proj(activation(gate_proj(x)) ⊙ up_proj(x)): one map opens and closes the other (arXiv:2002.05202).

    Three matrices where the plain kind has two, so equal parameters need ⅔ of its width: see `glu_width`.
    ConfigError for an activation that isn't one of `ACTIVATIONS`, and d_ff below 1.
    """

    def __init__(self, d_model: int, *, d_ff: int, activation: str = "sigmoid", bias: bool = False):
        super().__init__()
        require(activation in ACTIVATIONS, f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        require_counts(d_ff=d_ff)
        self.activation = activation
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        init_linears_(self, std)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.activation))


class SwiGLU(GLU):
    """GLU with SiLU, the feed-forward of Llama (arXiv:2002.05202)."""

    def __init__(self, d_model: int, *, d_ff: int, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, activation="silu", bias=bias)


class GeGLU(GLU):
    """GLU with GELU, exact unless `tanh` (Gemma has the tanh form); arXiv:2002.05202."""

    def __init__(self, d_model: int, *, d_ff: int, tanh: bool = False, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, activation="gelu_tanh" if tanh else "gelu", bias=bias)


class ReGLU(GLU):
    """GLU with ReLU; arXiv:2002.05202."""

    def __init__(self, d_model: int, *, d_ff: int, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, activation="relu", bias=bias)


class ClampedSwiGLU(GLU):
    """The GLU of gpt-oss: see `clamped_swiglu`. ConfigError for a limit that isn't above 0; arXiv:2508.10925."""

    def __init__(self, d_model: int, *, d_ff: int, alpha: float = 1.702, limit: float = 7.0, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, activation="silu", bias=bias)
        require_positive(limit=limit)
        self.alpha, self.limit = alpha, limit

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.down_proj(clamped_swiglu(self.gate_proj(x), self.up_proj(x), self.alpha, self.limit))


class ScaledSwiGLU(SwiGLU):
    """output_scale · down_proj(silu(gate_scale · gate_proj(x)) ⊙ up_proj(x)): muP's factors in Falcon-H1
    (arXiv:2507.22448)."""

    def __init__(self, d_model: int, *, d_ff: int, gate_scale: float, output_scale: float, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, bias=bias)
        self.gate_scale, self.output_scale = gate_scale, output_scale

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        y = glu(self.gate_scale * self.gate_proj(x), self.up_proj(x), self.activation)
        return self.output_scale * self.down_proj(y)
