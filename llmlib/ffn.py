"""Feed-forward: the plain two-layer kind, the gated kind, and rules for their width."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.errors import require
from llmlib.norm import init_linears_
from llmlib.ops import op


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)². So et al., "Primer", arXiv:2109.08668."""
    return F.relu(x).square()


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ the distribution function of the standard normal. Hendrycks and Gimpel, arXiv:1606.08415."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """½ x (1 + tanh(√(2/π) (x + 0.044715 x³))): the approximation that GPT-2 was trained with."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the coarser approximation of the same paper."""
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


class MLP(nn.Module):
    """down_proj(activation(up_proj(x))): the feed-forward of 2017, with d_ff = 4 d_model there.

    activation  one of `ACTIVATIONS`; bias  both maps have one
    """

    def __init__(self, d_model: int, *, d_ff: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        require(activation in ACTIVATIONS, f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        require(d_ff >= 1, f"d_ff is {d_ff}, and must be at least 1")
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
    """

    def __init__(self, d_model: int, *, d_ff: int, activation: str = "sigmoid", bias: bool = False):
        super().__init__()
        require(activation in ACTIVATIONS, f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
        require(d_ff >= 1, f"d_ff is {d_ff}, and must be at least 1")
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
    """GLU with GELU, exact unless `tanh` (Gemma has the tanh form)."""

    def __init__(self, d_model: int, *, d_ff: int, tanh: bool = False, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, activation="gelu_tanh" if tanh else "gelu", bias=bias)


class ReGLU(GLU):
    """GLU with ReLU."""

    def __init__(self, d_model: int, *, d_ff: int, bias: bool = False):
        super().__init__(d_model, d_ff=d_ff, activation="relu", bias=bias)
