"""Balance: how evenly the experts are used, and three ways to make it so."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from llmlib.errors import require
from llmlib.moe.routing import Routing, chosen, distribution, expert_of_rows, wide


def load_balancing_loss(probabilities: Float[Tensor, "*b t E"], counts: Real[Tensor, "*b E"]) -> Float[Tensor, ""]:
    """E · Σ_e f_e P_e: f_e the share of the rows that expert e got, P_e its mean probability over the tokens.

    It is 1 when all is even, and E when one expert takes all. f has no gradient; through P the router learns to lower
    the probability of the experts that are busy: ∂/∂P_e = E · f_e. With a leading axis of sequences it is their mean,
    balance per sequence; without, balance over the batch, which lets a sequence specialise.
    Fedus et al., arXiv:2101.03961, for k = 1. Here f sums to 1 for every k; transformers' sums to k. DeepSeek-V3's loss
    per sequence (arXiv:2412.19437) is this one for other counts: of the top k of the scores alone, without the bias and
    the groups that decide where a token goes. A sequence of which no expert took a token counts as 0.
    Without tokens it is NaN, the mean of nothing. Raises ConfigError where the two shapes don't belong together.
    """
    require(
        counts.shape == (*probabilities.shape[:-2], probabilities.shape[-1]),
        f"counts has shape {tuple(counts.shape)}, and for probabilities {tuple(probabilities.shape)} must be that "
        f"without its tokens, the last axis but one",
    )
    probabilities = wide(probabilities)
    counts = counts.to(probabilities.dtype)
    total = counts.sum(-1, keepdim=True)
    share = counts / torch.where(total == 0, 1, total)
    return probabilities.shape[-1] * (share * probabilities.mean(-2)).sum(-1).mean()


def router_z_loss(logits: Float[Tensor, "*b E"]) -> Float[Tensor, ""]:
    """The mean of (log Σ_e exp(logit_e))², which keeps the logits small; without tokens it is NaN.

    Zoph et al., arXiv:2202.08906.
    """
    return logits.logsumexp(-1).square().mean()


@torch.no_grad()
def move_bias_(bias: Float[Tensor, "E"], load: Real[Tensor, "E"], rate: float) -> None:
    """bias += rate · sign(mean load − load): loss-free balancing, after each step. Wang et al., arXiv:2408.15664."""
    bias.add_(torch.sign(load.sum() - len(load) * load).to(bias.dtype), alpha=rate)  # E times it: exact in integers


def max_violation(counts: Tensor) -> float:
    """MaxVio = max(load) / mean(load) − 1: 0 is perfect balance, E − 1 is one expert that takes all, and NaN is no row.

    counts  (E) rows of each expert. Wang et al., arXiv:2408.15664.
    """
    counts = counts.double()
    return (counts.max() / counts.mean() - 1).item()


def experts_touched(num_experts: int, top_k: int, tokens: int) -> float:
    """E (1 − (1 − k/E)^B): how many experts B tokens are expected to use, when each takes k of the E at random.

    So many experts' weights a decode step of B sequences reads. Routers that prefer some experts touch fewer.
    Raises ConfigError for a top_k outside 1 … num_experts and for a negative number of tokens.
    """
    require(1 <= top_k <= num_experts, f"top_k is {top_k}, and must lie between 1 and num_experts = {num_experts}")
    require(tokens >= 0, f"tokens is {tokens}, and can't be below 0")
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


@dataclass
class RoutingStatistics:
    """What one forward pass of a MoE did; the figures are computed when they are asked for. Padding isn't in it.

    counts  (E) rows that each expert computed      wanted  (E) rows before a capacity cut some off
    tokens  (m) the token of each wanted row, sorted by expert
    """

    logits: Float[Tensor, "t E"]
    counts: Int[Tensor, "E"]
    wanted: Int[Tensor, "E"]
    tokens: Int[Tensor, "m"]
    scoring: str

    @classmethod
    def of(cls, wanted: Routing, computed: Routing) -> "RoutingStatistics":
        """From the routes that the router wanted, and those of them that fitted."""
        return cls(wanted.logits.detach(), computed.counts, wanted.counts, wanted.tokens, wanted.scoring)

    @property
    def chosen(self) -> Bool[Tensor, "t E"]:
        """Whether each token wanted each expert; the mean over tokens of one kind shows what is special to it."""
        return chosen(self.logits, self.tokens, expert_of_rows(self.wanted, len(self.tokens)))

    @property
    def load(self) -> Float[Tensor, "E"]:
        """The share of the rows that each expert computed; 1/E when all is even."""
        return self.counts / self.counts.sum()

    @property
    def max_violation(self) -> float:
        """MaxVio of the routes as the router wanted them."""
        return max_violation(self.wanted)

    @property
    def dropped(self) -> float:
        """The share of the rows that found their expert full."""
        return 1 - self.counts.sum().item() / self.wanted.sum().item()

    @property
    def entropy(self) -> float:
        """Mean entropy of the router's distribution over the experts, in nats: from 0 (certain) to log E."""
        p = distribution(self.logits, self.scoring)
        return torch.special.entr(p).sum(-1).mean().item()

    def as_dict(self) -> dict[str, float | list[float]]:
        """All of it as plain numbers, for a log or a plot."""
        return {
            "load": self.load.tolist(), "max_violation": self.max_violation, "dropped": self.dropped,
            "entropy": self.entropy, "max_entropy": math.log(len(self.counts)),
        }  # fmt: skip


def statistics(model: nn.Module) -> dict[str, RoutingStatistics]:
    """The statistics of each mixture's last pass, by the name of the module that holds it."""
    found = ((name, getattr(module, "statistics", None)) for name, module in model.named_modules())
    return {name: s for name, s in found if isinstance(s, RoutingStatistics)}
