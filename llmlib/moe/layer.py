"""The mixture-of-experts layer: router, experts, shared experts."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from llmlib.context import Context
from llmlib.errors import ConfigError, require
from llmlib.moe.balance import RoutingStatistics, load_balancing_loss, move_bias_, router_z_loss
from llmlib.moe.experts import stack_experts
from llmlib.moe.gated import run_experts
from llmlib.moe.routing import Routing, TopKRouter, count

BALANCE_OVER = ("batch", "sequence")


class MoE(nn.Module):
    """y = Σ_j w_j · expert_{e_j}(x) + shared(x): a feed-forward in `num_experts` parts, `top_k` of them for each token.

    expert       spec of any feed-forward, such as spec(SwiGLU, d_ff=1024): one expert
    router       spec of a router; None is `TopKRouter` as it comes: softmax, then the top k
    num_shared_experts   experts that every token takes beside its top_k, computed as one of that many times the width
    shared_expert        spec of that one, where its width or kind is its own; shared_expert_gate multiplies its output
                         by σ(w · x) (Qwen1.5-MoE)
    latent_size          the experts work on a projection of x to this width, projected back after (Nemotron 3)
    latent_bias          those two projections have biases
    capacity_factor      an expert takes at most ⌈capacity_factor · tokens · top_k / num_experts⌉ rows of a training
                         batch; the others are dropped. eval_capacity_factor is the same for evaluation, where None,
                         the default, drops nothing, so that decoding equals the full forward
    load_balance_alpha   weight of `load_balancing_loss`, over the "batch" or each "sequence" as balance_over says
    z_loss_weight        weight of `router_z_loss`
    bias_update_rate     step of the loss-free bias (0.001 as published); needs a router with correction_bias

    Padding (`context.valid` is False) is left out as if it weren't there, and its output is 0: a capacity's tokens, the
    statistics, the load and the losses are those of the batch's valid tokens. So without a capacity each text of a
    padded batch gets what it gets alone, unless the experts choose.

    After a forward pass with gradients, `auxiliary_loss` is the weighted sum of the two losses (None when neither has a
    weight); `statistics` describes every pass. A training loop calls `after_step()` after each optimiser step.
    Activation checkpointing must be non-reentrant (use_reentrant=False): the reentrant kind runs forward without
    gradients, and so without the losses. Layers that share one mixture have none: only the last pass's would stay.

    No tokens in, no tokens out. Raises ConfigError for options or inputs that don't fit, FloatingPointError for a NaN.
    Papers (arXiv): 1701.06538, 2006.16668, 2101.03961, 2401.04088, 2401.06066, 2412.19437.
    """

    load: Tensor
    takes_context = True

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        expert: Callable,
        router: Callable | None = None,
        num_shared_experts: int = 0,
        shared_expert: Callable | None = None,
        shared_expert_gate: bool = False,
        latent_size: int | None = None,
        latent_bias: bool = False,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        load_balance_alpha: float = 0.0,
        balance_over: str = "batch",
        z_loss_weight: float = 0.0,
        bias_update_rate: float = 0.0,
    ):
        super().__init__()
        require(num_experts >= 1, f"num_experts is {num_experts}, and must be at least 1")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            fits = factor is None or 0 < factor < math.inf
            require(fits, f"{name} is {factor}, and must be above 0 and finite, or None for no limit")
        require(latent_size is None or latent_size > 0, f"latent_size is {latent_size}, and must be above 0, or None")
        require(balance_over in BALANCE_OVER, f"balance_over is {balance_over!r}; choose 'batch' or 'sequence'")
        require(num_shared_experts >= 0, f"num_shared_experts is {num_shared_experts}, and can't be below 0")
        require(bias_update_rate >= 0, f"bias_update_rate is {bias_update_rate}, and can't be below 0")
        self.num_experts, self.top_k = num_experts, top_k
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.load_balance_alpha, self.balance_over = load_balance_alpha, balance_over
        self.z_loss_weight, self.bias_update_rate = z_loss_weight, bias_update_rate
        self.router = (router or TopKRouter)(d_model, num_experts, top_k)
        self.experts = stack_experts(expert, latent_size or d_model, num_experts)
        self.latent_in_proj = latent_size and nn.Linear(d_model, latent_size, bias=latent_bias)
        self.latent_out_proj = latent_size and nn.Linear(latent_size, d_model, bias=latent_bias)
        self.shared_experts = _shared(expert, shared_expert, num_shared_experts, d_model)
        require(
            not shared_expert_gate or self.shared_experts is not None,
            "shared_expert_gate is set, but there is nothing to gate: give num_shared_experts or shared_expert",
        )
        self.shared_expert_gate = nn.Linear(d_model, 1, bias=False) if shared_expert_gate else None
        require(
            not bias_update_rate or getattr(self.router, "e_score_correction_bias", None) is not None,
            f"bias_update_rate is {bias_update_rate}, but the router has no bias to move: "
            f"give it router=spec(TopKRouter, correction_bias=True)",
        )
        if bias_update_rate:
            self.register_buffer("load", torch.zeros(num_experts, dtype=torch.long), persistent=False)
        self.exchange = None
        self.auxiliary_loss: Tensor | None = None
        self.statistics: RoutingStatistics | None = None
        self._reset_linears(0.02)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0, the loss-free bias and its load too."""
        if self.bias_update_rate:
            self.load.zero_()
        for part in (self.router, self.experts, self.shared_experts):
            if part is not None:
                part.reset_parameters(std=std)
        self._reset_linears(std)

    def _reset_linears(self, std: float) -> None:
        for linear in (self.latent_in_proj, self.latent_out_proj, self.shared_expert_gate):
            if linear is not None:
                nn.init.normal_(linear.weight, 0, std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def __getstate__(self) -> dict:
        """Without what the last pass left, which can't be copied or pickled."""
        return {**self.__dict__, "auxiliary_loss": None, "statistics": None}

    def forward(self, x: Float[Tensor, "b t d"], context: Context | None = None) -> Float[Tensor, "b t d"]:
        width = self.router.weight.shape[1]
        if x.ndim != 3 or x.shape[-1] != width:
            raise ConfigError(f"x has shape {tuple(x.shape)}, and a mixture takes (batch, time, {width})")
        if context is None or context.valid is None or x.is_meta:
            return self._mixed(x.flatten(0, 1), x.shape[:2]).view_as(x)
        valid = _of_new(context.valid, *x.shape[:2])
        at = valid.flatten().nonzero()[:, 0]
        y = self._mixed(x.flatten(0, 1)[at], x.shape[:2], valid.sum(1).tolist())
        return y.new_zeros(valid.numel(), width).index_copy(0, at, y).view_as(x)

    def _mixed(
        self, tokens: Float[Tensor, "t d"], shape: torch.Size, lengths: list[int] | None = None
    ) -> Float[Tensor, "t d"]:
        """Of all tokens of (batch, time) = shape, or where lengths are given, of so many of each sequence."""
        wanted = routing = self.router(tokens)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None and not tokens.is_meta:
            routing = wanted.limited(self.capacity(factor, tokens.shape[0]))
        self.auxiliary_loss = self._losses(wanted, shape, lengths) if torch.is_grad_enabled() else None
        self.statistics = RoutingStatistics.of(wanted, routing) if len(tokens) else None
        if self.training and self.bias_update_rate:
            self.load += wanted.counts
        y = self._routed(tokens, routing)
        return y if self.shared_experts is None else y + self._shared(tokens)

    def capacity(self, factor: float, tokens: int) -> int:
        """⌈factor · tokens · top_k / num_experts⌉."""
        share = factor * tokens * self.top_k / self.num_experts
        return math.ceil(share * (1 - 1e-12))  # 1.1 isn't a float: rounding alone must not add a row

    def _routed(self, tokens: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t d"]:
        x = tokens if self.latent_in_proj is None else self.latent_in_proj(tokens)
        rows = x.index_select(0, routing.tokens)
        run = run_experts if self.exchange is None else self.exchange
        rows = run(self.experts, rows, routing.counts) * routing.weights[:, None]
        if tokens.shape[0] == 1:
            y = rows.sum(0, keepdim=True)
        else:
            y = rows.new_zeros(tokens.shape[0], rows.shape[-1]).index_add(0, routing.tokens, rows)
        y = y.to(x.dtype)
        return y if self.latent_out_proj is None else self.latent_out_proj(y)

    def _shared(self, tokens: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        y = self.shared_experts(tokens)
        return y if self.shared_expert_gate is None else self.shared_expert_gate(tokens).sigmoid() * y

    def _losses(self, routing: Routing, shape: torch.Size, lengths: list[int] | None) -> Tensor | None:
        """The weighted sum, on the routes as they were wanted; None without weights, or without tokens."""
        terms = []
        if self.load_balance_alpha:
            terms.append(self.load_balance_alpha * self._balance_loss(routing, shape, lengths))
        if self.z_loss_weight:
            terms.append(self.z_loss_weight * router_z_loss(routing.logits))
        return sum(terms) if terms and len(routing.logits) else None

    def _balance_loss(
        self, routing: Routing, shape: torch.Size, lengths: list[int] | None
    ) -> Float[Tensor, ""] | float:
        if self.balance_over == "batch":
            counts = routing.counts if self.exchange is None else self.exchange.summed(routing.counts)
            return load_balancing_loss(routing.probabilities, counts)
        if lengths is not None:
            texts = zip(routing.probabilities.split(lengths), routing.chosen.split(lengths), strict=True)
            each = [load_balancing_loss(p, chosen.sum(0)) for p, chosen in texts if len(p)]
            return sum(each) / max(len(each), 1)
        batch, time = shape
        counts = count(routing.tokens // time * self.num_experts + routing.experts, batch * self.num_experts)
        return load_balancing_loss(routing.probabilities.unflatten(0, shape), counts.view(batch, self.num_experts))

    @property
    def leaves_loss(self) -> bool:
        """Whether a pass with gradients sets `auxiliary_loss`."""
        return bool(self.load_balance_alpha or self.z_loss_weight)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the router's bias by what was routed since the last call; does nothing without a bias_update_rate."""
        if self.bias_update_rate:
            load = self.load if self.exchange is None else self.exchange.summed(self.load)
            move_bias_(self.router.e_score_correction_bias, load, self.bias_update_rate)
            self.load.zero_()

    def num_idle_parameters(self) -> int:
        """Parameters of the routed experts that one token leaves out."""
        return self.num_routed_parameters() // self.num_experts * (self.num_experts - self.top_k)

    def num_routed_parameters(self) -> int:
        """Parameters of all routed experts; those that other processes hold count too."""
        return self.num_experts * sum(p[0].numel() for p in self.experts.parameters())


def _of_new(valid: Bool[Tensor, "b s"], batch: int, time: int) -> Bool[Tensor, "b t"]:
    """The part about the new tokens."""
    require(
        valid.shape[0] == batch and valid.shape[1] >= time,
        f"context.valid has shape {tuple(valid.shape)}, and must be (batch, cached and new tokens), "
        f"so ({batch}, {time}) or longer",
    )
    return valid[:, -time:] if time else valid[:, :0]


def _shared(expert: Callable, shared_expert: Callable | None, count: int, d_model: int) -> nn.Module | None:
    """A wide feed-forward is the sum of narrow ones side by side, so several shared experts are one."""
    require(
        shared_expert is None or not count,
        f"num_shared_experts is {count} and shared_expert is {shared_expert}: give one of the two",
    )
    if shared_expert is not None:
        return shared_expert(d_model)
    d_ff = getattr(expert, "options", {}).get("d_ff")
    require(
        not count or d_ff is not None,
        f"num_shared_experts is {count}, but {expert} names no d_ff to multiply by it: give shared_expert instead",
    )
    return expert(d_model, d_ff=count * d_ff) if count else None
