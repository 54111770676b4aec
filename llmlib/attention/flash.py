"""FlashAttention spelled out in PyTorch: attention by tiles, forward and backward."""

import torch
from torch import Tensor

from llmlib.attention.functional import attention, check_shapes
from llmlib.norm import at_least_float32


def _tiled_why_not(
    q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None
) -> str | None:
    if mask is not None or bias is not None or sinks is not None or softcap is not None:
        return "it is kept short: no mask, bias, sinks or softcap"
    return None


@attention.twin("tiled", _tiled_why_not, auto=False)
def tiled(q, k, v, *, causal=True, window=None, mask=None, bias=None, sinks=None, softcap=None, scale=None):  # noqa: ARG001
    """FlashAttention in PyTorch: tiles of scores that never form the (t s) matrix, and are made again in the backward.

    Dao et al., arXiv:2205.14135; the loop order is that of FlashAttention-2, arXiv:2307.08691.
    """
    check_shapes(q, k, v, causal, window)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return FlashAttention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, causal, window)


class FlashAttention(torch.autograd.Function):
    """Softmax attention that keeps, for each row, only its output and the logarithm of its sum of exponentials."""

    tile = 64

    @staticmethod
    def forward(ctx, q, k, v, scale, causal, window):
        """For each tile of queries, one pass over the keys: m is the largest score so far, total = Σ exp(score − m)."""
        wide = at_least_float32(q.dtype)
        y, logsum = (
            torch.empty(*q.shape[:3], v.shape[-1], dtype=wide, device=q.device),
            q.new_empty(q.shape[:3], dtype=wide),
        )
        for rows in tiles(q.shape[2]):
            m = torch.full_like(logsum[:, :, rows], -torch.inf)
            total, acc = torch.zeros_like(m), torch.zeros_like(y[:, :, rows])
            for columns in tiles(k.shape[2]):
                scores = scores_of_tile(q, k, rows, columns, scale, causal, window)
                if scores is None:
                    continue
                higher = torch.maximum(m, scores.amax(-1))
                safe = higher.masked_fill(higher == -torch.inf, 0)
                p, shrink = torch.exp(scores - safe[..., None]), torch.exp(m - safe)
                total = total * shrink + p.sum(-1)
                acc = acc * shrink[..., None] + p @ v[:, :, columns].to(wide)
                m = higher
            y[:, :, rows] = acc / total.masked_fill(total == 0, 1)[..., None]
            logsum[:, :, rows] = m + torch.log(total.masked_fill(total == 0, 1))
        ctx.save_for_backward(q, k, v, y, logsum)
        ctx.options = scale, causal, window
        return y.to(q.dtype)

    @staticmethod
    def backward(ctx, dy):
        """p = exp(score − logsum) again; dscore = p (dy·v − dy·y): the softmax's Jacobian needs one number per row."""
        q, k, v, y, logsum = ctx.saved_tensors
        dy = dy.to(y.dtype)
        along = (dy * y).sum(-1)
        dq, dk, dv = (torch.zeros_like(x, dtype=y.dtype) for x in (q, k, v))
        for columns in tiles(k.shape[2]):
            for rows in tiles(q.shape[2]):
                scores = scores_of_tile(q, k, rows, columns, *ctx.options)
                if scores is None:
                    continue
                floor = logsum[:, :, rows, None]
                p = torch.exp(scores - floor.masked_fill(floor == -torch.inf, 0))
                dv[:, :, columns] += p.mT @ dy[:, :, rows]
                dscores = (
                    p * (dy[:, :, rows] @ v[:, :, columns].to(y.dtype).mT - along[:, :, rows, None]) * ctx.options[0]
                )
                dq[:, :, rows] += dscores @ k[:, :, columns].to(y.dtype)
                dk[:, :, columns] += dscores.mT @ q[:, :, rows].to(y.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def tiles(length: int) -> list[slice]:
    """0 … length in slices of FlashAttention.tile."""
    step = FlashAttention.tile
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def scores_of_tile(q: Tensor, k: Tensor, rows: slice, columns: slice, scale: float, causal: bool, window: int | None):
    """Scores of some queries and keys, masked; None if the mask leaves nothing of this tile."""
    wide, offset = at_least_float32(q.dtype), k.shape[2] - q.shape[2]
    i = torch.arange(rows.start + offset, rows.stop + offset, device=q.device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=q.device)
    if causal and columns.start > rows.stop - 1 + offset:
        return None
    if window is not None and columns.stop - 1 <= rows.start + offset - window:
        return None
    hidden = (j > i) & causal
    if window is not None:
        hidden = hidden | ((i - j).abs() >= window)
    scores = q[:, :, rows].to(wide) @ k[:, :, columns].to(wide).mT * scale
    return scores.masked_fill(hidden, -torch.inf)
