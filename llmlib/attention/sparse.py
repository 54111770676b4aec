"""Sparse attention: queries that choose which keys they meet. MoBA and NSA choose blocks, DeepSeek-V3.2 single tokens.

A choice is a list of indices, so no gradient passes through it: what makes it learns by another way, or not at all.
Everything here is the readable reference. It masks what wasn't chosen, and the mask saves nothing: a fused kernel that
reads only the chosen keys costs what `llmlib.cost` counts, n · B keys a query for n blocks of B.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from llmlib.attention.cache import GrowingCache, RingCache, part_of, tokens_seen
from llmlib.attention.functional import attention, both, masked_softmax
from llmlib.attention.layer import Attention, check_heads, context_mask, make_rope, places_of_new
from llmlib.attention.mla import MLA
from llmlib.context import Context
from llmlib.errors import require, require_counts
from llmlib.norm import LayerNorm, at_least_float32, init_linears_
from llmlib.ops import op
from llmlib.position import rope


@op
def selected_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s e"],
    chosen: Int[Tensor, "b c t n"],
    *,
    block_size: int = 1,
    padding: Int[Tensor, "b"] | None = None,
    mask: Bool[Tensor, "... #t #s"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t e"]:
    """Causal softmax attention of each query over the keys of its n chosen blocks; block j is the keys from j · B on.

    chosen  c = 1: the same for all heads; c = g: for each group; c = h: for each head. A block in the future adds
            nothing. `llmlib.cost` takes it that a query's own block is among them, or that B is 1.
    padding  how many keys stand before each text, whose first block begins behind them; `mask` must hide them
    mask, scale  see `attention`

    A fused kernel does t · n · B pairs per head; this one does all t · s. ConfigError when c doesn't divide h.
    By blocks: MoBA, arXiv:2502.13189, and NSA, arXiv:2502.11089; by tokens: DeepSeek-V3.2, arXiv:2512.02556.
    """
    h, s, c = q.shape[1], k.shape[2], chosen.shape[1]
    require(h % c == 0, f"{c} choices of blocks don't divide {h} query heads: make one for all, a group or a head")
    picked = chosen.new_zeros(*chosen.shape[:3], -(-s // block_size), dtype=torch.bool).scatter(-1, chosen, True)
    at = torch.arange(s, device=k.device)
    block = (at if padding is None else (at - padding[:, None, None, None]).clamp(min=0)) // block_size
    seen = picked.take_along_dim(block.expand(*chosen.shape[:3], s), -1).repeat_interleave(1 if c == 1 else h // c, 1)
    return attention(q, k, v, mask=both(seen, mask), scale=scale)


def choose(
    scores: Float[Tensor, "b c t n"],
    top_k: int,
    block_size: int,
    length: int,
    *,
    padding: Int[Tensor, "b"] | None = None,
    first: int = 0,
    local: int = 0,
) -> Int[Tensor, "b c t k"]:
    """The top_k of n blocks with the highest scores, for queries that stand at the end of `length` keys.

    Block 0 begins behind the `padding` of each text, if there is any.
    The `first` blocks of the text and the `local` last up to the query's own come before all others, blocks of the
    future after all. Of equal scores the earlier block wins, whatever the number of queries: so decoding chooses as
    training does.
    """
    t, n = scores.shape[2:]
    own = places_of_queries(t, length, padding, scores.device) // block_size
    block = torch.arange(n, device=scores.device)
    scores = scores.masked_fill((block < first) | (own - block < local), torch.inf)
    ranked = scores.masked_fill(block > own, -torch.inf).sort(dim=-1, descending=True, stable=True)
    return ranked.indices[..., :top_k]


def places_of_queries(
    t: int, length: int, padding: Int[Tensor, "b"] | None, device: torch.device
) -> Int[Tensor, "*b1 t 1"]:
    """Where in its own text each of t queries stands, the last at the end of `length` tokens; below 0 on padding."""
    at = torch.arange(length - t, length, device=device)[:, None]
    return at if padding is None else at - padding[:, None, None, None]


def padding_before(context: Context, name: str) -> Int[Tensor, "b"] | None:
    """How many tokens of padding stand before each text, None where no text has any.

    ConfigError for packed texts: those don't begin where a block does.
    """
    require(
        context.documents is None,
        f"{name} counts its blocks from the first token of a row, so it can't take context.documents: "
        f"give it one text in each row",
    )
    return None if context.valid is None else (context.valid.cumsum(1) == 0).sum(1)


def moved_up(x: Num[Tensor, "b g s d"], by: Int[Tensor, "b"] | None) -> Num[Tensor, "b g s d"]:
    """Each text moved so many places towards the front; what stood there comes round to the end."""
    if by is None:
        return x
    s = x.shape[2]
    at = (torch.arange(s, device=x.device) + by[:, None]) % max(s, 1)
    return x.take_along_dim(at[:, None, :, None], 2)


class MoBA(Attention):
    """Mixture of block attention: each query head attends to the `top_k` blocks whose mean key it matches best.

    s_i = q · mean(K of block i). The query's own block, read causally, is always one of the top_k, so top_k − 1 are of
    the past (the paper's top 3 of 512 tokens: two past blocks and the current one). The parameters are `Attention`'s,
    and with top_k ≥ the number of blocks so is the output. The choice has no parameters and passes no gradient.

    A fused kernel does t · top_k · block_size pairs, after t · s / block_size for the scores. The cache is that of
    `Attention`. The first block begins with the first token behind the padding; texts can't be packed.
    Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189.
    """

    def __init__(self, d_model: int, *, num_heads: int, block_size: int, top_k: int, num_kv_heads: int | None = None,
                 head_dim: int | None = None, rope_theta: float | None = None):  # fmt: skip
        require_counts(block_size=block_size, top_k=top_k)
        super().__init__(
            d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope_theta=rope_theta
        )
        self.block_size, self.top_k = block_size, top_k

    def _attend(self, q, k, v, index: Tensor | None, start: int, context: Context) -> Float[Tensor, "b h t d"]:
        t, s, padding = q.shape[2], k.shape[2], padding_before(context, "MoBA")
        mask = context_mask(context, index, start, t, s)
        scores = mean_key_scores(q, moved_up(k, padding), self.block_size)
        chosen = choose(scores, self.top_k, self.block_size, s, padding=padding, local=1)
        return selected_attention(q, k, v, chosen, block_size=self.block_size, padding=padding, mask=mask)


@op
def mean_key_scores(
    q: Float[Tensor, "b h t d"], k: Float[Tensor, "b g s d"], block_size: int
) -> Float[Tensor, "b h t n"]:
    """q · mean(k) for each block that is complete, and 0 for one at the end that isn't; in float32 or better.

    MoBA's score of a block, arXiv:2502.13189; it reads every key.
    """
    full, wide, groups = k.shape[2] // block_size, at_least_float32(q.dtype), k.shape[1]
    means = k[:, :, : full * block_size].to(wide).unflatten(2, (full, block_size)).mean(3)
    scores = torch.einsum("bgrtd,bgnd->bgrtn", q.to(wide).unflatten(1, (groups, -1)), means).flatten(1, 2)
    return F.pad(scores, (0, -(-k.shape[2] // block_size) - full))


@op
def compressed_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n e"],
    *,
    length: int,
    block_size: int,
    stride: int,
    padding: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t n"]]:
    """Softmax attention over summaries of blocks, and its weights; key i stands for tokens i · stride … + block_size.

    The queries are the last of `length` tokens, of which the first `padding` stand before the text; the tokens of a
    summary are counted from the text's first. A query sees a summary once its block has ended; where none has, zeros.
    The scores are q · k / √d, in float32 or better. Yuan et al., "Native Sparse Attention", arXiv:2502.11089.
    """
    t, n, groups = q.shape[2], k.shape[2], k.shape[1]
    wide = at_least_float32(q.dtype)
    if n == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1]), q.new_zeros(*q.shape[:3], 0, dtype=wide)
    ends = torch.arange(n, device=q.device) * stride + block_size - 1
    ended = places_of_queries(t, length, padding, q.device) >= ends
    scores = torch.einsum("bgrtd,bgnd->bgrtn", q.to(wide).unflatten(1, (groups, -1)), k.to(wide))
    weights = masked_softmax(scores.flatten(1, 2) * q.shape[-1] ** -0.5, ended)
    y = torch.einsum("bgrtn,bgne->bgrte", weights.unflatten(1, (groups, -1)), v.to(wide)).flatten(1, 2)
    return y.to(q.dtype), weights


def blocks_ended(length: int, block_size: int, stride: int) -> int:
    """How many blocks, one starting every `stride` tokens, have ended after `length` tokens."""
    return max(0, (length - block_size) // stride + 1)


class Compressor(nn.Module):
    """A summary of each block of l vectors, one block every `stride`: W₂ gelu(W₁ [x₀ + p₀ ; … ; x_{l−1} + p_{l−1}]).

    The paper asks for an MLP that knows the place inside the block, and gives no width: here it is the head's, and all
    heads share it.
    """

    def __init__(self, dim: int, block_size: int, stride: int):
        super().__init__()
        self.block_size, self.stride = block_size, stride
        self.position = nn.Parameter(torch.zeros(block_size, dim))
        self.block_proj = nn.Linear(block_size * dim, dim, bias=False)
        self.summary_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b g s d"]) -> Float[Tensor, "b g n d"]:
        if x.shape[2] < self.block_size:
            return x[:, :, :0]
        blocks = x.unfold(2, self.block_size, self.stride).mT + self.position
        return self.summary_proj(F.gelu(self.block_proj(blocks.flatten(-2))))


class NSA(nn.Module):
    """Native sparse attention: three branches with keys and values of their own, y = Σ_c σ(gate_c) ⊙ y_c per head.

    compressed  attention over a summary of each block of `compress_block` tokens, one every `compress_stride`
    selected    attention over `num_selected` blocks of `select_block` tokens: the first, the query's own and the one
                before it, and those that matter most. A block's importance is the sum of the compressed branch's
                weights over the heads of a group, each summary's counted once for every stride that it shares with the
                block: the group's heads choose alike, so that a kernel reads each key once for all of them
    window      the last `window` tokens

    The choice passes no gradient: importance is learnt through the compressed branch's own output. With rope_theta, a
    summary is made of unturned keys and turned by the place of its first token (the paper leaves this open). The gate
    is one linear map. The defaults are the paper's.

    Pairs per query and head in fused kernels: s / compress_stride + num_selected · select_block + window. The cache
    holds every token once (selected), a summary per compress_stride, the window, and what no summary covers yet. Blocks
    of all kinds are counted from the first token behind the padding; texts can't be packed.
    Yuan et al., "Native Sparse Attention", arXiv:2502.11089.
    """

    def __init__(self, d_model: int, *, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None,
                 compress_block: int = 32, compress_stride: int = 16, select_block: int = 64, num_selected: int = 16,
                 window: int = 512, rope_theta: float | None = None):  # fmt: skip
        super().__init__()
        check_heads(d_model, num_heads, num_kv_heads, head_dim)
        require_counts(
            compress_block=compress_block, compress_stride=compress_stride, select_block=select_block, window=window
        )
        require_counts(num_selected=num_selected)
        require(
            compress_block % compress_stride == 0 and select_block % compress_stride == 0,
            f"compress_block = {compress_block} and select_block = {select_block} must be multiples of "
            f"compress_stride = {compress_stride}",
        )
        require(
            compress_block <= select_block,
            f"compress_block = {compress_block} must be at most select_block = {select_block}",
        )
        require(num_selected >= 3, f"num_selected is {num_selected}, and 3 blocks are fixed: the first, the last two")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim, self.window = head_dim or d_model // num_heads, window
        self.compress_block, self.compress_stride = compress_block, compress_stride
        self.select_block, self.num_selected = select_block, num_selected
        self.rope = make_rope(self.head_dim, None, rope_theta, None)
        self.growing, self.ring = GrowingCache(), RingCache(window)
        q_width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, q_width, bias=False)
        self.k_proj = nn.Linear(d_model, 3 * kv_width, bias=False)
        self.v_proj = nn.Linear(d_model, 3 * kv_width, bias=False)
        self.gate_proj = nn.Linear(d_model, 3 * num_heads, bias=False)
        self.o_proj = nn.Linear(q_width, d_model, bias=False)
        self.compress_k = Compressor(self.head_dim, compress_block, compress_stride)
        self.compress_v = Compressor(self.head_dim, compress_block, compress_stride)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights and the positions inside a block from N(0, std²)."""
        init_linears_(self, std)
        for compressor in (self.compress_k, self.compress_v):
            nn.init.normal_(compressor.position, 0, std)

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        context = Context() if context is None else context
        b, t, _ = x.shape
        start, padding = tokens_seen(state), padding_before(context, "NSA")
        length, index = start + t, None
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        (k_cmp, k_sel, k_win), (v_cmp, v_sel, v_win) = (
            proj(x).unflatten(-1, (3, self.num_kv_heads, -1)).permute(2, 0, 3, 1, 4)
            for proj in (self.k_proj, self.v_proj)
        )
        at = places_of_new(q, start, context)
        if self.rope is not None:
            angles = self.rope(start, q, context)
            q, k_sel, k_win = (rope(z, *angles) for z in (q, k_sel, k_win))
        k_cmp, v_cmp = self._summaries(state, padding, k=k_cmp, v=v_cmp, at=at[:, None, :, None])
        if state is not None:
            k_sel, v_sel = self.growing.update(part_of(state, "selected"), k=k_sel, v=v_sel)
            k_win, v_win = self.ring.update(part_of(state, "window"), k=k_win, v=v_win)
            index = self.ring.index(length, t, k_win.shape[2], x.device) if t == 1 else None
            state["length"] = length
        y_cmp, weights = compressed_attention(
            q, k_cmp, v_cmp, length=length, block_size=self.compress_block, stride=self.compress_stride, padding=padding
        )
        y_sel = selected_attention(
            q, k_sel, v_sel, self._choose(weights, length, padding), block_size=self.select_block, padding=padding,
            mask=context_mask(context, None, start, t, length),
        )  # fmt: skip
        # one query sees all that the ring holds, in whatever order it lies there
        y_win = attention(
            q, k_win, v_win, causal=t > 1, window=self.window if t > 1 else None,
            mask=context_mask(context, index, start, t, k_win.shape[2]),
        )  # fmt: skip
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (3, self.num_heads)).permute(2, 0, 3, 1)
        y = sum(gate[..., None] * y for gate, y in zip(gates, (y_cmp, y_sel, y_win), strict=True))
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _summaries(self, state: dict | None, padding: Int[Tensor, "b"] | None, **new: Num[Tensor, "b _ t _"]):
        """Keys and values of all blocks that have ended. The state keeps them, and the tokens of those that haven't.

        In the state, block i of every text lies from i · stride on, give or take less than a stride: texts that don't
        begin at a multiple of it are moved up by what is left, and a block is kept when it has ended in each of them.
        """
        size, stride = self.compress_block, self.compress_stride
        ragged, done = 0 if padding is None else stride - 1, 0
        if state is not None:
            tail = part_of(state, "tail", 0)
            new = {name: torch.cat([tail[name], z], 2) if name in tail else z for name, z in new.items()}
            done = blocks_ended(new["k"].shape[2] - ragged, size, stride)
            tail |= {name: z[:, :, done * stride :].clone() for name, z in new.items()}
        k, v, at = (moved_up(z, padding if padding is None else padding % stride) for z in new.values())
        k, v = self.compress_k(k), self.compress_v(v)
        if self.rope is not None:
            places = at[:, 0, ::stride, 0][:, : k.shape[2]]
            k = rope(k, *self.rope.angles(places, at_least_float32(k.dtype)))
        if state is not None:
            reserve = blocks_ended(state.get("reserve", 0), size, stride)
            kept = self.growing.update(part_of(state, "summaries", reserve), k=k[:, :, :done], v=v[:, :, :done])
            k, v = (
                kept
                if padding is None
                else (torch.cat([a, z[:, :, done:]], 2) for a, z in zip(kept, (k, v), strict=True))
            )
        return tuple(moved_up(z, padding if padding is None else padding // stride) for z in (k, v))

    def _choose(
        self, weights: Float[Tensor, "b h t n"], length: int, padding: Int[Tensor, "b"] | None = None
    ) -> Int[Tensor, "b g t k"]:
        """The blocks each query reads, from the compressed branch's weights."""
        shared = weights.detach().unflatten(1, (self.num_kv_heads, -1)).sum(2)
        covers, strides = self.compress_block // self.compress_stride, self.select_block // self.compress_stride
        blocks = -(-length // self.select_block)
        # each stride takes the weights of the `covers` summaries that it is part of
        by_stride = F.pad(shared, (covers - 1, blocks * strides - shared.shape[-1])).unfold(-1, covers, 1).sum(-1)
        importance = by_stride.unflatten(-1, (blocks, strides)).sum(-1)
        return choose(importance, self.num_selected, self.select_block, length, padding=padding, first=1, local=2)


@op
def index_scores(
    q: Float[Tensor, "b h t d"], k: Float[Tensor, "b 1 s d"], weights: Float[Tensor, "b h t"]
) -> Float[Tensor, "b 1 t s"]:
    """The lightning indexer: I(t, s) = Σ_j w(t, j) ReLU(q(t, j) · k(s)) over h small heads that share one key.

    In float32 or better; DeepSeek's kernel multiplies in 8 bits. arXiv:2512.02556, equation 1.
    """
    wide = at_least_float32(q.dtype)
    products = torch.einsum("bhtd,bsd->bhts", q.to(wide), k[:, 0].to(wide))
    return torch.einsum("bht,bhts->bts", weights.to(wide), F.relu(products))[:, None]


def indexer_loss(scores: Float[Tensor, "b 1 t s"], weights: Float[Tensor, "b h t s"]) -> Float[Tensor, ""]:
    """KL(p ‖ softmax I), the mean over queries, in nats: p is attention's weights summed over heads and normalised.

    `scores` are −inf where a query can't look, or at all keys that it didn't choose. `weights` get no gradient.
    DeepSeek-V3.2, arXiv:2512.02556.
    """
    p = weights.detach().sum(1, keepdim=True)
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    log_q = scores.log_softmax(-1).masked_fill(p == 0, 0)
    return (torch.special.xlogy(p, p) - p * log_q).sum(-1).mean()


class Indexer(nn.Module):
    """What `index_scores` needs of a text: small queries from the queries' latent, one key and h weights from x.

    Queries and keys turn like attention's, in the split-half layout; the key has a LayerNorm before.
    """

    def __init__(self, d_model: int, d_source: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = nn.Linear(d_source, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, head_dim, bias=False)
        self.k_norm = LayerNorm(head_dim, eps=1e-6)
        self.weight_proj = nn.Linear(d_model, num_heads, bias=False)

    def forward(self, x: Float[Tensor, "b t d"], source: Float[Tensor, "b t e"], angles: tuple | None):
        q = self.q_proj(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x))[:, None]
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        return q, k, self.weight_proj(x).mT * (self.num_heads * self.head_dim) ** -0.5


class DSA(MLA):
    """DeepSeek sparse attention: MLA over the `top_k` tokens that a lightning indexer scores highest for each query.

    top_k         tokens a query attends to; all heads share the choice
    index_heads, index_dim  the indexer's heads and their width, whose first d_rope numbers turn
    The other options are `MLA`'s.

    The choice passes no gradient, and the indexer reads x detached, so the loss of the model never reaches it. In
    training mode a pass without a state leaves `auxiliary_loss`, `indexer_loss` over the chosen tokens: add it to the
    loss. It takes the weights of attention, so it costs as much as they do. With top_k ≥ the text's length all this is
    dense attention and the indexer's warm-up.

    A fused kernel does t · s products of width index_dim for each of index_heads, in 8 bits, then t · top_k pairs for
    each head. The cache holds index_dim numbers more per token than MLA's. DeepSeek-V3.2, arXiv:2512.02556.
    """

    def __init__(self, d_model: int, *, num_heads: int, kv_latent_dim: int, head_dim: int, d_rope: int,
                 top_k: int = 2048, index_heads: int = 64, index_dim: int = 128, q_latent_dim: int | None = None,
                 v_head_dim: int | None = None, rope_theta: float = 10000.0, rope_interleaved: bool = False,
                 rope_scaling: Mapping | None = None):  # fmt: skip
        super().__init__(
            d_model, num_heads=num_heads, kv_latent_dim=kv_latent_dim, head_dim=head_dim, d_rope=d_rope,
            q_latent_dim=q_latent_dim, v_head_dim=v_head_dim, rope_theta=rope_theta,
            rope_interleaved=rope_interleaved, rope_scaling=rope_scaling,
        )  # fmt: skip
        require_counts(top_k=top_k, index_heads=index_heads, index_dim=index_dim)
        require(
            index_dim >= d_rope,
            f"index_dim = {index_dim} must be at least d_rope = {d_rope}, the part of it that turns",
        )
        require(
            self.rope is None or not self.rope.grows,
            f"the indexer keeps turned keys, and under {rope_scaling} they would turn again as the text grows",
        )
        self.top_k = top_k
        self.indexer = Indexer(d_model, q_latent_dim or d_model, index_heads, index_dim)
        self.auxiliary_loss: Tensor | None = None
        self.reset_parameters()

    def __getstate__(self) -> dict:
        """Without what the last pass left, which can't be copied or pickled."""
        return {**self.__dict__, "auxiliary_loss": None}

    def _choose_op(self, x, source, q, kept, start: int, state: dict | None, context: Context) -> Callable:
        t, s = q.shape[2], kept.shape[2]
        angles = None if self.rope is None else self.rope(start, q, context)
        index_q, index_k, weights = self.indexer(x.detach(), source.detach(), angles)
        if state is not None:
            (index_k,) = self.cache.update(part_of(state, "index"), k=index_k)
        scores, mask = index_scores(index_q, index_k, weights), context_mask(context, None, start, t, s)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        chosen = choose(scores.detach(), self.top_k, 1, s)
        learns = self.training and torch.is_grad_enabled() and state is None
        self.auxiliary_loss = self._indexer_loss(scores, chosen, q, kept, mask) if learns else None
        return partial(selected_attention, chosen=chosen, mask=mask, scale=self.scale)

    def _indexer_loss(self, scores: Tensor, chosen: Tensor, q: Tensor, kept: Tensor, mask: Tensor | None) -> Tensor:
        causal = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        seen = both(causal & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True), mask)
        with torch.no_grad():
            wide = at_least_float32(q.dtype)
            products = torch.einsum("bhtd,bhsd->bhts", q.to(wide), self._expand(kept)[0].to(wide))
            weights = masked_softmax(products * self.scale, seen)
        return indexer_loss(scores.masked_fill(~seen, -torch.inf), weights)
