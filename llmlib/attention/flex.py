"""PyTorch's FlexAttention: a fused kernel made for the scores' formula, so it knows soft-caps and sinks."""

import functools

import torch
from torch import Tensor

from llmlib.attention.functional import attention, check_shapes


def _why_not(
    q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None
) -> str | None:
    if not q.is_cuda:
        return "it is compiled for GPUs, and on the CPU it has no backward"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {torch.cuda.get_device_capability(q.device)}"
    return f"it has no {q.dtype}" if q.dtype is torch.float64 else None


@attention.twin("flex", _why_not)
def _flex(q, k, v, **options):
    return flex(_compiled(), q, k, v, **options)


def flex(
    kernel, q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None
) -> Tensor:
    """Attention by `kernel`, torch's flex_attention, compiled or not.

    A sink only adds to the sum under a row: with L the logarithm of that sum without it, the output shrinks by
    exp(L) / (exp(L) + exp(sink)) = σ(L − sink). Shapes, options and errors are `attention`'s.
    Dong et al., "Flex Attention", arXiv:2412.05496.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    t, s = check_shapes(q, k, v, causal, window)
    b, h = q.shape[:2]
    mask = None if mask is None else mask.expand(b, h, t, s)
    bias = None if bias is None else bias.expand(b, h, t, s)

    capped = (lambda x: x) if softcap is None else (lambda x: softcap * torch.tanh(x / softcap))
    biased = (lambda x, *at: x) if bias is None else (lambda x, *at: x + bias[at])
    shown = (lambda x, *at: x) if mask is None else (lambda x, *at: torch.where(mask[at], x, -torch.inf))
    plain = softcap is None and bias is None and mask is None
    formula = None if plain else lambda x, b, h, i, j: shown(biased(capped(x), b, h, i, j), b, h, i, j)
    blocks = _blocks(t, s, causal, window, str(q.device)) if causal or window is not None else None
    y, aux = kernel(
        q,
        k,
        v,
        score_mod=formula,
        block_mask=blocks,
        scale=scale,
        enable_gqa=k.shape[1] < h,
        return_aux=AuxRequest(lse=True),
    )
    if sinks is None:
        return y
    return (y * torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])[..., None]).to(q.dtype)


@functools.lru_cache(maxsize=16)
def _blocks(t: int, s: int, causal: bool, window: int | None, device: str):
    """Which blocks of keys each block of queries needs; a window's cost follows from it."""
    from torch.nn.attention.flex_attention import create_block_mask

    reach = s + t if window is None else window
    if causal:
        return create_block_mask(
            lambda b, h, i, j: (i + s - t - j < reach) & (i + s - t >= j), None, None, t, s, device=device
        )
    return create_block_mask(lambda b, h, i, j: (i + s - t - j).abs() < reach, None, None, t, s, device=device)


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
