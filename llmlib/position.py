"""Positions: rotary (RoPE) with its extensions, learned, sinusoidal, and the biases ALiBi and T5."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlib.errors import require
from llmlib.ops import op


@op
def rope(
    x: Float[Tensor, "b h t d"],
    cos: Float[Tensor, "*b1 t r"],
    sin: Float[Tensor, "*b1 t r"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "b h t d"]:
    """Rotate pairs of x by angles θ: (x₁, x₂) → (x₁ cos θ − x₂ sin θ, x₂ cos θ + x₁ sin θ).

    Pair i is (xᵢ, xᵢ₊ᵣ) in the split-half layout (Llama, GPT-NeoX), (x₂ᵢ, x₂ᵢ₊₁) when `interleaved` (the paper, GPT-J).
    Only the first 2r of d numbers turn; the others pass (partial RoPE). cos and sin hold one angle per pair.
    Su et al., "RoFormer", arXiv:2104.09864.
    """
    r = cos.shape[-1]
    x1, x2 = (x[..., 0 : 2 * r : 2], x[..., 1 : 2 * r : 2]) if interleaved else (x[..., :r], x[..., r : 2 * r])
    turned = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([y.to(x.dtype), x[..., 2 * r :]], -1) if 2 * r < x.shape[-1] else y.to(x.dtype)


def rope_frequencies(dim: int, theta: float = 10000.0) -> Float[Tensor, "r"]:
    """θᵢ = theta^(−2i/dim), i = 0 … dim/2 − 1: radians per position of each pair, in float64."""
    require(dim > 0 and dim % 2 == 0, f"RoPE turns pairs, so its width must be even and above 0; it is {dim}")
    require(theta > 0, f"rope_theta is {theta}, and must be above 0")
    return float(theta) ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


class RoPE:
    """The angles of rotary positions: position · frequency, with an extension of the context if `scaling` names one.

    dim      how many numbers of a head turn (even); theta  the base, whose slowest pair turns once in 2π · theta tokens
    scaling  {"type": name, **options}: one of `SCALINGS`, options as in published configs
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: Mapping | None = None):
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self.frequencies = rope_frequencies(dim, theta)

    def __call__(
        self, start: int, length: int, positions: Int[Tensor, "*b t"] | None, like: Tensor
    ) -> tuple[Float[Tensor, "*b1 t r"], Float[Tensor, "*b1 t r"]]:
        """cos and sin for positions start … start + length − 1, or for `positions`, on `like`'s device."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        at = torch.arange(start, start + length, device=like.device) if positions is None else positions
        angles = at[..., None].to(torch.float64) * self.frequencies.to(like.device)
        if at.ndim == 2:
            angles = angles[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


class LearnedPosition(nn.Module):
    """x + P[position]: one learned vector for each position, and none beyond the table (GPT-2, OPT).

    offset  rows of the table before the one for position 0 (OPT has 2)
    """

    def __init__(self, d_model: int, *, max_positions: int, offset: int = 0):
        super().__init__()
        self.max_positions, self.offset = max_positions, offset
        self.weight = nn.Parameter(torch.empty(max_positions + offset, d_model))
        self.weight.no_weight_decay = True
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, 0, std)

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "*b t"]) -> Float[Tensor, "b t d"]:
        """Raises ConfigError for a position below 0 or beyond the table."""
        check_positions(positions, self.max_positions)
        return x + self.weight[positions + self.offset]


class SinusoidalPosition(nn.Module):
    """x + P[position], P[i] = (sin(i θ₀), cos(i θ₀), sin(i θ₁), …) with θⱼ = theta^(−2j/d).

    Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.
    `interleaved=False` puts all sines before all cosines.
    """

    def __init__(self, d_model: int, *, theta: float = 10000.0, interleaved: bool = True):
        super().__init__()
        self.interleaved, self.frequencies = interleaved, rope_frequencies(d_model, theta)

    def forward(self, x: Float[Tensor, "b t d"], positions: Int[Tensor, "*b t"]) -> Float[Tensor, "b t d"]:
        """Raises ConfigError for a position below 0."""
        check_positions(positions)
        angles = positions[..., None].to(torch.float64) * self.frequencies.to(x.device)
        waves = angles.sin(), angles.cos()
        table = torch.stack(waves, -1).flatten(-2) if self.interleaved else torch.cat(waves, -1)
        return x + table.to(x.dtype)


def check_positions(positions: Int[Tensor, "*b t"], limit: float = math.inf) -> None:
    """ConfigError unless 0 ≤ position < limit. Looks only at tensors on the CPU, outside torch.compile: elsewhere a
    look would stall the device."""
    if torch.compiler.is_compiling() or positions.device.type != "cpu" or positions.numel() == 0:
        return
    low, high = (int(end) for end in positions.aminmax())
    require(low >= 0, f"a position is {low}, and positions start at 0")
    require(high < limit, f"position {high} is beyond the table of {limit} learned positions; use a longer table")
