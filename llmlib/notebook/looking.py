"""Looking inside a model while it runs."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.attention import attention, visible
from llmlib.ops import metered


@torch.no_grad()
def attention_calls(model: nn.Module, *inputs, **options) -> list[tuple]:
    """What each attention receives that runs in `model(*inputs)`, in order: (q, k, v, its keyword arguments)."""
    found = []

    def watch(op, args, kwargs):
        if op.name == "attention":
            found.append((*args, kwargs))
        return op.run(*args, **kwargs)

    with metered(watch):
        model(*inputs, **options)
    return found


@torch.no_grad()
def attention_weights(model: nn.Module, *inputs, **options) -> list[Float[Tensor, "b h t s"]]:
    """The softmax weights of every attention that runs in `model(*inputs)`, in order.

    Attention is linear in the values, so with the identity matrix for values the op returns its own weights; masks,
    sinks and biases are all in them.
    """
    found = []
    for q, k, v, kwargs in attention_calls(model, *inputs, **options):
        identity = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], -1)
        found.append(attention.reference(q, k, identity, **kwargs))
    return found


@torch.no_grad()
def largest_logits(model: nn.Module, *inputs, **options) -> list[Float[Tensor, "h"]]:
    """For every attention that runs in `model(*inputs)`: each head's largest q·k/√d over the pairs that a causal query
    may see."""
    found = []
    for q, k, _, _ in attention_calls(model, *inputs, **options):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
        hidden = ~visible(q.shape[2], k.shape[2], True, None)
        found.append(scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)))
    return found
