"""Positions: rotary (RoPE) with its extensions, learned, sinusoidal, and the biases ALiBi and T5."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llmlib.context import Context
from llmlib.errors import ConfigError, require, require_counts, require_positive
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


def _complex_why_not(x, cos, sin, *, interleaved=False) -> str | None:
    if not interleaved:
        return "a complex number is a pair of neighbours, so it needs interleaved=True"
    if 2 * cos.shape[-1] != x.shape[-1]:
        return "it turns whole heads only"
    return None if x.dtype is cos.dtype else f"it needs x of cos's type {cos.dtype}, and x is {x.dtype}"


@rope.twin("complex", _complex_why_not, auto=False)
def _rope_complex(x, cos, sin, *, interleaved=False):  # noqa: ARG001
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def rope_frequencies(dim: int, theta: float = 10000.0) -> Float[Tensor, "r"]:
    """θᵢ = theta^(−2i/dim), i = 0 … dim/2 − 1: radians per position of each pair, in float64.

    ConfigError for an odd `dim` and a `theta` that isn't above 0. Su et al., "RoFormer", arXiv:2104.09864.
    """
    require(dim > 0 and dim % 2 == 0, f"RoPE turns pairs, so its width must be even and above 0; it is {dim}")
    require_positive(rope_theta=theta)
    return float(theta) ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


# Extensions of the context. Each returns (frequencies, what cos and sin are multiplied by). `length` is how long the
# text is now, a float64 tensor with one number or one for each text; only two of them look at it.


def linear_scaling(dim: int, theta: float, length: Tensor, *, factor: float):
    """Position interpolation: every angle divided by `factor`. Chen et al., arXiv:2306.15595."""
    return rope_frequencies(dim, theta) / at_least_one(factor), 1.0


def ntk_scaling(dim: int, theta: float, length: Tensor, *, factor: float):
    """NTK-aware: theta · factor^(d/(d−2)), which slows the slowest pair by `factor` and leaves the fastest alone.

    From bloc97's posts of 2023; described in section 3.1 of YaRN, arXiv:2309.00071.
    """
    return rope_frequencies(dim, theta * at_least_one(factor) ** _ntk_power(dim)), 1.0


def _ntk_power(dim: int) -> float:
    require(dim > 2, f"NTK scaling leaves the first pair alone and slows others, and RoPE's width of {dim} is one pair")
    return dim / (dim - 2)


def dynamic_scaling(dim: int, theta: float, length: Tensor, *, factor: float, original_max_position_embeddings: int):
    """Dynamic NTK: NTK-aware with a factor that grows with the text, factor · length / original − (factor − 1).

    Within the original length nothing changes. From emozilla's post of 2023; described in YaRN, arXiv:2309.00071.
    """
    require_positive(original_max_position_embeddings=original_max_position_embeddings)
    beyond = (length.to(torch.float64) / original_max_position_embeddings).clamp(min=1)
    grown = theta * (at_least_one(factor) * beyond - (factor - 1)) ** _ntk_power(dim)
    steps = -torch.arange(0, dim, 2, dtype=torch.float64, device=length.device) / dim
    return grown[..., None] ** steps, 1.0


def yarn_scaling(
    dim: int,
    theta: float,
    length: Tensor,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
):
    """YaRN: pairs that turn more than `beta_fast` times within the original length stay, those that turn less than
    `beta_slow` times are interpolated, a ramp between; cos and sin grow by 0.1 ln(factor) + 1.

    `truncate` rounds the ramp's ends to whole pairs; DeepSeek splits the growth by `mscale` and `mscale_all_dim`.
    Peng et al., arXiv:2309.00071.
    """
    require_positive(
        original_max_position_embeddings=original_max_position_embeddings,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=attention_factor,
    )
    require(beta_fast >= beta_slow, f"beta_fast = {beta_fast} must be at least beta_slow = {beta_slow}")
    require(theta > 1, f"rope_theta is {theta}, and YaRN's ramp over the pairs needs one above 1")
    frequencies = rope_frequencies(dim, theta)
    low, high = (
        dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (beta_fast, beta_slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (
        (torch.arange(dim // 2, dtype=torch.float64, device=frequencies.device) - low) / max(high - low, 0.001)
    ).clamp(0, 1)
    if attention_factor is None:
        split = mscale and mscale_all_dim
        attention_factor = (
            yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim) if split else yarn_mscale(factor)
        )
    return frequencies * (1 - ramp) + frequencies / at_least_one(factor) * ramp, attention_factor


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1, or 1 for a factor that doesn't stretch. YaRN, arXiv:2309.00071; mscale is
    DeepSeek-V2's, arXiv:2405.04434."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_scaling(
    dim: int,
    theta: float,
    length: Tensor,
    *,
    short_factor: tuple[float, ...],
    long_factor: tuple[float, ...],
    original_max_position_embeddings: int,
    factor: float | None = None,
    attention_factor: float | None = None,
):
    """LongRoPE: each pair divided by a factor of its own, found by search; one set up to the original length, another
    beyond it. cos and sin grow by √(1 + ln(factor) / ln(original)). Ding et al., arXiv:2402.13753.
    """
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        require(len(factors) == dim // 2, f"{name} has {len(factors)} numbers, and {dim // 2} pairs turn")
        require(min(factors) > 0, f"{name} has {min(factors)} in it, and each number must be above 0")
    require(factor is not None or attention_factor is not None, "longrope needs `factor` or `attention_factor`")
    require_positive(attention_factor=attention_factor)
    require(
        original_max_position_embeddings > 1,
        f"original_max_position_embeddings is {original_max_position_embeddings}, and must be above 1",
    )
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(at_least_one(factor)) / math.log(original_max_position_embeddings))
    long = (length > original_max_position_embeddings)[..., None]
    by = torch.where(
        long, length.new_tensor(long_factor, dtype=torch.float64), length.new_tensor(short_factor, dtype=torch.float64)
    )
    return rope_frequencies(dim, theta).to(length.device) / by, attention_factor


def llama3_scaling(
    dim: int,
    theta: float,
    length: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
):
    """Llama 3.1: pairs with more than `high_freq_factor` turns in the original length stay, those with fewer than
    `low_freq_factor` are divided by `factor`, between them the two are mixed, linearly in the turns. arXiv:2407.21783.
    """
    require_positive(original_max_position_embeddings=original_max_position_embeddings, low_freq_factor=low_freq_factor)
    require(
        high_freq_factor > low_freq_factor,
        f"high_freq_factor = {high_freq_factor} must be above low_freq_factor = {low_freq_factor}",
    )
    frequencies = rope_frequencies(dim, theta)
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * keep + frequencies / at_least_one(factor) * (1 - keep), 1.0


def at_least_one(factor: float) -> float:
    """`factor`, or a ConfigError: a context isn't extended by less than 1."""
    require(1 <= factor < math.inf, f"the RoPE scaling factor is {factor}, and must be at least 1 and finite")
    return factor


SCALINGS = {
    "linear": linear_scaling,
    "ntk": ntk_scaling,
    "dynamic": dynamic_scaling,
    "yarn": yarn_scaling,
    "longrope": longrope_scaling,
    "llama3": llama3_scaling,
}


class RoPE:
    """The angles of rotary positions: position · frequency, with an extension of the context if `scaling` names one.

    dim      how many numbers of a head turn (even)
    theta    the base: pair i turns by theta^(−2i/dim) radians per token
    scaling  {"type": name of one of `SCALINGS`, **its options}, the options named as in published configs

    ConfigError for an odd or empty `dim`, an unknown type or option, one that is missing, and factors below 1.
    Su et al., "RoFormer", arXiv:2104.09864.
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: Mapping | None = None):
        rope_frequencies(dim, theta)
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in (scaling or {}).items()}
        self.kind = options.pop("type", None)
        require(
            scaling is None or self.kind in SCALINGS,
            f"rope_scaling has type {self.kind!r}; choose one of {', '.join(SCALINGS)}",
        )
        known = list(inspect.signature(SCALINGS[self.kind]).parameters)[3:] if self.kind else []
        for name in options:
            require(name in known, f"rope_scaling of type {self.kind!r} has no {name!r}; it has {', '.join(known)}")
        self.dim, self.theta, self.options = dim, theta, options
        self.key = (dim, theta, self.kind, *sorted(options.items()))
        self.grows = self.kind in ("dynamic", "longrope")
        try:
            self.frequencies()
        except TypeError as error:
            raise ConfigError(f"rope_scaling of type {self.kind!r}: {error}") from None

    def __repr__(self) -> str:
        scaling = f", {self.kind}" if self.kind else ""
        return f"RoPE({self.dim}, theta={self.theta}{scaling})"

    def frequencies(self, length: Int[Tensor, "*b"] | int = 1) -> tuple[Float[Tensor, "*b r"], float]:
        """Radians per token of each pair in a text of this length, and the factor on cos and sin."""
        if self.kind is None:
            return rope_frequencies(self.dim, self.theta), 1.0
        return SCALINGS[self.kind](self.dim, self.theta, torch.as_tensor(length), **self.options)

    def wavelengths(self, length: int = 1) -> Float[Tensor, "r"]:
        """Tokens per full turn of each pair: 2π / frequency."""
        return 2 * math.pi / self.frequencies(length)[0]

    def angles(
        self, positions: Int[Tensor, "*b s"], dtype: torch.dtype, length: Int[Tensor, "*b #s"] | int = 1
    ) -> tuple[Float[Tensor, "*b1 s r"], Float[Tensor, "*b1 s r"]]:
        """cos and sin of position · frequency; products are formed in float64, so far positions stay exact.

        `length` is that of the text, one for all or one for each position.
        """
        frequencies, factor = self.frequencies(length)
        precise = torch.float32 if positions.device.type == "mps" else torch.float64
        frequencies = frequencies.to(positions.device, precise)
        angles = positions[..., None].to(precise) * frequencies
        if angles.ndim == 3:
            angles = angles[:, None]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def __call__(self, start: int, like: Float[Tensor, "b h t d"], context: Context):
        """cos and sin for the tokens of `like`: from `context.positions`, or else start, start + 1, …

        The layers of one pass share them through `context.shared`.
        """
        t, dtype = like.shape[2], torch.promote_types(like.dtype, torch.float32)
        key = "rope", self.key, dtype, start, t
        if key not in context.shared:
            context.shared[key] = self._find(start, t, dtype, like, given_positions(context, t))
        return context.shared[key]

    def _find(self, start: int, t: int, dtype: torch.dtype, like: Tensor, positions: Int[Tensor, "*b t"] | None):
        if positions is not None:
            return self.angles(positions, dtype)
        if torch.compiler.is_compiling() or type(like) is not Tensor:
            return self.angles(torch.arange(start, start + t, device=like.device), dtype)
        cos, sin = _table(self.key, max(512, 1 << (start + t - 1).bit_length()), dtype, like.device)
        return cos[start : start + t], sin[start : start + t]


@functools.lru_cache(maxsize=64)
def _table(key: tuple, length: int, dtype: torch.dtype, device: torch.device):
    """cos and sin of every position below `length`; layers with equal rotary options share one table."""
    dim, theta, kind, *options = key
    with torch.inference_mode(False), torch.no_grad():  # a table must outlive the mode it was made in
        rope = RoPE(dim, theta, None if kind is None else {"type": kind, **dict(options)})
        return rope.angles(torch.arange(length, device=device), dtype)


def half_from_interleaved(
    weight: Float[Tensor, "hd *i"], num_heads: int, rope_dim: int | None = None
) -> Float[Tensor, "hd *i"]:
    """Reorder the rows of q_proj or k_proj so that split-half RoPE does what interleaved RoPE did before.

    Within each head row 2i goes to i and row 2i + 1 to i + r/2; rows beyond `rope_dim` = r stay. Scores are unchanged,
    for queries and keys are reordered alike. Works on weights and biases.
    """
    return _permute(weight, num_heads, rope_dim, lambda r: torch.arange(r).view(-1, 2).T.flatten())


def interleaved_from_half(
    weight: Float[Tensor, "hd *i"], num_heads: int, rope_dim: int | None = None
) -> Float[Tensor, "hd *i"]:
    """The inverse of `half_from_interleaved`."""
    return _permute(weight, num_heads, rope_dim, lambda r: torch.arange(r).view(2, -1).T.flatten())


def _permute(weight: Tensor, num_heads: int, rope_dim: int | None, order: Callable[[int], Tensor]) -> Tensor:
    require(weight.shape[0] % num_heads == 0, f"{weight.shape[0]} rows don't divide into {num_heads} heads")
    heads = weight.unflatten(0, (num_heads, -1))
    r = rope_dim or heads.shape[1]
    require(
        r % 2 == 0 and r <= heads.shape[1], f"rope_dim = {r} must be even and at most the head's {heads.shape[1]} rows"
    )
    return torch.cat([heads[:, order(r).to(weight.device)], heads[:, r:]], dim=1).flatten(0, 1)


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Float[Tensor, "h"]:
    """2^(−max_bias · i/h), i = 1 … h, when h is a power of two; else those of the power below, then every second one of
    the power above, from the first. Press, Smith and Lewis, arXiv:2108.12409.
    """
    require_counts(num_heads=num_heads)
    require_positive(max_bias=max_bias)
    n = 1 << (num_heads.bit_length() - 1)
    count = torch.arange(1, n + 1, device="cpu")  # real numbers, also in a model built on the meta device
    steps = torch.cat([count / n, (2 * count[: num_heads - n] - 1) / (2 * n)])
    return 2.0 ** (-max_bias * steps.double())


class ALiBi(nn.Module):
    """−slope · |i − j| on the score of query i and key j: attention with linear biases (arXiv:2108.12409).

    max_bias  sets the slopes, see `alibi_slopes`
    scale     multiplies the bias (Falcon adds it before the scores are divided by √d)
    bfloat16  slope · j, rounded to bfloat16 as Falcon computes it, in place of the exact −slope · |i − j|

    `absolute` says whether the bias depends on where the keys stand, or on distances alone.
    """

    def __init__(self, num_heads: int, *, max_bias: float = 8.0, scale: float = 1.0, bfloat16: bool = False):
        super().__init__()
        self.scale, self.bfloat16, self.slopes = scale, bfloat16, alibi_slopes(num_heads, max_bias)
        self.absolute = bfloat16

    def forward(self, queries: Int[Tensor, "*b t"], keys: Int[Tensor, "*b s"]) -> Float[Tensor, "*b h #t s"]:
        """The bias for queries and keys that stand at these places."""
        slopes = self.slopes.to(keys.device, torch.float32)[:, None, None]
        if self.bfloat16:
            return (slopes.bfloat16() * keys[..., None, None, :].bfloat16()).float() * self.scale
        return (slopes * self.scale) * -(queries[..., None, :, None] - keys[..., None, None, :]).abs()


class T5Bias(nn.Module):
    """One learned number for each head and bucket of distances, added to the scores. Raffel et al., arXiv:1910.10683.

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`. When not causal,
    half of them are for keys after the query.
    """

    undecayed = ("weight",)

    def __init__(self, num_heads: int, *, num_buckets: int = 32, max_distance: int = 128, causal: bool = True):
        super().__init__()
        require_counts(num_heads=num_heads, num_buckets=num_buckets)
        require(num_buckets % 4 == 0, f"num_buckets is {num_buckets}, and must be a multiple of 4")
        require(max_distance > num_buckets, f"max_distance = {max_distance} must be above num_buckets = {num_buckets}")
        self.num_buckets, self.max_distance, self.causal = num_buckets, max_distance, causal
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """From N(0, std²)."""
        nn.init.normal_(self.weight, 0, std)

    def buckets(self, offset: Int[Tensor, "*ts"]) -> Int[Tensor, "*ts"]:
        """The bucket of each key position − query position."""
        count, first = (self.num_buckets, 0) if self.causal else (self.num_buckets // 2, self.num_buckets // 2)
        distance = -offset.clamp(max=0) if self.causal else offset.abs()
        exact = count // 2
        growth = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (count - exact)).long()).clamp(max=count - 1)
        return torch.where(distance < exact, distance, far) + first * (offset > 0)

    def forward(self, queries: Int[Tensor, "t"], keys: Int[Tensor, "s"]) -> Float[Tensor, "h t s"]:
        """The bias for queries and keys that stand at these places."""
        return self.weight[self.buckets(keys - queries[:, None])].movedim(-1, 0)


class LearnedPosition(nn.Module):
    """x + P[position]: one learned vector for each position, and none beyond the table (GPT-2, OPT).

    offset  rows of the table before the one for position 0 (OPT has 2)

    Gehring et al., "Convolutional Sequence to Sequence Learning", arXiv:1705.03122.
    """

    undecayed = ("weight",)

    def __init__(self, d_model: int, *, max_positions: int, offset: int = 0):
        super().__init__()
        require_counts(max_positions=max_positions)
        require_counts(0, offset=offset)
        self.max_positions, self.offset = max_positions, offset
        self.weight = nn.Parameter(torch.empty(max_positions + offset, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """From N(0, std²)."""
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


def given_positions(context: Context, t: int) -> Int[Tensor, "*b t"] | None:
    """The positions that the context gives to t new tokens, if they are t and not below 0."""
    positions = context.positions
    if positions is not None:
        require(positions.shape[-1] == t, f"context.positions holds {positions.shape[-1]} positions for {t} new tokens")
        check_positions(positions)
    return positions


def check_positions(positions: Int[Tensor, "*b t"], limit: float = math.inf) -> None:
    """ConfigError unless 0 ≤ position < limit. Looks only at tensors on the CPU, outside torch.compile: elsewhere a
    look would stall the device."""
    if torch.compiler.is_compiling() or positions.device.type != "cpu" or positions.numel() == 0:
        return
    low, high = (int(end) for end in positions.aminmax())
    require(low >= 0, f"a position is {low}, and positions start at 0")
    require(high < limit, f"position {high} is beyond the table of {limit} learned positions; use a longer table")
