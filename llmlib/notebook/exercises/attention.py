"""Checkers for chapter 01."""

import torch
from torch import Tensor

from llmlib import attention as library
from llmlib.notebook.exercises import wrong


def _random(*shape, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _equal(got, wanted: Tensor, what: str) -> None:
    if not isinstance(got, Tensor):
        wrong(f"{what} should be a tensor, not {type(got).__name__}")
    if got.shape != wanted.shape:
        wrong(f"{what} has shape {tuple(got.shape)}, but should have {tuple(wanted.shape)}")
    if not torch.allclose(got.double(), wanted.double(), rtol=1e-6, atol=1e-8):
        wrong(f"{what} has the right shape and wrong values")


def scale(find) -> None:
    """find(d, sd_q, sd_k) → the factor that gives q·k unit variance."""
    for d, sd_q, sd_k in ((64, 1.0, 1.0), (64, 2.0, 1.0), (128, 1.0, 0.5)):
        got, wanted = float(find(d, sd_q, sd_k)), 1 / (d**0.5 * sd_q * sd_k)
        if abs(got / wanted - 1) > 1e-6:
            wrong(f"with d = {d}, sd_q = {sd_q} and sd_k = {sd_k} the product has variance {(got / wanted) ** 2:.3g}")


def mask(build) -> None:
    """build(t, window) → (t, t) True where a query may look."""
    for t, window in ((6, 6), (6, 3), (5, 1)):
        got = build(t, window)
        if not isinstance(got, Tensor) or got.shape != (t, t):
            wrong(f"for {t} tokens the mask should be a tensor of shape {(t, t)}")
        if got.dtype != torch.bool:
            wrong(f"the mask should be boolean, not {got.dtype}")
        if got.triu(1).any():
            wrong("some query sees a later key")
        if not got.diagonal().all():
            wrong("some query doesn't see itself, so its row may be empty")
        seen = got.sum(1)
        if (seen > window).any():
            wrong(f"with window {window} a query sees {int(seen.max())} keys: does the window count the query itself?")
        _equal(got, library.visible(t, t, True, window), f"the mask for t = {t} and window = {window}")


def softmax_backward(backward) -> None:
    """backward(p, dp) → ds for rows of probabilities, without a Jacobian."""
    p, dp = _random(3, 5).softmax(-1), _random(3, 5, seed=1)
    got = backward(p, dp)
    if isinstance(got, Tensor) and got.shape == p.shape and got.sum(-1).abs().max() > 1e-8:
        wrong("each row of the gradient should sum to zero: adding a constant to all scores changes nothing")
    _equal(got, p * (dp - (p * dp).sum(-1, keepdim=True)), "the gradient")


def count(parameters) -> None:
    """parameters(d_model, num_heads, num_kv_heads, head_dim) → weights of an attention layer without biases."""
    for sizes in ((512, 8, 8, 64), (512, 8, 2, 64), (512, 8, 2, 128)):
        d, h, g, e = sizes
        layer = library.Attention(d, num_heads=h, num_kv_heads=g, head_dim=e)
        wanted, got = sum(p.numel() for p in layer.parameters()), parameters(*sizes)
        if got != wanted:
            wrong(f"for d_model, num_heads, num_kv_heads, head_dim = {sizes} you count {got}; the layer disagrees")


def sink(attend) -> None:
    """attend(q, k, v, logit) → softmax attention (not causal) with one more logit that has no value."""
    q, k, v = (_random(2, 4, 3, seed=i) for i in range(3))
    for logit in (-30.0, 0.0, 2.0):
        wanted = library.attention(
            q[None], k[None], v[None], causal=False, sinks=torch.full((2,), logit, dtype=q.dtype))[0]  # fmt: skip
        _equal(attend(q, k, v, logit), wanted, f"the output for a sink logit of {logit}")
    huge = attend(1e4 * q, k, v, 0.0)
    if not huge.isfinite().all():
        wrong("large scores overflow: subtract the largest score, the sink's included, before exp")


def cache_bytes(size) -> None:
    """size(num_layers, num_kv_heads, head_dim, length, batch, bytes_per_number) → bytes of keys and values."""
    got, wanted = size(32, 8, 128, 8192, 4, 2), 2 * 32 * 8 * 128 * 8192 * 4 * 2
    if got * 2 == wanted:
        wrong("this is half of it: what else is kept besides the keys?")
    if got != wanted:
        wrong(f"32 layers, 8 heads of 128, 8192 tokens, 4 texts, 2 bytes: you get {got:,}, which isn't it")


def decode(step) -> None:
    """step(q, k, v, cache) → output of one new token (b h 1 e); `cache` is a dict, empty at first, that it fills."""
    q, k, v = (_random(2, 3, 6, 4, seed=i) for i in range(3))
    wanted, cache = library.attention(q, k, v), {}
    for i in range(q.shape[2]):
        now = slice(i, i + 1)
        got = step(q[:, :, now], k[:, :, now], v[:, :, now], cache)
        if not cache:
            wrong("nothing is kept in the cache")
        _equal(got, wanted[:, :, now], f"the output of token {i}")


def merge(join) -> None:
    """join(y1, z1, y2, z2) → (y, z): attention over all keys from two halves; z = log Σ exp(score) per query."""

    def part(q, k, v):
        scores = q @ k.mT
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    for size in (1.0, 1000.0):
        q, k, v = size * _random(4, 3), _random(7, 3, seed=1), _random(7, 2, seed=2)
        wanted = part(q, k, v)
        got = join(*part(q, k[:2], v[:2]), *part(q, k[2:], v[2:]))
        if not (isinstance(got, tuple) and len(got) == 2):
            wrong("return two things: the output and the logarithm of the sum of exponentials")
        if not got[0].isfinite().all():
            wrong("scores of a few hundred overflow: never take exp of a large number by itself")
        _equal(got[0], wanted[0], "the output")
        _equal(got[1], wanted[1], "the logarithm of the sum")


def _forgetful(q, k, v, cache):
    cache["k"] = k
    return v


WRONG = {
    "scale": [lambda d, a, b: 1 / d, lambda d, a, b: d**-0.5],
    "mask": [
        lambda t, window: torch.ones(t, t).tril(),
        lambda t, window: torch.ones(t, t, dtype=torch.bool),
        lambda t, window: torch.ones(t, t, dtype=torch.bool).tril(),
        lambda t, window: torch.ones(t, t, dtype=torch.bool).tril().triu(-window),
        lambda t, window: torch.ones(t, t, dtype=torch.bool).tril(-1),
    ],
    "softmax_backward": [lambda p, dp: p * dp, lambda p, dp: p * (dp - dp.mean(-1, keepdim=True))],
    "count": [lambda d, h, g, e: 4 * d * d, lambda d, h, g, e: d * e * (2 * h + g)],
    "sink": [
        lambda q, k, v, z: (q @ k.mT / 2).softmax(-1) @ v,
        lambda q, k, v, z: (s := (q @ k.mT / 2).exp()) @ v / (s.sum(-1, keepdim=True) + torch.tensor(z).exp()),
    ],
    "cache_bytes": [lambda layers, g, e, s, b, n: layers * g * e * s * b * n, lambda *sizes: 1],
    "decode": [lambda q, k, v, cache: v, _forgetful],
    "merge": [
        lambda y1, z1, y2, z2: ((y1 + y2) / 2, torch.logaddexp(z1, z2)),
        lambda y1, z1, y2, z2: (y1, z1 + z2),
        lambda y1, z1, y2, z2: (
            (y1 * z1.exp()[:, None] + y2 * z2.exp()[:, None]) / (z1.exp() + z2.exp())[:, None], torch.logaddexp(z1, z2)
        ),
    ],
}  # fmt: skip
