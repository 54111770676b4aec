"""Multi-head latent attention: keys and values live in one small vector per token (DeepSeek-V2, arXiv:2405.04434)."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.attention.cache import CACHES, make_cache, tokens_seen
from llmlib.attention.functional import attention
from llmlib.attention.layer import context_mask, lengths_so_far, places_of_new
from llmlib.context import Context
from llmlib.errors import require, require_counts
from llmlib.norm import RMSNorm, at_least_float32, init_linears_
from llmlib.position import RoPE, rope, yarn_mscale


class MLA(nn.Module):
    """c = norm(W_DKV x) is kept for each token; head h has k = [W_UK c; k_rope] and v = W_UV c.

    A score is (W_UK c)·q = c·(W_UKᵀ q), so W_UK can move to the query and W_UV behind the weighted sum: then the cache
    is read as it is, by all heads, like a single wide head (absorbed). With many queries it is cheaper to expand c to
    every head's keys and values once (expanded). RoPE stands between W_UK and q and would block the move, so `d_rope`
    extra numbers carry it, with one key shared by all heads.

    kv_latent_dim  width of c; q_latent_dim  queries come from a latent too, None for a plain q_proj
    head_dim       width of a head's query and key without RoPE; v_head_dim  of its value, head_dim unless given
    d_rope         width that turns (0: no positions); rope_theta, rope_interleaved, rope_scaling  see `Attention`
    norm           spec of the norm on the latents; bias  biases of the down maps and o_proj
    scale          1/√(head_dim + d_rope), times YaRN's mscale² where rope_scaling has mscale_all_dim, unless given
    absorb         True or False forces a form; None takes the one with fewer multiplications
    cache          "float" or "int8"

    Kept for each token: kv_latent_dim + d_rope numbers. ConfigError for sizes below 1 and an odd d_rope.
    "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", arXiv:2405.04434.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        kv_latent_dim: int,
        head_dim: int,
        d_rope: int,
        q_latent_dim: int | None = None,
        v_head_dim: int | None = None,
        rope_theta: float = 10000.0,
        rope_interleaved: bool = False,
        rope_scaling: Mapping | None = None,
        norm: Callable[[int], nn.Module] = RMSNorm,
        bias: bool = False,
        scale: float | None = None,
        absorb: bool | None = None,
        cache: str = "float",
    ):
        super().__init__()
        require_counts(num_heads=num_heads, kv_latent_dim=kv_latent_dim, head_dim=head_dim, q_latent_dim=q_latent_dim)
        require_counts(v_head_dim=v_head_dim)
        require_counts(0, d_rope=d_rope)
        require(scale is None or math.isfinite(scale), f"scale is {scale}, and must be finite")
        require(cache in CACHES, f"cache is {cache!r}; choose one of {', '.join(CACHES)}")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.kv_latent_dim, self.d_rope, self.absorb = kv_latent_dim, d_rope, absorb
        self.rope = RoPE(d_rope, rope_theta, rope_scaling) if d_rope else None
        self.rope_interleaved = rope_interleaved
        scaling = rope_scaling or {}
        stretch = yarn_mscale(scaling.get("factor") or 1.0, scaling.get("mscale_all_dim") or 0.0)
        self.scale = (head_dim + d_rope) ** -0.5 * stretch**2 if scale is None else scale
        self.cache = make_cache(None, cache)

        q_width = num_heads * (head_dim + d_rope)
        if q_latent_dim is None:
            self.q_proj = nn.Linear(d_model, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(d_model, q_latent_dim, bias=bias)
            self.q_a_norm = norm(q_latent_dim)
            self.q_b_proj = nn.Linear(q_latent_dim, q_width, bias=False)
        self.q_latent_dim = q_latent_dim
        self.kv_a_proj = nn.Linear(d_model, kv_latent_dim + d_rope, bias=bias)
        self.kv_a_norm = norm(kv_latent_dim)
        self.kv_b_proj = nn.Linear(kv_latent_dim, num_heads * (head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        init_linears_(self, std)

    def forward(
        self, x: Float[Tensor, "b t d"], state: dict | None = None, context: Context | None = None
    ) -> Float[Tensor, "b t d"]:
        context = Context() if context is None else context
        start = tokens_seen(state)
        source = self._query_source(x)
        q, kept = self._queries_latents(x, source, start, state, context)
        absorb = self._absorbing_is_cheaper(q.shape[2], kept.shape[2]) if self.absorb is None else self.absorb
        attend = self._absorbed if absorb else self._expanded
        y = attend(q, kept, self._choose_op(x, source, q, kept, start, state, context))
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _query_source(self, x: Tensor) -> Tensor:
        """What the queries are made from: x, or its latent."""
        return x if self.q_latent_dim is None else self.q_a_norm(self.q_a_proj(x))

    def _choose_op(self, x, source, q, kept, start: int, state: dict | None, context: Context) -> Callable:
        """The op that takes queries, keys and values, with all else that it needs."""
        mask = context_mask(context, None, start, q.shape[2], kept.shape[2])
        return partial(attention, mask=mask, scale=self.scale)

    def _queries_latents(self, x: Tensor, source: Tensor, start: int, state: dict | None, context: Context):
        """q (b h t head_dim + d_rope) and what the cache holds, [c; k_rope] (b 1 s l + d_rope), both turned."""
        q = self.q_proj(source) if self.q_latent_dim is None else self.q_b_proj(source)
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj(x)[:, None].split([self.kv_latent_dim, self.d_rope], -1)
        latent = self.kv_a_norm(latent)
        if self.rope is not None and self.rope.grows:
            return self._turn_all(q, torch.cat([latent, k_rope], -1), start, state, context)
        if self.rope is not None:
            angles = self.rope(start, q, context)
            q, k_rope = self._turn(q, self.head_dim, angles), self._turn(k_rope, 0, angles)
        kept = torch.cat([latent, k_rope], -1)
        if state is not None:
            (kept,) = self.cache.update(state, latent=kept)
        return q, kept

    def _turn(self, x: Tensor, first: int, angles) -> Tensor:
        """Turn x from number `first` on."""
        turned = rope(x[..., first:], *angles, interleaved=self.rope_interleaved)
        return torch.cat([x[..., :first], turned], -1) if first else turned

    def _turn_all(self, q: Tensor, kept: Tensor, start: int, state: dict | None, context: Context):
        """As `Attention` does: unturned keys are kept where the frequencies depend on the text's length."""
        at = places_of_new(q, start, context)
        kept_at, dtype = at[:, None, :, None], at_least_float32(q.dtype)
        if state is not None:
            kept, kept_at = self.cache.update(state, latent=kept, at=kept_at)
        kept_at = kept_at[:, 0, :, 0]
        of_q, of_k = lengths_so_far(kept_at, None, start, q.shape[2], context)
        q = self._turn(q, self.head_dim, self.rope.angles(at, dtype, of_q))
        return q, self._turn(kept, self.kv_latent_dim, self.rope.angles(kept_at, dtype, of_k))

    def _absorbing_is_cheaper(self, t: int, s: int) -> bool:
        """Multiplications per head and text: expanding s latents against turning t queries and outputs into latents."""
        up = self.kv_latent_dim * (self.head_dim + self.v_head_dim)
        expanded = s * up + t * s * (self.head_dim + self.d_rope + self.v_head_dim)
        return t * up + t * s * (2 * self.kv_latent_dim + self.d_rope) < expanded

    def _expand(self, kept: Tensor) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s e"]]:
        """Every head's keys and values from the latents."""
        up = self.kv_b_proj(kept[:, 0, :, : self.kv_latent_dim]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = up.split([self.head_dim, self.v_head_dim], -1)
        k_rope = kept[..., self.kv_latent_dim :].expand(-1, self.num_heads, -1, -1)
        return torch.cat([k, k_rope], -1), v

    def _expanded(self, q: Tensor, kept: Tensor, op: Callable) -> Float[Tensor, "b h t e"]:
        return op(q, *self._expand(kept))

    def _absorbed(self, q: Tensor, kept: Tensor, op: Callable) -> Float[Tensor, "b h t e"]:
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split([self.head_dim, self.v_head_dim], 1)
        q_latent = torch.einsum("bhtd,hdl->bhtl", q[..., : self.head_dim], w_uk)
        q = torch.cat([q_latent, q[..., self.head_dim :]], -1)
        # the kept vectors serve as values whole: slicing the small result is cheaper than copying the cache
        y = op(q, kept, kept)[..., : self.kv_latent_dim]
        return torch.einsum("bhtl,hel->bhte", y, w_uv)

    def queries_keys(self, x: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b h t _"], Float[Tensor, "b h t _"]]:
        """The queries and expanded keys of a text, as the scores see them."""
        q, kept = self._queries_latents(x, self._query_source(x), 0, None, Context())
        return q, self._expand(kept)[0]
