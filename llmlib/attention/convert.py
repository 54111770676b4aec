"""Surgery on trained attention: fewer key/value heads, and smaller logits."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.attention.functional import visible
from llmlib.attention.layer import Attention
from llmlib.attention.mla import MLA
from llmlib.errors import require


@torch.no_grad()
def to_grouped(attention: Attention, num_kv_heads: int) -> Attention:
    """A copy with fewer key/value heads, each the mean of those it replaces: the start of uptraining MHA into GQA.

    Ainslie et al., arXiv:2305.13245, section 2.1. ConfigError when the heads don't divide.
    """
    g = attention.num_kv_heads
    require(attention.kv_from is None, f"this layer has no keys of its own: kv_from is {attention.kv_from!r}")
    require(1 <= num_kv_heads <= g and g % num_kv_heads == 0, f"{g} key/value heads don't pool into {num_kv_heads}")
    require(
        attention.k_norm is None or attention.qk_norm_over == "head", "norms with gains for each head can't be pooled"
    )
    pooled = copy.deepcopy(attention)
    pooled.num_kv_heads = num_kv_heads
    for name in ("k_proj", "v_proj"):
        old = getattr(attention, name)
        new = nn.Linear(old.in_features, num_kv_heads * attention.head_dim, bias=old.bias is not None)
        setattr(pooled, name, new.to(old.weight))
        for to, value in zip(new.parameters(), old.parameters(), strict=True):
            heads = value.unflatten(0, (num_kv_heads, g // num_kv_heads, attention.head_dim))
            to.copy_(heads.mean(1).flatten(0, 1))
            to.requires_grad_(value.requires_grad)
    return pooled


@torch.no_grad()
def max_logits(layer: Attention | MLA, x: Float[Tensor, "b t d"]) -> Float[Tensor, "h"]:
    """Each head's largest score, scale · q·k before any soft cap, over the visible pairs of a text; for `qk_clip_`."""
    q, k = layer.queries_keys(x)
    scale = q.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    allowed = visible(x.shape[1], x.shape[1], getattr(layer, "causal", True), getattr(layer, "window", None), x.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.amax((0, 2, 3))


@torch.no_grad()
def qk_clip_(layer: Attention | MLA, logits: Float[Tensor, "h"], limit: float = 100.0) -> Float[Tensor, "h"]:
    """Shrink the weights of each head whose largest logit passed `limit` by γ = limit / logit, in place; returns γ.

    Queries and keys take √γ each. In MLA the rotary key is shared by all heads, so there the query takes γ whole. Keys
    shared by a group take the root of the group's smallest γ, and each query the rest of its own.
    ConfigError for a limit of 0 or less, and for a layer with a QK-norm.
    MuonClip of "Kimi K2: Open Agentic Intelligence", arXiv:2507.20534.
    """
    require(limit > 0, f"limit is {limit}, and must be above 0")
    gamma = torch.where(logits > limit, limit / logits, 1.0)
    if isinstance(layer, MLA):
        _clip_mla(layer, gamma)
        return gamma
    require(layer.q_norm is None, "QK-clip scales projections, and a QK-norm behind them would undo it")
    shared = gamma.unflatten(0, (layer.num_kv_heads, -1)).amin(1).sqrt()
    for_q = gamma / shared.repeat_interleave(layer.num_heads // layer.num_kv_heads)
    for proj, factor in ((layer.q_proj, for_q), (layer.k_proj, shared)):
        for parameter in proj.parameters():
            parameter.unflatten(0, (len(factor), -1)).mul_(factor.view(-1, *[1] * parameter.ndim))
    return gamma


def _clip_mla(layer: MLA, gamma: Tensor) -> None:
    up_q = layer.q_proj if layer.q_latent_dim is None else layer.q_b_proj
    q = up_q.weight.unflatten(0, (layer.num_heads, -1))
    q[:, : layer.head_dim] *= gamma.sqrt()[:, None, None]
    q[:, layer.head_dim :] *= gamma[:, None, None]
    layer.kv_b_proj.weight.unflatten(0, (layer.num_heads, -1))[:, : layer.head_dim] *= gamma.sqrt()[:, None, None]
