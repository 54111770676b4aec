"""The residual stream as n streams that learn to mix: hyper-connections, and manifold-constrained hyper-connections.

Around each sublayer f (attention, feed-forward, or both in a parallel layer) stand three small maps. On streams H (n d)

    u = pre · H      Ĥ = mix H + post ⊗ f(u)      pre, post (n)   mix (n n)

where f has its norms, as `placement` says. The embedding enters as n copies, and the sum of the streams leaves. The
ordinary residual x + f(x) is n = 1 with all three maps 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmlib.errors import require, require_counts
from llmlib.norm import at_least_float32, rms_norm


class Connection(nn.Module):
    """What the two kinds share; `maps` tells them apart. `index` counts the connections of a model from 0."""

    def __init__(self, streams: int):
        super().__init__()
        require(
            isinstance(streams, int) and not isinstance(streams, bool) and streams >= 1,
            f"streams is {streams!r}, and must be a whole number above 0",
        )
        self.streams = streams

    def widen(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t n d"]:
        """Every stream starts as a copy of the embedding."""
        return x[..., None, :].expand(*x.shape[:-1], self.streams, x.shape[-1])

    def narrow(self, H: Float[Tensor, "b t n d"]) -> Float[Tensor, "b t d"]:
        """The sum of the streams: n times an ordinary stream while they are equal, which the final norm takes away."""
        return H.sum(-2)

    def maps(
        self, H: Float[Tensor, "b t n d"]
    ) -> tuple[Float[Tensor, "... n"], Float[Tensor, "... n"], Float[Tensor, "... n n"]]:
        """(pre, post, mix), in float32 or better; for each token, or one for all."""
        raise NotImplementedError

    def forward(
        self, H: Float[Tensor, "b t n d"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t n d"], Float[Tensor, "... n"]]:
        """(pre · H, mix H, post): what the sublayer reads, what passes beside it, and each stream's share of it."""
        pre, post, mix = self.maps(H)
        both = torch.cat((pre[..., None, :], mix), -2).to(H.dtype)
        read = both.expand(*H.shape[:-2], -1, -1) @ H  # unexpanded, a shared matrix takes torch's slow way round
        return read[..., 0, :], read[..., 1:, :], post.to(H.dtype)

    def extra_repr(self) -> str:
        return f"streams={self.streams}"


class HyperConnections(Connection):
    """Hyper-connections: [post | pre | mixᵀ] = static + s ⊙ tanh(norm(H) W), an n × (n + 2) matrix.

    Zhu et al., "Hyper-Connections", arXiv:2409.19606, equations 1 to 14: post is their B, pre their A_m, mix their A_r
    transposed. W and the scales s (one for post, one for pre and mix) make the maps depend on the token; the norm is
    over each stream's d entries, without a gain, which W would absorb. It starts as the ordinary residual: post is
    ones, pre reads stream `index` mod n alone, mix is the identity, W is 0, and s is 0.01. With equal streams that is
    the model with one stream, up to the ε of the final norm.

    dynamic  False leaves out W and s: the same maps for every token
    """

    undecayed = ("static",)

    def __init__(self, d_model: int, index: int = 0, *, streams: int = 4, dynamic: bool = True):
        super().__init__(streams)
        n, one = streams, torch.eye(streams)
        self.static = nn.Parameter(torch.cat((torch.ones(n, 1), one[:, [index % n]], one), 1))
        self.weight = nn.Parameter(torch.zeros(d_model, n + 2)) if dynamic else None
        self.scale = nn.Parameter(torch.full((2,), 0.01)) if dynamic else None

    def maps(
        self, H: Float[Tensor, "b t n d"]
    ) -> tuple[Float[Tensor, "... n"], Float[Tensor, "... n"], Float[Tensor, "... n n"]]:
        wide = at_least_float32(H.dtype)
        matrix = self.static.to(wide)
        if self.weight is not None:
            scale = torch.cat((self.scale[:1], self.scale[1:].expand(self.streams + 1)))
            matrix = matrix + scale * torch.tanh(rms_norm(H.to(wide)) @ self.weight.to(wide))
        return matrix[..., 1], matrix[..., 0], matrix[..., 2:].mT


def sinkhorn(logits: Float[Tensor, "*b n n"], iterations: int = 20) -> Float[Tensor, "*b n n"]:
    """A doubly stochastic matrix (entries ≥ 0, all rows and columns add to 1) near exp(logits).

    Columns, then rows, are divided by their sums, `iterations` times. Rows end at 1 to rounding; what columns miss
    shrinks in each turn by σ₂², σ₂ the second singular value of the result: slowly near the identity, where σ₂ is near
    1. Such a matrix lengthens no vector (σ₁ = 1), and the product of two is another. It works on logarithms, since exp
    could overflow.

    Sinkhorn and Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", 1967.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


class ManifoldHyperConnections(Connection):
    """mHC: pre = σ(p), post = 2σ(q), mix = sinkhorn(R), with [p | q | R] = α ⊙ (norm(vec H) W) + static.

    Xie et al., "mHC: Manifold-Constrained Hyper-Connections", arXiv:2512.24880, equations 7 to 9. The norm is over all
    n · d entries of a token, without a gain, and α is one number for each of the three, 0.01 at first. Mixing can
    neither swell nor shrink the mean of the streams, however deep the model. The paper leaves the other starting values
    open. Here W is 0, post 1, mix has 5 more on the diagonal of R (0.98 for n = 4), and pre adds to 1, half of it on
    stream `index` mod n, so that streams part; so it starts as the ordinary residual too. With n = 1, mix is 1, and pre
    starts at 0.99, which σ can reach.

    iterations  of Sinkhorn and Knopp's algorithm
    """

    def __init__(self, d_model: int, index: int = 0, *, streams: int = 4, iterations: int = 20):
        super().__init__(streams)
        require_counts(iterations=iterations)
        n, one, self.iterations = streams, torch.eye(streams), iterations
        pre = torch.logit((one[index % n] + 1 / n) / 2, eps=0.01)
        self.static = nn.Parameter(torch.cat((pre, torch.zeros(n), 5 * one.flatten())))
        self.weight = nn.Parameter(torch.zeros(n * d_model, n * (n + 2)))
        self.scale = nn.Parameter(torch.full((3,), 0.01))

    def maps(
        self, H: Float[Tensor, "b t n d"]
    ) -> tuple[Float[Tensor, "... n"], Float[Tensor, "... n"], Float[Tensor, "... n n"]]:
        n, wide = self.streams, at_least_float32(H.dtype)
        dynamic = (rms_norm(H.to(wide).flatten(-2)) @ self.weight.to(wide)).split((n, n, n * n), -1)
        static = self.static.to(wide).split((n, n, n * n))
        pre, post, mix = (a * x + b for a, x, b in zip(self.scale, dynamic, static, strict=True))
        return pre.sigmoid(), 2 * post.sigmoid(), sinkhorn(mix.unflatten(-1, (n, n)), self.iterations)
