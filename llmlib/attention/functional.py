"""The op: softmax attention as an equation, and PyTorch's fused kernel as its twin."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from llmlib.errors import ConfigError, require
from llmlib.norm import at_least_float32
from llmlib.ops import op


@op
def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    *,
    causal: bool = True,
    window: int | None = None,
    mask: Bool[Tensor, "... #t #s"] | None = None,
    bias: Float[Tensor, "... #t #s"] | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t e"]:
    """softmax(cap(scale · q kᵀ) + bias + mask) v, for h query heads that share g heads of keys and values.

    causal   a query sees no later key; the last query lines up with the last key, so s ≥ t
    window   a query sees itself and the window − 1 keys before it (both sides when not causal)
    mask     True where a query may look; broadcasts to (b h t s). A query that may look nowhere gets zeros
    bias     added to the scores; broadcasts to (b h t s)
    sinks    one logit per head that takes part in the softmax and has no value (gpt-oss, arXiv:2508.10925)
    softcap  scores become cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118)
    scale    1/√d unless given. Half types are computed in float32.

    Raises ConfigError when heads don't divide, widths differ, the window is below 1, or a causal s < t.
    Vaswani et al., arXiv:1706.03762; grouped heads: Ainslie et al., arXiv:2305.13245.
    """
    t, s = check_shapes(q, k, v, causal, window)
    wide, groups = at_least_float32(q.dtype), (k.shape[1], q.shape[1] // k.shape[1])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bgrtd,bgsd->bgrts", q.to(wide).unflatten(1, groups), k.to(wide)).flatten(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    allowed = both(visible(t, s, causal, window, q.device), mask)
    weights = masked_softmax(scores, allowed, sinks)
    y = torch.einsum("bgrts,bgse->bgrte", weights.unflatten(1, groups), v.to(wide)).flatten(1, 2)
    return y.to(q.dtype)


def masked_softmax(
    scores: Float[Tensor, "b h t s"],
    allowed: Bool[Tensor, "... #t #s"] | None = None,
    sinks: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "b h t s"]:
    """exp(score) / (Σ exp(score) + exp(sink)) over the allowed keys; a row with none is all zeros, not NaN."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None]
        top = torch.maximum(top, sinks.detach())
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    total = total if sinks is None else total + torch.exp(sinks - top)
    return weights / total.masked_fill(total == 0, 1)


def visible(
    t: int, s: int, causal: bool, window: int | None, device: torch.device | None = None
) -> Bool[Tensor, "t s"] | None:
    """Which of s keys each of t queries may see, the last query standing at the last key; None when all."""
    if (not causal or t == 1) and (window is None or window >= max(t, s)):
        return None
    distance = torch.arange(s - t, s, device=device)[:, None] - torch.arange(s, device=device)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & (distance.abs() < window)
    return allowed


def both(a: Bool[Tensor, "..."] | None, b: Bool[Tensor, "..."] | None) -> Bool[Tensor, "..."] | None:
    """a ∧ b, where None allows everything."""
    return b if a is None else a if b is None else a & b


def check_shapes(q, k, v, causal: bool, window: int | None) -> tuple[int, int]:
    """(t, s), or a ConfigError that says what doesn't fit."""
    (_, h, t, d), (_, g, s, width) = q.shape, k.shape
    fits = h % g == 0 and width == d and v.shape[1:3] == (g, s)
    if fits and (not causal or s >= t) and (window is None or window >= 1):
        return t, s  # before the messages below are put together: this runs at every call
    require(h % g == 0, f"{h} query heads can't share {g} heads of keys: the first must be a multiple of the second")
    require(width == d, f"queries are {d} wide and keys {width}; they must be equal")
    require(fits, f"keys are {tuple(k.shape)} and values {tuple(v.shape)}: they differ in heads or length")
    require(not causal or s >= t, f"{t} causal queries stand at the last of {s} keys; there must be at least {t} keys")
    raise ConfigError(f"window is {window}, and a query sees at least itself")


def _banded_why_not(q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None):
    if window is None:
        return "there is no window"
    if not causal or mask is not None or bias is not None or sinks is not None or softcap is not None:
        return "it knows causal windows without mask, bias, sinks and softcap"
    if q.shape[2] != k.shape[2]:
        return "it needs as many queries as keys"
    return None if q.shape[2] >= 4 * max(window, 64) else "the text is shorter than 4 windows, so a band saves nothing"


@attention.twin("banded", _banded_why_not, measured="CPU")
def banded(q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None):  # noqa: ARG001
    """Attention under a causal window in O(t · window): each block of c queries meets the span of keys that it can see.

    c = max(64, window / 4): small blocks see little beyond their windows, large ones keep a matrix product busy.
    """
    check_shapes(q, k, v, causal, window)
    (b, h, t, d), g, e, c = q.shape, k.shape[1], v.shape[-1], max(64, window // 4)
    scale = d**-0.5 if scale is None else scale
    back = c * -(-(window - 1) // c)  # how far a block's first query looks back, in whole blocks
    first = F.scaled_dot_product_attention(
        q[:, :, :back], k[:, :, :back], v[:, :, :back], visible(back, back, True, window, q.device),
        scale=scale, enable_gqa=g < h,
    )  # fmt: skip
    blocks = -(-(t - back) // c)
    fill = (0, 0, 0, back + blocks * c - t)
    queries = F.pad(q[:, :, back:], fill).view(b, g, h // g, blocks, c, d).transpose(2, 3).reshape(b * g, blocks, -1, d)
    # overlapping spans, as views: nothing is copied but the padding
    keys, values = (F.pad(x, fill).flatten(0, 1).unfold(1, back + c, c).transpose(2, 3) for x in (k, v))
    allowed = visible(c, back + c, True, window, q.device).repeat(h // g, 1)
    y = F.scaled_dot_product_attention(queries, keys, values, allowed, scale=scale)
    y = y.view(b, g, blocks, h // g, c, e).transpose(2, 3).reshape(b, h, blocks * c, e)
    return torch.cat([first, y[:, :, : t - back]], dim=2)


def _sdpa_why_not(q, k, v, *, softcap=None, sinks=None, scale=None, **_) -> str | None:
    if softcap is not None:
        return "it can't cap the scores (softcap)"
    if scale is not None and scale <= 0:
        return f"its causal kernel multiplies −∞ by the scale, and that is {scale}"
    return "it has no sinks" if sinks is not None else None


@attention.twin("sdpa", _sdpa_why_not, measured="CPU")
def _sdpa(q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None):  # noqa: ARG001
    t, s = check_shapes(q, k, v, causal, window)
    h, g, e = q.shape[1], k.shape[1], v.shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    square = causal and t == s and window is None and mask is None and bias is None
    allowed = None if square else both(visible(t, s, causal, window, q.device), mask)
    if bias is not None:
        allowed = bias.to(q.dtype) if allowed is None else bias.to(q.dtype).masked_fill(~allowed, -torch.inf)
    if allowed is not None and allowed.ndim == 3:
        allowed = allowed[None]
    if e < q.shape[-1] and q.device.type == "cpu":  # its flash kernel wants values as wide as keys
        v = F.pad(v, (0, q.shape[-1] - e))
    if t == 1 and g < h:  # one query: the heads of a group become rows, and no key is repeated
        if allowed is not None and allowed.ndim == 4 and allowed.shape[1] > 1:
            allowed = allowed.reshape(allowed.shape[0], g, h // g, allowed.shape[-1])
        y = F.scaled_dot_product_attention(q.reshape(-1, g, h // g, q.shape[-1]), k, v, allowed, scale=scale)
        return y.reshape(q.shape[0], h, 1, -1)[..., :e]
    if g < h and allowed is not None and q.is_cuda:  # no CUDA kernel takes both a mask and grouped heads
        k, v, g = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1), h
    y = F.scaled_dot_product_attention(q, k, v, allowed, is_causal=square and t > 1, scale=scale, enable_gqa=g < h)
    return y[..., :e]
