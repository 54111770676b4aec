"""Upcycling: a trained dense model becomes the start of a mixture of experts."""

import torch
from torch import nn

from llmlib.errors import require
from llmlib.moe.layer import MoE


@torch.no_grad()
def upcycle(dense: nn.Module, sparse: nn.Module) -> None:
    """Fill `sparse` from `dense`: each expert starts as a copy of the dense feed-forward, everything else as it was.

    dense, sparse  two models, or two feed-forwards, that differ only in that `MoE` stands where a feed-forward stood

    Routers keep their fresh weights, and shared experts start by adding nothing (their last map is set to 0). Where
    the weights of a token's experts sum to 1 (norm_topk_prob, or softmax_of_top_k) the new model computes exactly what
    the dense one did; the experts then part in training. Raises ConfigError for any parameter that finds no source of
    its shape, or no place in `sparse`, which then stays as it was.
    Komatsuzaki et al., "Sparse Upcycling", arXiv:2212.05055.
    """
    source = dict(dense.named_parameters())
    unused = set(source)
    fresh, filled, silenced = set(), [], []
    for moe in [m for m in sparse.modules() if isinstance(m, MoE)]:
        parts = (moe.router, moe.shared_experts, moe.shared_expert_gate)
        fresh |= {id(p) for part in parts if part is not None for p in part.parameters()}
        if moe.shared_experts is not None:
            silenced += moe.shared_experts.down_proj.parameters()
    for name, parameter in sparse.named_parameters():
        if id(parameter) in fresh:
            continue
        origin = source.get(name.replace("experts.", ""))
        unused.discard(name.replace("experts.", ""))
        fits = origin is not None and origin.shape == parameter.shape[-origin.ndim :]
        require(
            fits,
            f"{name} {tuple(parameter.shape)} can't be filled: the dense model has "
            f"{'no such parameter' if origin is None else f'one of shape {tuple(origin.shape)}'}. "
            f"Give the experts the width of the dense feed-forward, and leave all else as it is",
        )
        filled.append((parameter, origin))
    require(not unused, f"{', '.join(sorted(unused))} of the dense model would be lost: it has no place in the new")
    for parameter, origin in filled:
        parameter.copy_(origin.expand_as(parameter))
    for parameter in silenced:
        parameter.zero_()
