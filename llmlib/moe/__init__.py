"""Mixture of experts: routers, balance, experts, the layer, expert parallelism, upcycling."""

from llmlib.moe.balance import (
    RoutingStatistics,
    experts_touched,
    load_balancing_loss,
    max_violation,
    move_bias_,
    router_z_loss,
    statistics,
)
from llmlib.moe.experts import StackedLinear, expert_linear, stack_experts
from llmlib.moe.gated import expert_swiglu, run_experts
from llmlib.moe.layer import MoE
from llmlib.moe.parallel import Exchange, parallelise_experts, reduce_gradients
from llmlib.moe.routing import ExpertChoiceRouter, Router, Routing, TopKRouter, expert_choice, route
from llmlib.moe.upcycling import upcycle

__all__ = [
    "Exchange", "ExpertChoiceRouter", "MoE", "Router", "Routing", "RoutingStatistics", "StackedLinear", "TopKRouter",
    "expert_choice", "expert_linear", "expert_swiglu", "experts_touched", "load_balancing_loss", "max_violation",
    "move_bias_", "parallelise_experts", "reduce_gradients", "route", "router_z_loss", "run_experts", "stack_experts",
    "statistics", "upcycle",
]  # fmt: skip
