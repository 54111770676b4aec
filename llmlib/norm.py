"""Normalisation: LayerNorm, RMSNorm, DyT, and what goes with them (folding a gain away, DeepNorm's constants)."""

import contextlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.errors import require, require_counts
from llmlib.ops import op


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over many numbers are done: float32 for the half types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A block that computes in the types of its tensors: autocast would do its products in 16 bits."""
    device = x.device.type
    on = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


@op
def rms_norm(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "... d"] | None = None, *, eps: float = 1e-6
) -> Float[Tensor, "*b d"]:
    """y = w · x / √(mean(x²) + ε), over the last axis; the mean is taken in float32 or better.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    wide = x.to(at_least_float32(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


@op
def layer_norm(
    x: Float[Tensor, "*b d"],
    weight: Float[Tensor, "... d"] | None = None,
    bias: Float[Tensor, "... d"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*b d"]:
    """y = w · (x − mean(x)) / √(var(x) + ε) + b, over the last axis; mean and variance in float32 or better.

    Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    wide = x.to(at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _torch_why_not(x, weight=None, bias=None, *, eps=None) -> str | None:
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and (p.dtype is not x.dtype or p.ndim != 1):
            return f"x is {x.dtype} with one row of gains, but the {name} is {p.dtype} with shape {tuple(p.shape)}"
    return None


def _closed_form_why_not(x, weight=None, *, eps=None) -> str | None:
    if x.device.type != "cpu":
        return "on a GPU torch's own kernel has a fused backward"
    if not (torch.is_grad_enabled() and weight is not None and (x.requires_grad or weight.requires_grad)):
        return "there is no backward, or no gain, and torch's own forward is as fast"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it sums in the type of x, and {x.dtype} is too narrow for that"
    return _torch_why_not(x, weight) or (None if x.numel() >= 2**15 else "x is so small that the call itself decides")


@rms_norm.twin("closed-form", _closed_form_why_not, measured="CPU, see benchmarks/attention.py")
def _closed_form(x, weight=None, *, eps=1e-6):
    return ClosedFormRMSNorm.apply(x, weight, eps)


class ClosedFormRMSNorm(torch.autograd.Function):
    """RMSNorm whose backward is one formula. With x̂ = x / rms and g = w ⊙ dy: dx = (g − x̂ mean(g ⊙ x̂)) / rms.

    dw = Σ dy ⊙ x̂. On a CPU, torch's own backward walks through every step of the definition.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, eps):
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        d = x.shape[-1]
        # 1 / rms is made again from x rather than kept, so that this formula has a right derivative of its own
        inverse = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / d + ctx.eps)
        normed = x * inverse
        product = dy * normed
        along = (product @ weight)[..., None] / d
        return torch.addcmul(dy * weight, normed, along, value=-1) * inverse, product.reshape(-1, d).sum(0), None


@rms_norm.twin("torch", _torch_why_not, measured="CPU")
def _torch_rms_norm(x, weight=None, *, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@layer_norm.twin("torch", _torch_why_not, measured="CPU")
def _torch_layer_norm(x, weight=None, bias=None, *, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def init_linears_(module: nn.Module, std: float) -> None:
    """Fill the linear maps in `module`: weights from N(0, std²), biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0, std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + ε)  (arXiv:1910.07467).

    weight       False leaves out the gain w
    unit_offset  the gain is 1 + w with w starting at 0 (Gemma), so that weight decay pulls the gain to 1
    num_heads    one gain for each head: x is (… h d) and w is (h d)
    """

    undecayed = ("weight",)

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        weight: bool = True,
        unit_offset: bool = False,
        num_heads: int | None = None,
    ):
        super().__init__()
        require(weight or not unit_offset, "unit_offset=True adds 1 to the gain, and weight=False leaves it out")
        self.eps, self.unit_offset = eps, unit_offset
        shape = (dim,) if num_heads is None else (num_heads, dim)
        self.weight = nn.Parameter(torch.zeros(shape) if unit_offset else torch.ones(shape)) if weight else None

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        # 1 + w is formed in float32: in bfloat16 it would round w to steps of 1/128
        gain = 1 + self.weight.to(at_least_float32(x.dtype)) if self.unit_offset else self.weight
        return rms_norm(x, gain, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}" + (", unit_offset=True" if self.unit_offset else "")


class LayerNorm(nn.Module):
    """y = w · (x − mean(x)) / √(var(x) + ε) + b  (arXiv:1607.06450).

    weight, bias  False leaves out w or b (OLMo has neither, Cohere no b)
    num_heads     one w and b for each head: x is (… h d), w and b are (h d)
    """

    undecayed = ("weight", "bias")

    def __init__(
        self, dim: int, *, eps: float = 1e-5, weight: bool = True, bias: bool = True, num_heads: int | None = None
    ):
        super().__init__()
        self.eps = eps
        shape = (dim,) if num_heads is None else (num_heads, dim)
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class DyT(nn.Module):
    """Dynamic Tanh, a stand-in for a norm that averages nothing: y = w · tanh(α x) + b, α one learned number.

    Zhu et al., "Transformers without Normalization", arXiv:2503.10622. `alpha` is where α starts.
    """

    def __init__(self, dim: int, *, alpha: float = 0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


@torch.no_grad()
def fold_gain_(norm: RMSNorm | LayerNorm, linears: Iterable[nn.Linear]) -> None:
    """Move a norm's gain w and bias b into every linear map that reads it, in place; the norm keeps 1 and 0.

    W (w ⊙ x̂ + b) + c = (W diag(w)) x̂ + (W b + c), so a norm's gain costs nothing at inference.
    `linears` must be all that reads the norm. ConfigError when b ≠ 0 meets a linear map without a bias.
    """
    linears, offset, bias = list(linears), int(getattr(norm, "unit_offset", False)), getattr(norm, "bias", None)
    if bias is not None and bias.any():
        room = all(linear.bias is not None for linear in linears)
        require(room, "the norm has a bias, and a linear map that reads it has none")
        for linear in linears:
            linear.bias += linear.weight @ bias
        bias.zero_()
    if norm.weight is not None:
        for linear in linears:
            linear.weight *= norm.weight + offset
        norm.weight.fill_(1 - offset)


def deepnorm(num_layers: int, *, encoder_layers: int = 0) -> tuple[float, float]:
    """DeepNorm's (α, β) for `num_layers` decoder-only or encoder-only layers: α = (2N)^¼, β = (8N)^−¼.

    The residual is norm(α x + f(x)), and the initial weights of the feed-forward, values and output are scaled by β.
    With `encoder_layers` > 0 they are those of a decoder over an encoder: α = (3N)^¼, β = (12N)^−¼.
    Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", arXiv:2203.00555, figure 2 (see `deepnorm_encoder`).
    """
    require_counts(num_layers=num_layers)
    require_counts(0, encoder_layers=encoder_layers)
    n = 3 * num_layers if encoder_layers else 2 * num_layers
    return n**0.25, (4 * n) ** -0.25


def deepnorm_encoder(encoder_layers: int, decoder_layers: int) -> tuple[float, float]:
    """DeepNorm's (α, β) for the encoder under a decoder: α = 0.81 (N⁴M)^(1/16), β = 0.87 (N⁴M)^(−1/16).

    arXiv:2203.00555, figure 2. ConfigError for fewer layers than 1.
    """
    require_counts(encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    size = (encoder_layers**4 * decoder_layers) ** (1 / 16)
    return 0.81 * size, 0.87 / size
