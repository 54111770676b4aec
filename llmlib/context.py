"""What one forward pass knows besides the residual stream."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Context:
    """The company that `x` keeps on its way through the layers; every field may be absent.

    positions   absolute position of each new token; None counts on from the cached length
    valid       False marks left padding, over the cached and the new tokens together
    documents   which document each token belongs to, in packed text; nothing crosses a boundary
    embeddings  the residual stream as it entered the first layer (Zamba2 reads it again later)
    memory      the encoder's output, for cross-attention
    shared      scratch that the layers of one pass share, such as keys and values used by several layers
    """

    positions: Int[Tensor, "*b t"] | None = None
    valid: Bool[Tensor, "b s"] | None = None
    documents: Int[Tensor, "b s"] | None = None
    embeddings: Float[Tensor, "b t d"] | None = None
    memory: Float[Tensor, "b m _"] | None = None
    shared: dict = field(default_factory=dict)


def positions_in_text(valid: Bool[Tensor, "b s"] | None, documents: Int[Tensor, "b s"] | None) -> Int[Tensor, "b s"]:
    """How many valid tokens stand before each token in its document, and 0 on padding; one of the two is given."""
    one = torch.ones_like(documents) if valid is None else valid.long()
    count = one.cumsum(1)
    if documents is not None:
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        count = count - torch.where(starts, count - one, 0).cummax(dim=1).values
    return (count - 1).clamp(min=0)
