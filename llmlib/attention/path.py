"""PaTH: positions that depend on the text. Each token turns, by a Householder-like matrix, all keys before it.

Its three forms compute one function: `path_attention_recurrent` turns the keys token by token, as decoding does,
`path_scores` all pairs at once by a triangular system, in chunks; `path_attention` puts the softmax behind it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llmlib.attention.cache import GrowingCache, tokens_seen
from llmlib.attention.functional import both, check_shapes, masked_softmax, visible
from llmlib.attention.layer import check_heads, context_mask
from llmlib.context import Context
from llmlib.errors import require, require_counts
from llmlib.norm import at_least_float32, init_linears_
from llmlib.ops import op


@op
def path_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    w: Float[Tensor, "b g t d"],
    beta: Float[Tensor, "b g t"],
    log_forget: Float[Tensor, "b h s"] | None = None,
    *,
    mask: Bool[Tensor, "... #t #s"] | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b g s d"]]:
    """(y, keys): causal softmax attention on the scores of `path_scores`, and the keys as the last token leaves them.

        score_ij = scale · q_iᵀ H_i H_{i−1} ⋯ H_{j+1} k_j + Σ_{j<s≤i} log_forget_s        H_s = I − β_s w_s w_sᵀ

    log_forget  logarithms of forget gates in (0, 1), one for each key: PaTH-FoX
    mask        see `attention`; scale is 1/√d unless given
    chunk_size  changes the speed, never the result

    Everything is computed in float32 or better. The keys stay in it: a cache of rounded ones would drift.
    Raises ConfigError where shapes don't fit, s < t, or chunk_size is below 1.
    Yang et al., "PaTH Attention", arXiv:2505.16381; the gate: Lin et al., "Forgetting Transformer", arXiv:2503.02130.
    """
    t, s, wide = q.shape[2], k.shape[2], at_least_float32(q.dtype)
    scores, keys = path_scores(*(x.to(wide) for x in (q, k, w, beta)), chunk_size=chunk_size)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if log_forget is not None:
        since = log_forget.to(wide).cumsum(-1)
        scores = scores + since[..., s - t :, None] - since[..., None, :]
    weights = masked_softmax(scores, both(visible(t, s, True, None, q.device), mask))
    y = torch.einsum("bgrts,bgse->bgrte", weights.unflatten(1, (k.shape[1], -1)), v.to(wide)).flatten(1, 2)
    return y.to(q.dtype), keys


def path_scores(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    w: Float[Tensor, "b g t d"],
    beta: Float[Tensor, "b g t"],
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b h t s"], Float[Tensor, "b g s d"]]:
    """(scores, keys): q_iᵀ H_i ⋯ H_{j+1} k_j, or 0 for a key after the query, and each key as turned by every later w.

    The last t keys belong to the t queries. Those before them come as an earlier call returned them, turned by all
    that precedes the first w: a chunk of a text and a step of decoding are the same thing.
    """
    keys, rows = k[:, :, : k.shape[2] - q.shape[2]], []
    parts = (x.split(chunk_size, 2) for x in (q, k[:, :, k.shape[2] - q.shape[2] :], w, beta))
    for q_z, k_z, w_z, beta_z in zip(*parts, strict=True):
        scores, keys = _turn_at_once(q_z, torch.cat([keys, k_z], 2), w_z, beta_z)
        rows.append(F.pad(scores, (0, k.shape[2] - keys.shape[2])))
    return torch.cat(rows, 2), keys


def _turn_at_once(q, k, w, beta):
    """Step i takes u_ij w_i away from each key j before it, u_ij = β_i w_i·(k_j − Σ_r u_rj w_r), r from j + 1 to i − 1:
    a unitriangular system (the UT transform), whose solution gives every score and every key."""
    past, beta = k.shape[2] - q.shape[2], beta.unsqueeze(-1)
    before = beta * (w @ k.mT).tril(past - 1)
    # the ones on the diagonal are implied
    u = torch.linalg.solve_triangular((beta * (w @ w.mT)).tril(-1), before, upper=False, unitriangular=True)
    groups = q.unflatten(1, (k.shape[1], -1))
    turned = (groups @ w.mT.unsqueeze(2)).tril() @ u.unsqueeze(2)
    scores = groups @ k.mT.unsqueeze(2) - turned
    return scores.flatten(1, 2).tril(past), k - u.mT @ w


@path_attention.check
def _fits(q, k, v, w, beta, log_forget=None, *, mask=None, scale=None, chunk_size=64):
    check_shapes(q, k, v, True, None)
    want = (*k.shape[:2], q.shape[2], q.shape[3])
    require(w.shape == want, f"w is {tuple(w.shape)}, and must be {want}: one direction for each key head and query")
    require(beta.shape == want[:3], f"beta is {tuple(beta.shape)}, and must be {want[:3]}, as w without its width")
    gates = (*q.shape[:2], k.shape[2])
    if log_forget is not None:
        shape = tuple(log_forget.shape)
        require(shape == gates, f"log_forget is {shape}, and must be {gates}: one gate for each query head and key")
    require(chunk_size >= 1, f"chunk_size is {chunk_size}, and must be at least 1")


def path_attention_recurrent(q, k, v, w, beta, log_forget=None):
    """`path_attention` token by token: turn the keys so far, add the new one, attend."""
    repeat, ys = q.shape[1] // k.shape[1], []
    k, v, w, beta = (x.repeat_interleave(repeat, 1) for x in (k, v, w, beta))
    keys = k[:, :, :0]
    for i in range(q.shape[2]):
        along = torch.einsum("bhsd,bhd->bhs", keys, w[:, :, i])
        keys = keys - torch.einsum("bh,bhs,bhd->bhsd", beta[:, :, i], along, w[:, :, i])
        keys = torch.cat([keys, k[:, :, i : i + 1]], 2)
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, i], keys) * q.shape[-1] ** -0.5
        if log_forget is not None:
            scores = scores + torch.stack([log_forget[:, :, j + 1 : i + 1].sum(-1) for j in range(i + 1)], -1)
        ys.append(torch.einsum("bhs,bhse->bhe", scores.softmax(-1), v[:, :, : i + 1]))
    return torch.stack(ys, 2)


class PaTHAttention(nn.Module):
    """o_proj(path_attention(q_proj x, k_proj x, v_proj x)): attention that knows positions by what stands between.

    w = u/|u|, u = silu(conv(w_proj x)), and β = 2σ(beta_proj x), one of each for every key head: w_s is what token s
    mirrors (β = 2), erases (β = 1) or leaves (β = 0) in the keys before it.

    num_kv_heads, head_dim  see `Attention`
    w_rank       rank of w_proj, None for a full matrix
    d_conv       how many tokens the convolution sees: the token and the d_conv − 1 before it
    forget_gate  σ(forget_proj x) for each query head, as in the Forgetting Transformer: PaTH-FoX

    Its state: "k", turned by every token so far and in float32 or better, "v", "log_forget", and "conv", the last
    d_conv − 1 inputs of the convolution. arXiv:2505.16381, sections 2 and 3.4; the SiLU is its authors' code's.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        w_rank: int | None = 32,
        d_conv: int = 3,
        forget_gate: bool = False,
    ):
        super().__init__()
        check_heads(d_model, num_heads, num_kv_heads, head_dim)
        require_counts(w_rank=w_rank, d_conv=d_conv)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim, self.cache = head_dim or d_model // num_heads, GrowingCache()
        q_width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, n, bias=False) for n in (q_width, *[kv_width] * 2))
        widths = (d_model, kv_width) if w_rank is None else (d_model, w_rank, kv_width)
        self.w_proj = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in zip(widths, widths[1:], strict=False)))
        self.w_conv = nn.Conv1d(kv_width, kv_width, d_conv, groups=kv_width, bias=False)
        self.beta_proj = nn.Linear(d_model, self.num_kv_heads)
        self.forget_proj = nn.Linear(d_model, num_heads) if forget_gate else None
        self.o_proj = nn.Linear(q_width, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        init_linears_(self, std)

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        context, wide = Context() if context is None else context, at_least_float32(x.dtype)
        start, t = tokens_seen(state), x.shape[1]
        mask = context_mask(context, None, start, t, start + t)
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        w, beta = self._directions(x, state, context), 2 * torch.sigmoid(self.beta_proj(x).to(wide)).mT
        kept = [k.to(wide), v]
        if self.forget_proj is not None:
            kept.append(F.logsigmoid(self.forget_proj(x).to(wide)).mT.unsqueeze(-1))
        if state is not None:
            kept = self.cache.update(state, **dict(zip(("k", "v", "log_forget"), kept, strict=False)))
        k, v, *forget = kept
        y, k = path_attention(q, k, v, w, beta, *(f.squeeze(-1) for f in forget), mask=mask)
        if state is not None:
            state["k"][:, :, : start + t] = k
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _directions(self, x: Tensor, state: dict | None, context: Context) -> Float[Tensor, "b g t d"]:
        """w, of length 1. The convolution sees zeros before the text, on padding and beyond the document's start."""
        t, back = x.shape[1], self.w_conv.kernel_size[0] - 1
        u = self.w_proj(x)
        if context.valid is not None:
            u = u.masked_fill(~context.valid[:, -t:, None], 0)
        u = F.pad(u, (0, 0, back, 0)) if state is None or "conv" not in state else torch.cat([state["conv"], u], 1)
        if state is not None:
            state["conv"] = u[:, t:].clone()
        seen = u.unfold(1, back + 1, 1)
        if context.documents is not None:
            own = F.pad(context.documents, (back, 0), value=-1)[:, -t - back :].unfold(1, back + 1, 1)
            seen = seen.masked_fill((own != own[..., -1:]).unsqueeze(2), 0)
        w = F.silu(torch.einsum("btdi,di->btd", seen, self.w_conv.weight.squeeze(1)))
        w = w.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return F.normalize(w.to(at_least_float32(w.dtype)), dim=-1)
