"""Attention as a mixer: projections around the op, rotary positions, and a cache in the layer's state."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlib.attention.cache import CACHES, make_cache, tokens_seen
from llmlib.attention.functional import attention, both
from llmlib.context import Context, positions_in_text
from llmlib.errors import require, require_counts, require_positive
from llmlib.norm import at_least_float32, init_linears_
from llmlib.position import RoPE, given_positions, rope

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Attention(nn.Module):
    """o_proj(attention(q_proj x, k_proj x, v_proj x)) with any number of key/value heads: MHA, GQA or MQA.

    num_kv_heads      heads of keys and values (num_heads: MHA, 1: MQA, between: GQA)
    head_dim          d_model / num_heads unless given
    causal            False for an encoder
    rope_theta        base of the rotary positions, None for none; rope_dim  how much of a head turns (partial RoPE);
                      rope_interleaved  the paper's layout of pairs; rope_scaling  see `llmlib.position.RoPE`
    position_bias     spec of a bias on the scores: ALiBi or T5Bias
    window            a query sees itself and the window − 1 tokens before; the cache is a ring of that size
    bias              biases of q_proj, k_proj, v_proj: all, none, or the names of those that have one;
                      out_bias  bias of o_proj, like `bias` unless given
    qk_norm           spec of a norm on queries and keys before RoPE (arXiv:2010.04245); qk_norm_over  "head" (one gain
                      for all heads), "each" (a gain per head) or "width" (all heads as one vector, OLMo 2);
                      qk_norm_after_rope  norm after turning
    softcap, scale    see `attention`
    sinks             a learned logit per head that draws weight away (gpt-oss, arXiv:2508.10925)
    gate              "elementwise" or "head": y ⊙ σ(gate_proj x) before o_proj (arXiv:2505.06708)
    clip_qkv          clamp queries, keys and values to ± this (OLMo, DBRX)
    cache             "float" keeps keys and values as they are, "int8" in 8 bits with a scale per token and head
    kv_name, kv_from  give this layer's keys and values a name, or use those of the layer so named (arXiv:2405.05254)
    d_out             width of the output, if not d_model

    ConfigError for heads that don't divide, sizes below 1, odd rope_dim, a context that doesn't cover the text, and for
    a state where not causal; ValueError for the state of another layer or batch.
    Vaswani et al., "Attention Is All You Need", arXiv:1706.03762; grouped: Ainslie et al., "GQA", arXiv:2305.13245.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rope_theta: float | None = None,
        rope_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_scaling: Mapping | None = None,
        position_bias: Callable[[int], nn.Module] | None = None,
        window: int | None = None,
        bias: bool | tuple[str, ...] = False,
        out_bias: bool | None = None,
        qk_norm: Callable[..., nn.Module] | None = None,
        qk_norm_over: str = "head",
        qk_norm_after_rope: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        gate: str | None = None,
        clip_qkv: float | None = None,
        cache: str = "float",
        kv_name: str | None = None,
        kv_from: str | None = None,
        d_out: int | None = None,
    ):
        super().__init__()
        check_heads(d_model, num_heads, num_kv_heads, head_dim)
        require_counts(window=window, d_out=d_out)
        require_positive(softcap=softcap, clip_qkv=clip_qkv)
        require(scale is None or math.isfinite(scale), f"scale is {scale}, and must be finite")
        require(cache in CACHES, f"cache is {cache!r}; choose one of {', '.join(CACHES)}")
        require(gate in (None, "elementwise", "head"), f"gate is {gate!r}; choose 'elementwise', 'head' or None")
        require(
            qk_norm_over in ("head", "each", "width"),
            f"qk_norm_over is {qk_norm_over!r}; choose 'head', 'each' or 'width'",
        )
        require(
            not qk_norm_after_rope or (qk_norm is not None and qk_norm_over != "width"),
            f"qk_norm_after_rope needs a qk_norm over single heads: qk_norm is {qk_norm}, over {qk_norm_over!r}",
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.causal, self.window, self.softcap, self.scale = causal, window, softcap, scale
        self.qk_norm_over, self.qk_norm_after_rope, self.clip_qkv = qk_norm_over, qk_norm_after_rope, clip_qkv
        self.kv_name, self.kv_from, self.gate = kv_name, kv_from, gate
        self.rope_interleaved = rope_interleaved
        self.rope = make_rope(self.head_dim, rope_dim, rope_theta, rope_scaling)
        require(
            not (self.rope and self.rope.grows and (kv_name or kv_from)),
            f"layers can't share keys under {rope_scaling}: its frequencies change as the text grows",
        )
        self.position_bias = position_bias and position_bias(num_heads)
        self.cache = make_cache(window if causal else None, cache)

        q_width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        has_bias = which_biases(bias)
        self.q_proj = nn.Linear(d_model, q_width, bias=has_bias["q_proj"])
        if kv_from is None:
            self.k_proj = nn.Linear(self._key_source(d_model), kv_width, bias=has_bias["k_proj"])
            self.v_proj = nn.Linear(self._key_source(d_model), kv_width, bias=has_bias["v_proj"])
        self.o_proj = nn.Linear(
            q_width, d_model if d_out is None else d_out, bias=has_bias["o_proj"] if out_bias is None else out_bias
        )
        self.gate_proj = gate and nn.Linear(d_model, q_width if gate == "elementwise" else num_heads, bias=False)
        self.q_norm = qk_norm and self._make_norm(qk_norm, num_heads)
        self.k_norm = qk_norm and kv_from is None and self._make_norm(qk_norm, self.num_kv_heads) or None
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.reset_parameters()

    def _key_source(self, d_model: int) -> int:
        return d_model

    def _make_norm(self, norm: Callable[..., nn.Module], heads: int) -> nn.Module:
        if self.qk_norm_over == "each":
            return norm(self.head_dim, num_heads=heads)
        return norm(self.head_dim * (heads if self.qk_norm_over == "width" else 1))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases and sinks 0."""
        init_linears_(self, std)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d_out"]:
        context = Context() if context is None else context
        require(self.causal or state is None, "bidirectional attention reads a text at once and keeps no state")
        start = tokens_seen(state)
        q = self._heads(x, self.q_proj, self.q_norm, self.num_heads)
        q, k, v, index = self._keys_values(q, x, start, state, context)
        y = self._attend(q, k, v, index, start, context).transpose(1, 2)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate_proj(x)).view(*x.shape[:2], self.num_heads, -1)
        return self.o_proj(y.flatten(2))

    def _attend(self, q, k, v, index: Tensor | None, start: int, context: Context) -> Float[Tensor, "b h t d"]:
        """The op with this layer's options. A layer that chooses among its keys has another here."""
        return attention(
            q, k, v, causal=self.causal and index is None, window=self.window if index is None else None,
            mask=context_mask(context, index, start, q.shape[2], k.shape[2]),
            bias=self._bias(index, start, q, k, context), sinks=self.sinks, softcap=self.softcap, scale=self.scale,
        )  # fmt: skip

    def _heads(self, x: Tensor, proj: nn.Linear, norm: nn.Module | None, heads: int) -> Float[Tensor, "b h t d"]:
        y = proj(x)
        if norm is not None and self.qk_norm_over == "width":
            y = norm(y)
        if self.clip_qkv is not None:
            y = y.clamp(-self.clip_qkv, self.clip_qkv)
        y = y.unflatten(-1, (heads, -1))
        if norm is not None and self.qk_norm_over != "width" and not self.qk_norm_after_rope:
            y = norm(y)
        return y.transpose(1, 2)

    def _keys_values(self, q, x, start: int, state: dict | None, context: Context):
        """(q, k, v, index): queries and keys turned, and where the keys stand if they don't come in order."""
        if self.kv_from is not None:
            return self._borrow(q, start, state, context)
        t, index = x.shape[1], None
        k = self._heads(x, self.k_proj, self.k_norm, self.num_kv_heads)
        v = self._heads(x, self.v_proj, None, self.num_kv_heads)
        if self.rope is not None and self.rope.grows:
            return self._turn_all(q, k, v, start, state, context)
        q, k = self._turn(q, k, start, context)
        if state is not None:
            k, v = self.cache.update(state, k=k, v=v)
            index = self.cache.index(start + t, t, k.shape[2], x.device) if self.window is not None and t == 1 else None
        if self.kv_name is not None:
            context.shared["kv", self.kv_name] = (k, v, index), self.window
        return q, k, v, index

    def _turn(self, q: Tensor, k: Tensor | None, start: int, context: Context):
        if self.rope is not None:
            angles = self.rope(start, q, context)
            q = rope(q, *angles, interleaved=self.rope_interleaved)
            k = k if k is None else rope(k, *angles, interleaved=self.rope_interleaved)
        if self.qk_norm_after_rope:
            q, k = self.q_norm(q), k if k is None else self.k_norm(k)
        return q, k

    def _turn_all(self, q, k, v, start: int, state: dict | None, context: Context):
        """Keys are kept unturned where the frequencies depend on the text's length, and all are turned at each call."""
        t, index = q.shape[2], None
        at = places_of_new(q, start, context)
        kept_at = at[:, None, :, None]
        if state is not None:
            k, v, kept_at = self.cache.update(state, k=k, v=v, at=kept_at)
            index = self.cache.index(start + t, t, k.shape[2], q.device) if self.window is not None and t == 1 else None
        kept_at, dtype = kept_at[:, 0, :, 0], at_least_float32(q.dtype)
        of_q, of_k = lengths_so_far(kept_at, index, start, t, context)
        q = rope(q, *self.rope.angles(at, dtype, of_q), interleaved=self.rope_interleaved)
        k = rope(k, *self.rope.angles(kept_at, dtype, of_k), interleaved=self.rope_interleaved)
        if self.qk_norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, index

    def _borrow(self, q, start: int, state: dict | None, context: Context):
        """The keys and values of the layer whose kv_name this layer's kv_from is."""
        require(
            ("kv", self.kv_from) in context.shared,
            f"kv_from={self.kv_from!r}, but no earlier layer of this pass has kv_name={self.kv_from!r}",
        )
        kept, window = context.shared["kv", self.kv_from]
        require(
            window in (None, self.window),
            f"window is {self.window} in a layer with kv_from={self.kv_from!r}, and {window} in the layer that gives "
            "the keys: it must give all of them, or have the same window",
        )
        heads = kept[0].shape[1]
        require(
            heads == self.num_kv_heads,
            f"num_kv_heads is {self.num_kv_heads} in a layer with kv_from={self.kv_from!r}, and {heads} in the layer "
            "that gives the keys: they must be equal",
        )
        if state is not None:
            state["length"] = start + q.shape[2]
        return self._turn(q, None, start, context)[0], *kept

    def _bias(self, index, start: int, q: Tensor, k: Tensor, context: Context) -> Float[Tensor, "*b h t s"] | None:
        if self.position_bias is None:
            return None
        length, s = start + q.shape[2], k.shape[2]
        places = torch.arange(length, device=q.device)
        moved = context.valid is not None or context.documents is not None
        if moved and getattr(self.position_bias, "absolute", False):  # padding leaves distances as they are, not places
            places = positions_in_text(context.valid, context.documents)
        keys = places[..., length - s :] if index is None else places[..., index]
        return self.position_bias(places[..., start:], keys)

    def queries_keys(self, x: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b h t _"], Float[Tensor, "b g t _"]]:
        """The queries and keys of a text, as the scores see them."""
        q = self._heads(x, self.q_proj, self.q_norm, self.num_heads)
        return self._keys_values(q, x, 0, None, Context())[:2]


class CrossAttention(Attention):
    """Queries from x, keys and values from `context.memory`, such as an encoder's output; every query sees all of it.

    d_memory  width of the memory, if not d_model

    The other options are `Attention`'s. context.shared["memory_valid"] (b m), if there, is False on padding. The state
    keeps the keys and values of the first call's memory. ConfigError without a memory.
    Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, section 3.2.3.
    """

    def __init__(self, d_model: int, *, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None,
                 d_memory: int | None = None, bias: bool | tuple[str, ...] = False, out_bias: bool | None = None,
                 qk_norm: Callable[..., nn.Module] | None = None, softcap: float | None = None,
                 scale: float | None = None, gate: str | None = None):  # fmt: skip
        require_counts(d_memory=d_memory)
        self.d_memory = d_model if d_memory is None else d_memory
        super().__init__(
            d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=False, bias=bias,
            out_bias=out_bias, qk_norm=qk_norm, softcap=softcap, scale=scale, gate=gate,
        )  # fmt: skip

    def _key_source(self, d_model: int) -> int:
        return self.d_memory

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        memory = context and context.memory
        require(memory is not None, "cross-attention needs context.memory: pass the encoder's output")
        if state is None or "k" not in state:
            k = self._heads(memory, self.k_proj, self.k_norm, self.num_kv_heads)
            v = self._heads(memory, self.v_proj, None, self.num_kv_heads)
            if state is not None:
                state |= {"k": k, "v": v}
        else:
            k, v = state["k"], state["v"]
        q = self._heads(x, self.q_proj, self.q_norm, self.num_heads)
        valid = context.shared.get("memory_valid")
        mask = None if valid is None else valid[:, None, None]
        y = attention(q, k, v, causal=False, mask=mask, softcap=self.softcap, scale=self.scale).transpose(1, 2)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate_proj(x)).view(*x.shape[:2], self.num_heads, -1)
        return self.o_proj(y.flatten(2))


def check_heads(d_model: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> None:
    """ConfigError unless the heads divide."""
    require_counts(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    require(
        head_dim is not None or d_model % num_heads == 0,
        f"d_model = {d_model} doesn't divide into num_heads = {num_heads}: change one, or give head_dim",
    )
    require(
        num_kv_heads is None or num_heads % num_kv_heads == 0,
        f"num_heads = {num_heads} must be a multiple of num_kv_heads = {num_kv_heads}",
    )


def which_biases(bias) -> dict[str, bool]:
    """Which of the projections have one: all, none, or those named."""
    if isinstance(bias, bool):
        return dict.fromkeys(PROJECTIONS, bias)
    named = isinstance(bias, tuple | list) and set(bias) <= set(PROJECTIONS)
    require(named, f"bias is {bias!r}; give True, False or a tuple of names out of {', '.join(PROJECTIONS)}")
    return {name: name in bias for name in PROJECTIONS}


def make_rope(head_dim: int, rope_dim: int | None, theta: float | None, scaling: Mapping | None) -> RoPE | None:
    """The rotary positions of heads of this width, or None without a theta."""
    if theta is None:
        require(scaling is None, "rope_scaling is given without rope_theta, the base that it scales")
        return None
    require_counts(rope_dim=rope_dim)
    require(rope_dim is None or rope_dim <= head_dim, f"rope_dim = {rope_dim} is wider than head_dim = {head_dim}")
    return RoPE(head_dim if rope_dim is None else rope_dim, theta, scaling)


def context_mask(
    context: Context, index: Int[Tensor, "s"] | None, start: int, t: int, s: int
) -> Bool[Tensor, "b 1 #t s"] | None:
    """What the context forbids: padding as keys, and keys of another document. `index` says where the keys stand."""
    at = slice(start + t - s, None) if index is None else index
    valid = None if context.valid is None else covering(context.valid, start + t, "valid")[:, None, None, at]
    if context.documents is None:
        return valid
    documents = covering(context.documents, start + t, "documents")
    return both(valid, (documents[:, -t:, None] == documents[:, None, at])[:, None])


def places_of_new(q: Float[Tensor, "b h t d"], start: int, context: Context) -> Int[Tensor, "b t"]:
    """Where each new token stands: as the context says, or after the cached ones."""
    b, t = q.shape[0], q.shape[2]
    at = given_positions(context, t)
    return (torch.arange(start, start + t, device=q.device) if at is None else at).expand(b, t)


def lengths_so_far(
    kept_at: Int[Tensor, "b s"], index: Int[Tensor, "s"] | None, start: int, t: int, context: Context
) -> tuple[Int[Tensor, "b #t"], Int[Tensor, "b #s"]]:
    """How long the text is that each new and each kept token belongs to: the whole of it, or its document."""
    newest = slice(-t, None) if index is None else index.argmax()[None]
    if context.documents is None:
        length = kept_at[:, newest][:, -1:] + 1
        return length, length
    at = slice(start + t - kept_at.shape[1], None) if index is None else index
    _, which = covering(context.documents, start + t, "documents")[:, at].unique(return_inverse=True)
    last = kept_at.new_zeros(len(which), int(which.max()) + 1).scatter_reduce(1, which, kept_at, "amax")
    lengths = last.gather(1, which) + 1
    return lengths[:, newest], lengths


def covering(known: Tensor, length: int, name: str) -> Int[Tensor, "b s"] | Bool[Tensor, "b s"]:
    """`known`, if it covers the cached and the new tokens together."""
    require(known.shape[1] == length, f"context.{name} covers {known.shape[1]} tokens; cached and new are {length}")
    return known
