"""Routers: which experts a token takes, and with what weight."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llmlib.errors import require
from llmlib.norm import at_least_float32, without_autocast

SCORES = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "softmax_of_top_k": lambda logits: logits,
}
GROUP_SCORES = ("max", "top2")


def route(
    logits: Float[Tensor, "t E"],
    top_k: int,
    *,
    scoring: str = "softmax",
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "max",
    correction_bias: Float[Tensor, "E"] | None = None,
) -> tuple[Float[Tensor, "t k"], Int[Tensor, "t k"]]:
    """The weights and the indices of the `top_k` experts that each token takes.

    scoring   softmax            s = softmax(logits), then the top k of s          Switch, OLMoE, Qwen3, DeepSeek-V2
              softmax_of_top_k   the top k of the logits, then their softmax       Shazeer et al., Mixtral, gpt-oss
              sigmoid            s = σ(logits), then the top k of s                DeepSeek-V3
    norm_topk_prob         the k weights of a token are divided by their sum (it turns the first kind into the second)
    routed_scaling_factor  multiplies the weights
    n_group, topk_group    the experts stand in n_group equal groups, and a token chooses from its best topk_group;
                           group_score: the best by their "max" (DeepSeek-V2), or by the sum of their "top2" (V3)
    correction_bias        added to s for the choice but not for the weights: loss-free balancing

    Papers: 1701.06538, 2101.03961, 2401.04088, 2405.04434, 2412.19437, 2408.15664. No gradient goes through the choice.
    Raises ConfigError for options that don't fit, FloatingPointError where a token's logits have no order: a NaN, +∞,
    or nothing but −∞.
    """
    if not torch.compiler.is_compiling():
        biased = correction_bias is not None
        _check_options(logits.shape[-1], top_k, scoring, n_group, topk_group, group_score, biased)
    _require_numbers(logits, correction_bias)
    scores = SCORES[scoring](logits)
    preference = scores.detach() if correction_bias is None else scores.detach() + correction_bias
    if n_group > 1:
        preference = preference.masked_fill(~_in_best_groups(preference, n_group, topk_group, group_score), -math.inf)
    experts = preference.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if scoring == "softmax_of_top_k":
        weights = weights.softmax(-1)
    elif norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights if routed_scaling_factor == 1 else weights * routed_scaling_factor, experts


def _in_best_groups(
    preference: Float[Tensor, "t E"], n_group: int, topk_group: int, group_score: str
) -> Bool[Tensor, "t E"]:
    groups = preference.unflatten(-1, (n_group, -1))
    best = groups.topk(2 if group_score == "top2" else 1, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    inside = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return inside.repeat_interleave(groups.shape[-1], dim=-1)


def distribution(logits: Float[Tensor, "*b E"], scoring: str) -> Float[Tensor, "*b E"]:
    """softmax(logits), or the sigmoids divided by their sum (arXiv:2412.19437): what balance is measured on."""
    if scoring != "sigmoid":
        return logits.softmax(-1)
    return F.logsigmoid(logits).softmax(-1)  # the same, where all scores round to 0 too


def expert_choice(
    logits: Float[Tensor, "t E"], capacity: int
) -> tuple[Float[Tensor, "E capacity"], Int[Tensor, "E capacity"]]:
    """The weights and the indices of the `capacity` tokens that each expert takes: the largest of softmax(logits).

    Every expert is equally busy by construction, and a token may get none or many. Whether a token is among the first
    depends on all the others, later ones too: a causal model that trains so sees the future (arXiv:2202.09368).
    Raises ConfigError for a capacity that is negative or above the number of tokens.
    """
    require(
        0 <= capacity <= len(logits), f"capacity is {capacity}, and must lie between 0 and the {len(logits)} tokens"
    )
    _require_numbers(logits)
    weights, tokens = logits.softmax(-1).T.topk(capacity, dim=-1)
    return weights, tokens


@dataclass
class Routing:
    """Who goes where: one row for each pair of a token and an expert that takes it, sorted by expert and then by time
    (where the experts choose, by weight).

    logits  (t E) of the router      tokens, weights  (m) of each row      counts  (E) rows of each expert
    """

    logits: Float[Tensor, "t E"]
    tokens: Int[Tensor, "m"]
    weights: Float[Tensor, "m"]
    counts: Int[Tensor, "E"]
    scoring: str = "softmax"

    @classmethod
    def of(
        cls, logits: Tensor, weights: Float[Tensor, "t k"], experts: Int[Tensor, "t k"], scoring: str = "softmax"
    ) -> "Routing":
        """From the weights and the experts of each token."""
        chosen, order = experts.flatten().sort(stable=True)
        counts = count(chosen, logits.shape[-1])
        return cls(logits, order // experts.shape[-1], weights.flatten()[order], counts, scoring)

    @property
    def experts(self) -> Int[Tensor, "m"]:
        """The expert of each row."""
        return expert_of_rows(self.counts, len(self.tokens))

    @property
    def chosen(self) -> Bool[Tensor, "t E"]:
        """Whether each token goes to each expert."""
        return chosen(self.logits, self.tokens, self.experts)

    @property
    def probabilities(self) -> Float[Tensor, "t E"]:
        """The router's scores as a distribution over the experts."""
        return distribution(self.logits, self.scoring)

    def limited(self, capacity: int) -> "Routing":
        """Only the first `capacity` rows of each expert; what comes later is dropped (arXiv:2101.03961).

        Earlier tokens go first, so a drop depends on the past alone. (GShard serves all first choices before any second
        one, by which a later token can push out an earlier one.)
        """
        place = torch.arange(len(self.tokens), device=self.tokens.device)
        place = place - (self.counts.cumsum(0) - self.counts)[self.experts]
        kept = place < capacity
        return dataclasses.replace(
            self, tokens=self.tokens[kept], weights=self.weights[kept], counts=self.counts.clamp(max=capacity)
        )


def chosen(logits: Float[Tensor, "t E"], tokens: Int[Tensor, "m"], experts: Int[Tensor, "m"]) -> Bool[Tensor, "t E"]:
    """The pairs of the rows as a table of all tokens and experts."""
    table = torch.zeros_like(logits, dtype=torch.bool)
    table[tokens, experts] = True
    return table


def count(chosen: Int[Tensor, "m"], num_experts: int) -> Int[Tensor, "E"]:
    """How often each expert was chosen; bincount is quicker, but a GPU would have to be waited for."""
    if chosen.device.type == "cpu" and not torch.compiler.is_compiling():
        return chosen.bincount(minlength=num_experts)
    return chosen.new_zeros(num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))


def expert_of_rows(counts: Int[Tensor, "E"], rows: int) -> Int[Tensor, "m"]:
    experts = torch.arange(len(counts), device=counts.device)
    return experts.repeat_interleave(counts, output_size=rows)


class Router(nn.Module):
    """logits = W x + b in float32 (or float64), whatever the model computes in: exponentials decide."""

    def __init__(self, d_model: int, num_experts: int, *, bias: bool = False):
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        nn.init.normal_(self.weight, 0, std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t E"]:
        """W x + b, whatever autocast says."""
        return wide_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} → {self.num_experts}, bias={self.bias is not None}"


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x.to(at_least_float32(x.dtype))


def wide_linear(x: Float[Tensor, "t d"], weight: Float[Tensor, "E d"], bias: Tensor | None = None) -> Tensor:
    """W x + b in float32 (or float64), outside autocast."""
    x = wide(x)
    bias = None if bias is None else bias.to(x.dtype)
    with without_autocast(x):
        return F.linear(x, weight.to(x.dtype), bias)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns a linear map's input into, or None where it is off or leaves x alone, as it does float64."""
    device = x.device.type
    off = x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return None if off else torch.get_autocast_dtype(device)


def _require_numbers(logits: Float[Tensor, "t E"], bias: Float[Tensor, "E"] | None = None) -> None:
    """A NaN has no place in an order, and among logits +∞, or nothing but −∞, makes the softmax NaN."""
    if logits.is_meta or torch.compiler.is_compiling():
        return
    if logits.is_cuda:
        torch._assert_async(logits.amax(-1).isfinite().all(), "the router's logits hold NaN or ∞")
        if bias is not None:
            torch._assert_async(bias.isnan().any().logical_not(), "the router's correction bias holds NaN")
        return
    require(
        bias is None or not bias.isnan().any(),
        f"the router's correction bias is {bias}: it holds NaN, so that no order exists among the experts",
        FloatingPointError,
    )
    if math.isfinite(logits.detach().sum()):  # the sum of what isn't finite isn't: the usual case ends here
        return
    bad = ~logits.amax(-1).isfinite()
    what = "NaN" if logits.isnan().any() else "infinite"
    require(
        not bad.any(),
        f"the router's logits are {what} for {int(bad.sum())} of {len(logits)} "
        f"tokens: its input or its weights are no longer numbers. Look for the first layer whose output is so, and "
        f"lower the learning rate",
        FloatingPointError,
    )


class TopKRouter(Router):
    """Each token takes its `top_k` best experts; the options are those of `route`, and three that act in training.

    correction_bias  a buffer `e_score_correction_bias`, moved by `MoE.after_step` (arXiv:2408.15664); it stays in
                     float32 when the model is cast to a narrower dtype, in which steps of 0.001 would round to nothing
    noise            logits + N(0, 1) · softplus(W_noise x), W_noise learned: noisy top-k gating (arXiv:1701.06538);
                     the losses and statistics are of the noisy logits
    jitter           the router's input times U(1 − jitter, 1 + jitter) (arXiv:2101.03961)

    Switch is top_k=1 with a `capacity_factor` in the MoE. DeepSeek-V3 is scoring="sigmoid", norm_topk_prob=True,
    correction_bias=True, n_group=8, topk_group=4, group_score="top2", routed_scaling_factor=2.5.
    Raises ConfigError for options that don't fit together.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "max",
        correction_bias: bool = False,
        bias: bool = False,
        noise: bool = False,
        jitter: float = 0.0,
    ):
        _check_options(num_experts, top_k, scoring, n_group, topk_group, group_score, correction_bias)
        require(0 <= jitter < 1, f"jitter is {jitter}, and must be at least 0 and below 1")
        super().__init__(d_model, num_experts, bias=bias)
        self.top_k, self.scoring, self.jitter = top_k, scoring, jitter
        self.options = {
            "scoring": scoring, "norm_topk_prob": norm_topk_prob, "routed_scaling_factor": routed_scaling_factor,
            "n_group": n_group, "topk_group": topk_group, "group_score": group_score,
        }  # fmt: skip
        self.noise = nn.Parameter(torch.zeros(num_experts, d_model)) if noise else None
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts) if correction_bias else None)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases and noise 0."""
        super().reset_parameters(std)
        for rest in (getattr(self, "noise", None), getattr(self, "e_score_correction_bias", None)):
            if rest is not None:
                nn.init.zeros_(rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, top_k={self.top_k}, scoring={self.scoring!r}"

    def _apply(self, fn, recurse=True):
        """What every cast and move of a module goes through."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after is not None and after.dtype.itemsize < 4:
            kept = torch.empty_like(before, dtype=torch.float32, device=after.device)
            self.e_score_correction_bias = kept if before.is_meta else kept.copy_(before)
        return self

    def forward(self, x: Float[Tensor, "t d"]) -> Routing:
        x = wide(x)
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.logits(x)
        if self.training and self.noise is not None:
            spread = F.softplus(wide_linear(x, self.noise))
            logits = logits + spread * torch.randn_like(logits)
        weights, experts = route(logits, self.top_k, correction_bias=self.e_score_correction_bias, **self.options)
        return Routing.of(logits, weights, experts, self.scoring)


def _check_options(num_experts, top_k, scoring, n_group, topk_group, group_score, correction_bias) -> None:
    require(scoring in SCORES, f"scoring is {scoring!r}; choose one of {', '.join(SCORES)}")
    require(group_score in GROUP_SCORES, f"group_score is {group_score!r}; choose one of {', '.join(GROUP_SCORES)}")
    require(1 <= top_k <= num_experts, f"top_k is {top_k}, and must lie between 1 and num_experts = {num_experts}")
    require(
        n_group >= 1 and num_experts % n_group == 0,
        f"n_group is {n_group}, and must divide num_experts = {num_experts}",
    )
    require(1 <= topk_group <= n_group, f"topk_group is {topk_group}, and must lie between 1 and n_group = {n_group}")
    size = num_experts // n_group
    require(
        top_k <= topk_group * size,
        f"top_k is {top_k}, but the topk_group = {topk_group} best groups of {size} hold {topk_group * size} experts",
    )
    require(
        n_group == 1 or group_score == "max" or size >= 2,
        f"group_score='top2' needs two experts in a group, and {num_experts} experts in {n_group} groups make {size}",
    )
    require(
        not correction_bias or scoring != "softmax_of_top_k",
        "correction_bias needs scores between 0 and 1: scoring='sigmoid' or 'softmax'",
    )


class ExpertChoiceRouter(Router):
    """Each expert takes its ⌈t · top_k / num_experts⌉ best of the batch's t tokens, about `top_k` experts for a token.

    The sequences of a batch compete with each other, so that what one gets depends on the others.
    Not for causal models: see `expert_choice` (arXiv:2202.09368).
    """

    scoring = "softmax"

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, bias: bool = False):
        require(1 <= top_k <= num_experts, f"top_k is {top_k}, and must lie between 1 and num_experts = {num_experts}")
        super().__init__(d_model, num_experts, bias=bias)
        self.top_k = top_k

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, top_k={self.top_k}"

    def forward(self, x: Float[Tensor, "t d"]) -> Routing:
        logits = self.logits(x)
        capacity = math.ceil(len(x) * self.top_k / self.num_experts)
        weights, tokens = expert_choice(logits, capacity)
        counts = tokens.new_full((self.num_experts,), capacity)
        return Routing(logits, tokens.flatten(), weights.flatten(), counts)
