"""Mixture of experts: against definitions written out token by token, against transformers, and by its properties."""

import copy
import math
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmlib.attention import Attention
from llmlib.context import Context
from llmlib.cost import flops
from llmlib.errors import ConfigError
from llmlib.ffn import GLU, MLP, SwiGLU
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.moe import (
    ExpertChoiceRouter,
    MoE,
    TopKRouter,
    expert_choice,
    expert_linear,
    expert_swiglu,
    experts_touched,
    load_balancing_loss,
    max_violation,
    move_bias_,
    route,
    router_z_loss,
    statistics,
    upcycle,
)
from llmlib.moe.gated import _ByExpert, _spare
from llmlib.moe.routing import distribution
from llmlib.norm import RMSNorm
from llmlib.ops import kernels, record
from llmlib.train import spared_from_decay

torch.set_num_threads(1)
COMPUTATIONS = ("reference", "dense", "segments")
EXPERTS = {
    "swiglu": spec(SwiGLU, d_ff=24),
    "glu with biases": spec(GLU, d_ff=24, bias=True),
    "mlp": spec(MLP, d_ff=24, activation="relu2", bias=False),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(num_experts=8, top_k=2, d_model=16, expert=EXPERTS["swiglu"], dtype=torch.float64, std=0.3, **options):
    """A small layer whose weights are large enough for the routes to matter."""
    moe = MoE(d_model, num_experts=num_experts, top_k=top_k, expert=expert, **options)
    moe.reset_parameters(std=std)
    return moe.to(dtype)


def one_expert(moe, expert, e):
    """Expert e as an ordinary feed-forward."""
    alone = expert(moe.router.weight.shape[1]).double()
    alone.load_state_dict({name: p[e] for name, p in moe.experts.state_dict().items()})
    return alone


def by_definition(moe, expert, x):
    """Σ_j w_j · expert_{e_j}(x), one token and one expert at a time."""
    experts = [one_expert(moe, expert, e) for e in range(moe.num_experts)]
    rows = []
    for token in x.flatten(0, 1):
        p = F.softmax(moe.router.weight @ token, dim=0)
        best = sorted(range(len(experts)), key=lambda e: -p[e].item())[: moe.top_k]
        rows.append(sum(p[e] * experts[e](token) for e in best))
    return torch.stack(rows).view_as(x)


def gradients(moe, x, weight):
    x = x.clone().requires_grad_()
    moe.zero_grad()
    y = moe(x)
    (y * weight).sum().backward()
    return [y.detach(), x.grad, *[p.grad.clone() for p in moe.parameters()]]


# --- the computations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXPERTS)
def test_layer_is_the_sum_it_says(kind):
    moe = make(expert=EXPERTS[kind])
    for name, p in moe.experts.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), by_definition(moe, EXPERTS[kind], x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("top_k", range(1, 6))
@pytest.mark.parametrize("kind", ["swiglu", "glu with biases"])
def test_three_computations_agree_with_gradients(top_k, kind):
    moe = make(num_experts=5, top_k=top_k, expert=EXPERTS[kind], router=spec(TopKRouter, norm_topk_prob=True))
    x, weight = torch.randn(2, 2, 7, 16, dtype=torch.float64).unbind(0)
    results = {}
    for name in COMPUTATIONS:
        with kernels(name), record() as ran:
            results[name] = gradients(moe, x, weight)
        assert {c.kernel.split()[0] for c in ran if c.op == "expert_linear"} == {name}
    for name in COMPUTATIONS[1:]:
        for a, b in zip(results["reference"], results[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("counts", [[0, 0, 0, 11], [1, 0, 9, 1], [11, 0, 0, 0], [3, 3, 3, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_agrees_for_any_load(counts, dtype):
    x, W, b = torch.randn(11, 16), torch.randn(4, 24, 16) / 4, torch.randn(4, 24)
    counts, up = torch.tensor(counts), torch.randn(11, 24)
    wide = [t.to(dtype).double().requires_grad_() for t in (x, W, b)]
    y = expert_linear.reference(wide[0], wide[1], counts, wide[2])
    expected = [y, *torch.autograd.grad((y * up.to(dtype)).sum(), wide)]
    for name in ("reference", "segments", "grouped_mm", "dense"):
        mine = [t.detach().to(dtype).requires_grad_() for t in wide]
        with kernels(name):
            y = expert_linear(mine[0], mine[1], counts, mine[2])
        for a, b in zip([y, *torch.autograd.grad((y * up.to(dtype)).sum(), mine)], expected, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(a.double(), b, atol=tolerance * b.abs().max().item() + 1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 12), st.integers(0, 10**6))
def test_any_load_by_property(num_experts, extra, rows, seed):
    """Some experts empty, any sizes: each row meets the matrix of its own expert."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(num_experts, (rows,), generator=generator).sort().values
    x = torch.randn(rows, 4 + extra, generator=generator, dtype=torch.float64)
    W = torch.randn(num_experts, 3, 4 + extra, generator=generator, dtype=torch.float64)
    expected = torch.stack([W[e] @ row for e, row in zip(owner, x, strict=True)])
    for name in COMPUTATIONS:
        with kernels(name):
            y = expert_linear(x, W, torch.bincount(owner, minlength=num_experts))
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


def test_unused_experts_get_a_zero_gradient():
    moe = make(num_experts=4, top_k=1)
    with torch.no_grad():
        moe.router.weight.zero_()[2] = 1.0
    x = torch.rand(1, 6, 16, dtype=torch.float64)
    for name in COMPUTATIONS:
        with kernels(name):
            gradients(moe, x, torch.ones_like(x))
        gradient = moe.experts.up_proj.weight.grad
        assert gradient[2].abs().min() > 0
        assert gradient[[0, 1, 3]].abs().max() == 0


def test_segments_serve_frozen_and_half_frozen_experts():
    x, W = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4, dtype=torch.float64)
    bias, counts = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0])
    with kernels("segments"):
        dx, db = torch.autograd.grad(expert_linear(x, W, counts, bias).sum(), (x, bias))
    torch.testing.assert_close(dx, W[0].sum(0).expand(5, 4))
    torch.testing.assert_close(db, torch.tensor([[5.0] * 3, [0.0] * 3], dtype=torch.float64))


def test_an_expanded_gradient_passes_grouped_mm():
    x, W = torch.randn(8, 16, requires_grad=True), torch.randn(2, 16, 16)
    with kernels("grouped_mm"):
        expert_linear(x, W, torch.tensor([3, 5])).sum().backward()
    torch.testing.assert_close(x.grad[0], W[0].sum(0))


def test_bfloat16_and_autocast_stay_near_float32():
    moe = make(dtype=torch.float32, num_shared_experts=1)
    x = torch.randn(2, 16, 16)
    exact = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = moe(x)
    half = moe.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # a route whose two best scores nearly tie may flip when x is rounded: compare the tokens where none does
    for y in (mixed, half):
        error = (y.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.median() < 0.02


@pytest.mark.parametrize("counts", [[2, 0, 3], [5, 0, 0]])
def test_second_derivatives(counts):
    """Of each kernel against differences of the first ones, with experts that get nothing, and of frozen weights."""
    x, W, b = torch.randn(5, 3), torch.randn(3, 4, 3), torch.randn(3, 4)
    x, W, b, up, down = (t.double().requires_grad_() for t in (x, W, b, torch.randn(3, 4, 3), torch.randn(3, 3, 4)))
    counts = torch.tensor(counts)
    for name in COMPUTATIONS:
        with kernels(name):
            assert torch.autograd.gradgradcheck(lambda x, W, b: expert_linear(x, W, counts, b), (x, W, b))
            assert torch.autograd.gradgradcheck(lambda x: expert_linear(x, W.detach(), counts), x)
    with kernels("by_expert"):
        assert torch.autograd.gradgradcheck(lambda *inputs: expert_swiglu(*inputs, counts), (x, W, up, down))


def test_second_derivatives_of_inputs_that_hang_together():
    """The experts' weights computed from their rows: each gets its own part of the gradient, and no other's."""
    counts, other = torch.tensor([2, 3]), torch.randn(2, 4, 5).double()
    x = torch.randn(5, 3).double().requires_grad_()
    with kernels("segments"):
        assert torch.autograd.gradgradcheck(lambda x: expert_linear(x, other @ x, counts), x)
        y = expert_linear(x, other @ x, counts).square().sum()
        plain, graph = (torch.autograd.grad(y, x, create_graph=g, retain_graph=True)[0] for g in (False, True))
    torch.testing.assert_close(graph, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_sees_through(dtype):
    moe, x = make(dtype=dtype), torch.randn(1, 5, 16, dtype=dtype)
    parameters = dict(moe.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(moe, p, (x,)).square().sum())(parameters)
    moe(x).square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_one_token_and_no_token():
    moe = make()
    whole = torch.randn(1, 3, 16, dtype=torch.float64)
    for t in range(3):
        torch.testing.assert_close(moe(whole[:, t : t + 1]), moe(whole)[:, t : t + 1], atol=1e-13, rtol=0)
    empty = moe(whole[:, :0])
    assert empty.shape == (1, 0, 16)
    assert moe.statistics is None
    assert moe.auxiliary_loss is None


@pytest.mark.parametrize("autocast", [False, True])
def test_router_computes_in_float32(autocast):
    """The same numbers as float64 on the same inputs, to float32's rounding, in the model's bfloat16 or autocast's;
    noise too. What is rounded to bfloat16 on the way is a thousand times further off."""
    dtype = torch.float32 if autocast else torch.bfloat16
    router = make(dtype=dtype, router=spec(TopKRouter, noise=True, bias=True)).router
    nn.init.normal_(router.bias)
    nn.init.normal_(router.noise)
    x = torch.randn(64, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = router.eval()(x).logits
        torch.manual_seed(1)
        noisy = router.train()(x).logits
    torch.manual_seed(1)
    expected = x.double() @ router.weight.double().T + router.bias.double()
    spread = F.softplus(x.double() @ router.noise.double().T)
    assert plain.dtype == noisy.dtype == torch.float32
    torch.testing.assert_close(plain.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(noisy.double(), expected + spread * torch.randn(64, 8).double(), atol=3e-5, rtol=0)


def test_float64_under_autocast_stays_float64():
    """As it does in torch's own linear map."""
    moe, x = make(num_shared_experts=1), torch.randn(1, 8, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = moe(x)
    torch.testing.assert_close(mixed, moe(x), atol=1e-13, rtol=0)


# --- routing ----------------------------------------------------------------------------------------------------------


def test_renormalised_softmax_is_softmax_of_the_top_k():
    logits = torch.randn(50, 8, dtype=torch.float64)
    for k in (1, 3, 8):
        a, chosen = route(logits, k, norm_topk_prob=True)
        b, same = route(logits, k, scoring="softmax_of_top_k")
        assert torch.equal(chosen, same)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.sum(-1), torch.ones(50, dtype=torch.float64))
    plain, _ = route(logits, 3)
    assert (plain.sum(-1) < 1).all()


@pytest.mark.parametrize("n_group", [3, 4])
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_groups_limit_the_choice(group_score, n_group):
    """Against a search that goes through the groups one by one."""
    size = 12 // n_group
    logits, bias = torch.randn(40, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    weights, experts = route(
        logits, 3, scoring="sigmoid", n_group=n_group, topk_group=2, group_score=group_score, correction_bias=bias
    )
    for row, chosen, w in zip(logits, experts, weights, strict=True):
        preference = (row.sigmoid() + bias).tolist()
        groups = [preference[size * g : size * (g + 1)] for g in range(n_group)]
        worth = [max(g) if group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
        best = sorted(range(n_group), key=lambda g: -worth[g])[:2]
        allowed = [e for e in range(12) if e // size in best]
        assert sorted(chosen.tolist()) == sorted(sorted(allowed, key=lambda e: -preference[e])[:3])
        torch.testing.assert_close(w, row.sigmoid()[chosen])


def test_the_bias_moves_the_choice_and_not_the_weight():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    plain, chosen = route(logits, 1, scoring="sigmoid")
    moved, other = route(logits, 1, scoring="sigmoid", correction_bias=torch.tensor([1.0, 0.0, 0.0]))
    assert (chosen.item(), other.item()) == (2, 0)
    assert moved.item() == pytest.approx(torch.sigmoid(logits[0, 0]).item())
    assert plain.item() == pytest.approx(torch.sigmoid(logits[0, 2]).item())


def test_expert_choice_is_even_and_takes_the_best():
    moe = make(num_experts=4, top_k=2, router=spec(ExpertChoiceRouter))
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    y = moe(x)
    assert moe.statistics.counts.tolist() == [8, 8, 8, 8]
    p = (x.flatten(0, 1) @ moe.router.weight.T).softmax(-1)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for e in range(4):
        expert = one_expert(moe, EXPERTS["swiglu"], e)
        for t in sorted(range(16), key=lambda t: -p[t, e].item())[:8]:
            expected[t] += p[t, e] * expert(x.flatten(0, 1)[t])
    torch.testing.assert_close(y.flatten(0, 1), expected, atol=1e-12, rtol=0)


def test_expert_choice_rounds_its_capacity_up():
    moe = make(num_experts=4, top_k=1, router=spec(ExpertChoiceRouter))
    moe(torch.randn(1, 9, 16, dtype=torch.float64))
    assert moe.statistics.counts.tolist() == [3, 3, 3, 3]


def test_switch_drops_what_does_not_fit_in_order_of_time():
    moe = make(num_experts=2, top_k=1, capacity_factor=0.5)
    with torch.no_grad():
        moe.router.weight[0], moe.router.weight[1] = 1.0, -1.0
    x = torch.rand(1, 12, 16, dtype=torch.float64)
    y = moe(x)
    assert moe.statistics.wanted.tolist() == [12, 0]
    assert moe.statistics.counts.tolist() == [3, 0]
    assert moe.statistics.dropped == pytest.approx(0.75)
    assert y[0, :3].abs().sum(-1).min() > 0
    assert y[0, 3:].abs().max() == 0
    assert moe.eval()(x).abs().sum(-1).min() > 0


def test_capacity_rounds_up_and_a_wide_one_drops_nothing():
    moe = make(num_experts=4, top_k=2, capacity_factor=4.0)
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(moe(x), moe.eval()(x))
    assert moe.statistics.dropped == 0
    tight = make(num_experts=8, top_k=1, capacity_factor=0.01)
    tight(x)
    assert tight.statistics.counts.max() == 1


@pytest.mark.parametrize(
    "num_experts, top_k, factor, tokens, rows",
    [(10, 1, 1.1, 100, 11), (10, 1, 1.1, 101, 12), (4, 2, 1.0, 16, 8), (4, 4, 0.5, 16, 8), (4, 1, 1.25, 16, 5)],
)
def test_capacity_is_its_formula(num_experts, top_k, factor, tokens, rows):
    """⌈factor · tokens · top_k / num_experts⌉ in the decimals that were written; the evaluation's factor is its own."""
    moe = make(num_experts, top_k, capacity_factor=factor, eval_capacity_factor=factor / 2)
    with torch.no_grad():
        moe.router.weight.zero_()[0] = 1.0
    x = torch.rand(1, tokens, 16, dtype=torch.float64)
    moe(x)
    assert moe.statistics.counts[0] == rows
    moe.eval()(x)
    assert moe.statistics.counts[0] == math.ceil(round(factor / 2 * tokens * top_k / num_experts, 6))


def test_noise_and_jitter_act_in_training_only():
    x = torch.randn(1, 32, 16, dtype=torch.float64)
    noisy = make(router=spec(TopKRouter, scoring="softmax_of_top_k", noise=True))
    shaky = make(router=spec(TopKRouter, jitter=0.2))
    for moe in (noisy, shaky):
        assert not torch.equal(moe(x), moe(x))
        moe.eval()
        assert torch.equal(moe(x), moe(x))
    noisy.train()(x).sum().backward()
    assert noisy.router.noise.grad.abs().max() > 0


def test_noise_is_normal_and_jitter_a_factor():
    """Noise: (logits − W x) / softplus(W_noise x) has the moments of N(0, 1), the fourth too. Jitter: of an input of
    ones, the logits through an identity are the factors themselves, evenly spread over their range and uncorrelated."""
    router = make(router=spec(TopKRouter, noise=True)).router
    nn.init.normal_(router.noise)
    x = torch.randn(5000, 16, dtype=torch.float64)
    z = (router(x).logits - x @ router.weight.T) / F.softplus(x @ router.noise.T)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert z.pow(power).mean().item() == pytest.approx(moment, abs=0.15)
    for scale in (1.0, 10.0):
        router = make(16, router=spec(TopKRouter, jitter=0.1), dtype=torch.bfloat16).router
        router.weight.data = torch.eye(16).bfloat16()
        factors = router(torch.full((5000, 16), scale).bfloat16()).logits / scale
        assert 0.9 <= factors.min() < 0.901 and 1.099 < factors.max() <= 1.1
        assert factors.mean().item() == pytest.approx(1, abs=0.001)
        assert factors.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
        assert len(factors.unique()) > 10_000  # in bfloat16 there would be forty


@pytest.mark.parametrize("scoring", ["softmax", "softmax_of_top_k", "sigmoid"])
def test_gradient_reaches_the_router(scoring):
    """dL/dlogits against finite differences, where no route changes."""
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: route(z, 2, scoring=scoring, norm_topk_prob=scoring == "sigmoid")[0], logits)


def leak(moe, t=6):
    """The largest change that the last token can make, to first order, in the outputs of those before it."""
    x = torch.randn(1, t, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(moe(x)[0, :-1].square().sum(), x)
    return gradient[0, -1].abs().max().item()


def changes(moe, t=24):
    """Whether another last token changes an earlier output: the choice of experts and the drops have no gradient."""
    x = torch.randn(1, t, 16, dtype=torch.float64)
    other = torch.cat([x[:, :-1], 3 * torch.randn(1, 1, 16, dtype=torch.float64)], dim=1)
    return (moe(x) - moe(other))[:, :-1].abs().max().item() > 1e-9


def test_no_token_sees_the_future():
    routers = (
        spec(TopKRouter),
        spec(TopKRouter, scoring="softmax_of_top_k"),
        spec(TopKRouter, scoring="sigmoid", norm_topk_prob=True, correction_bias=True, n_group=2),
    )
    for router in routers:
        moe = make(router=router, num_shared_experts=1, capacity_factor=1.0)
        assert leak(moe) == 0
        assert not any(changes(moe) for _ in range(10))


def test_expert_choice_sees_the_future():
    """A later token takes an earlier one's place. The path is a choice: the gradient misses it, a change of x doesn't,
    and neither does the gradient once the choice is made smooth."""
    moe = make(num_experts=4, top_k=1, router=spec(ExpertChoiceRouter), expert=EXPERTS["mlp"])
    assert leak(moe) == 0
    assert sum(changes(moe) for _ in range(10)) > 5
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)

    def taken(logits):
        """How much of token 0 expert 0 takes: a sigmoid around the score of the last token that fits."""
        p = logits.softmax(-1)[:, 0]
        return torch.sigmoid((p[0] - p.topk(3).values[-1]) / 0.01)

    (gradient,) = torch.autograd.grad(taken(moe.router.logits(x)), x)
    assert gradient[1:].abs().max() > 0


# --- balance ----------------------------------------------------------------------------------------------------------


def test_load_balancing_loss_on_cases_made_by_hand():
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1)
    one = F.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
    assert load_balancing_loss(one, torch.tensor([8, 0, 0, 0])).item() == pytest.approx(4)
    # f = (3/4, 1/4), P = (0.6, 0.4): 2 (0.45 + 0.1)
    p = torch.tensor([[0.6, 0.4]] * 4)
    assert load_balancing_loss(p, torch.tensor([3, 1])).item() == pytest.approx(1.1)


def test_balance_per_sequence_and_per_batch():
    """Two sequences that each use one expert: perfect over the batch, the worst per sequence."""
    p = torch.tensor([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3])
    assert load_balancing_loss(p.flatten(0, 1), torch.tensor([3, 3])).item() == pytest.approx(1)
    assert load_balancing_loss(p, torch.tensor([[3, 0], [0, 3]])).item() == pytest.approx(2)


def test_the_layer_reports_both_balances():
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    for over in ("batch", "sequence"):
        moe = make(load_balance_alpha=0.5, balance_over=over)
        moe(x)
        p = (x @ moe.router.weight.T).softmax(-1)
        counts = F.one_hot(p.topk(2).indices, 8).sum((1, 2))
        expected = (
            load_balancing_loss(p, counts)
            if over == "sequence"
            else load_balancing_loss(p.flatten(0, 1), counts.sum(0))
        )
        torch.testing.assert_close(moe.auxiliary_loss, 0.5 * expected)


def test_losses_look_at_the_routes_before_the_drop():
    """What one sequence asks for is the same per sequence and per batch, and a sequence may lose all its rows."""
    found = {}
    for over in ("batch", "sequence"):
        moe = make(2, 1, capacity_factor=0.5, load_balance_alpha=1.0, balance_over=over)
        with torch.no_grad():
            moe.router.weight[0], moe.router.weight[1] = 1.0, -1.0
        x = torch.linspace(0.01, 0.02, 2 * 6 * 16, dtype=torch.float64).view(2, 6, 16)
        moe(x)
        assert moe.statistics.dropped == 0.75  # the second sequence has lost all
        p = (x @ moe.router.weight.T).softmax(-1)
        torch.testing.assert_close(moe.auxiliary_loss, 2 * p[..., 0].mean())
        x[:, 3:] *= -1
        moe(x[:1])
        found[over] = moe.auxiliary_loss
    torch.testing.assert_close(found["batch"], found["sequence"])


def test_deepseek_v3_s_balance_is_this_loss_of_other_counts():
    """α Σ f P with f = E / (K T) · how often an expert is among the top K of the scores, as arXiv:2412.19437 has it."""
    scores = torch.rand(5, 8, dtype=torch.float64)
    p, among = scores / scores.sum(-1, keepdim=True), F.one_hot(scores.topk(2).indices, 8).sum(1)
    expected = sum(8 / (2 * 5) * sum(among[t, e] for t in range(5)) * p[:, e].mean() for e in range(8))
    torch.testing.assert_close(load_balancing_loss(p, among.sum(0)), expected)


def test_the_loss_and_the_entropy_take_the_sigmoids_over_their_sum():
    router = spec(TopKRouter, scoring="sigmoid", correction_bias=True)
    moe, x = make(load_balance_alpha=1.0, router=router), torch.randn(1, 9, 16, dtype=torch.float64)
    moe.eval()(x)  # the loss is there wherever gradients are
    scores = (x[0] @ moe.router.weight.T).sigmoid()
    p = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(moe.auxiliary_loss, load_balancing_loss(p, moe.statistics.counts))
    assert moe.statistics.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8))
def test_load_balancing_loss_is_least_when_all_is_even(logits):
    """Where the load follows the probabilities the loss is E Σ P² ≥ 1, with equality at 1/E."""
    p = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    assert load_balancing_loss(p.expand(4, -1), p * 100).item() >= 1 - 1e-12


def test_balance_is_exact_in_float64_and_defined_for_a_sequence_without_rows():
    p, counts = torch.rand(7, 3, dtype=torch.float64), torch.tensor([1, 5, 1])
    expected = 3 * (p.mean(0) @ torch.tensor([1 / 7, 5 / 7, 1 / 7], dtype=torch.float64))
    torch.testing.assert_close(load_balancing_loss(p, counts), expected, atol=1e-15, rtol=0)
    narrow = load_balancing_loss(p.bfloat16(), torch.tensor([1, 257, 0]))  # 257 isn't a bfloat16
    torch.testing.assert_close(narrow, load_balancing_loss(p.bfloat16().double(), torch.tensor([1, 257, 0])).float())
    with pytest.raises(ConfigError, match=r"counts has shape \(3,\), and for probabilities \(2, 7, 3\) must be"):
        load_balancing_loss.__wrapped__(torch.stack([p, p]), counts)  # without the tests' own checks
    both = load_balancing_loss(torch.stack([p, p]), torch.stack([counts, 0 * counts]))
    torch.testing.assert_close(both, expected / 2)
    options = dict(router=spec(ExpertChoiceRouter), load_balance_alpha=1.0, balance_over="sequence", d_model=4)
    moe = make(4, 1, **options)
    moe.router.weight.data = 9 * torch.eye(4).double()
    moe(torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 1]], [[0.0] * 4] * 2]).double())
    assert moe.statistics.tokens.tolist() == [0, 0, 1, 1]  # none of the second sequence
    assert moe.auxiliary_loss.item() == pytest.approx(1 / 2)


def test_sigmoids_that_all_round_to_nothing_are_still_a_distribution():
    logits = torch.tensor([[-200.0, -201.0]])
    expected = torch.tensor([[1.0, math.exp(-1)]]) / (1 + math.exp(-1))
    torch.testing.assert_close(distribution(logits, "sigmoid"), expected)


def test_its_gradient_is_the_load():
    p = torch.rand(10, 4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([1, 2, 3, 4])
    load_balancing_loss(p, counts).backward()
    torch.testing.assert_close(p.grad.sum(0), 4 * counts / 10.0, check_dtype=False)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected)
    moe = make(z_loss_weight=0.1)
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    moe(x)
    torch.testing.assert_close(moe.auxiliary_loss, 0.1 * router_z_loss(x @ moe.router.weight.T))


def test_the_bias_steps_against_the_load():
    bias = torch.zeros(4)
    move_bias_(bias, torch.tensor([10.0, 2.0, 4.0, 4.0]), 0.01)
    assert bias.tolist() == pytest.approx([-0.01, 0.01, 0.01, 0.01])
    moe = make(bias_update_rate=0.1, router=spec(TopKRouter, scoring="sigmoid", correction_bias=True))
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    moe(x)
    moe(x)
    assert moe.load.sum() == 32
    moe.after_step()
    assert moe.load.sum() == 0
    assert set(moe.router.e_score_correction_bias.abs().unique().tolist()) <= {0.0, 0.1}
    before = moe.router.e_score_correction_bias.clone()
    moe.eval()(x)
    moe.after_step()
    assert torch.equal(before, moe.router.e_score_correction_bias)


BIASED = dict(bias_update_rate=0.001, router=spec(TopKRouter, scoring="sigmoid", correction_bias=True))


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16), copy.copy])
def test_the_bias_moves_in_every_dtype(cast):
    """In bfloat16 a step of 0.001 from 0.6 rounds to nothing, and 257 tokens count as 256."""
    moe = make(**BIASED, dtype=torch.float32)
    moe.router.e_score_correction_bias.copy_(torch.linspace(0.6, 0.601, 8))
    before = moe.router.e_score_correction_bias.clone()
    moe = cast(moe)
    assert torch.equal(moe.router.e_score_correction_bias, before)
    x = torch.randn(1, 1, 16).to(moe.router.weight.dtype)
    for _ in range(257):
        moe(x)
    assert sorted(moe.load.tolist())[-2:] == [257, 257]
    moe.after_step()
    step = moe.router.e_score_correction_bias - before
    torch.testing.assert_close(step.sort().values, torch.tensor([-0.001] * 2 + [0.001] * 6), atol=1e-6, rtol=0)


def test_the_bias_follows_a_model_off_the_meta_device_and_into_float64():
    with torch.device("meta"):
        moe = make(**BIASED, dtype=torch.bfloat16)
    bias = moe.to_empty(device="cpu").router.e_score_correction_bias
    assert (bias.dtype, bias.device.type) == (torch.float32, "cpu")
    bias.fill_(7.0)
    moe.load.fill_(7)
    moe.reset_parameters()
    assert bias.abs().max() == moe.load.max() == 0
    assert moe.double().router.e_score_correction_bias.dtype == torch.float64


def test_max_violation_at_both_ends():
    assert max_violation(torch.tensor([5, 5, 5])) == 0
    assert max_violation(torch.tensor([9, 0, 0])) == pytest.approx(2)


def test_statistics_are_plain_numbers():
    moe = make()
    moe(torch.randn(1, 32, 16, dtype=torch.float64))
    s = moe.statistics
    assert s.load.sum().item() == pytest.approx(1)
    assert s.max_violation == pytest.approx(s.load.max().item() * 8 - 1, rel=1e-5)
    p = s.logits.softmax(-1)
    assert s.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item())
    assert set(s.as_dict()) == {"load", "max_violation", "dropped", "entropy", "max_entropy"}
    assert list(statistics(nn.ModuleDict({"ffn": moe}))) == ["ffn"]


def test_statistics_with_a_capacity():
    """Five tokens, three of which want expert 0 and two expert 1, with room for two each: MaxVio is of what was wanted,
    the load of what was computed."""
    moe = make(
        4, 1, capacity_factor=1.5, bias_update_rate=0.1, router=spec(TopKRouter, correction_bias=True), d_model=4
    )
    moe.router.weight.data = torch.eye(4).double()
    moe(torch.eye(4).double()[[0, 1, 0, 1, 0]][None])
    s = moe.statistics
    assert (s.wanted.tolist(), s.counts.tolist()) == ([3, 2, 0, 0], [2, 2, 0, 0])
    assert s.load.tolist() == [0.5, 0.5, 0, 0]
    assert s.max_violation == pytest.approx(3 / 1.25 - 1)
    assert s.dropped == 1 - 4 / 5
    assert s.as_dict()["max_entropy"] == pytest.approx(math.log(4))
    assert s.chosen.int().tolist() == torch.eye(4).int()[[0, 1, 0, 1, 0]].tolist()
    assert moe.load.tolist() == [3, 2, 0, 0]


@pytest.mark.parametrize("router", [spec(TopKRouter), spec(ExpertChoiceRouter)])
def test_statistics_know_who_went_where(router):
    moe, x = make(router=router), torch.randn(2, 8, 16, dtype=torch.float64)
    moe(x)
    p = (x.flatten(0, 1) @ moe.router.weight.T).softmax(-1)
    dim = 1 if router.cls is TopKRouter else 0
    expected = torch.zeros_like(p).scatter(dim, p.topk(2 if dim else 4, dim=dim).indices, 1.0).bool()
    assert torch.equal(moe.statistics.chosen, expected)


def test_experts_that_a_batch_touches_by_simulation():
    for num_experts, top_k, tokens in ((8, 2, 1), (8, 2, 4), (64, 6, 10)):
        draws = torch.rand(2000, tokens, num_experts).topk(top_k).indices.flatten(1)
        touched = torch.zeros(2000, num_experts).scatter(1, draws, 1.0).sum(1).mean().item()
        assert experts_touched(num_experts, top_k, tokens) == pytest.approx(touched, rel=0.02)
    assert experts_touched(8, 8, 1) == 8
    assert experts_touched(8, 2, 0) == 0
    with pytest.raises(ConfigError, match="top_k is 9"):
        experts_touched(8, 9, 1)


# --- shared, latent, upcycled -----------------------------------------------------------------------------------------


def test_shared_experts_are_several_side_by_side():
    """Two shared experts of width 24 are one of width 48."""
    moe = make(num_shared_experts=2)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    wide = moe.shared_experts
    halves = []
    for part in (slice(0, 24), slice(24, 48)):
        half = SwiGLU(16, d_ff=24).double()
        half.load_state_dict(
            {
                "gate_proj.weight": wide.gate_proj.weight[part],
                "up_proj.weight": wide.up_proj.weight[part],
                "down_proj.weight": wide.down_proj.weight[:, part],
            }
        )
        halves.append(half(x))
    routed = copy.deepcopy(moe)
    routed.shared_experts = None
    torch.testing.assert_close(moe(x), routed(x) + halves[0] + halves[1])


def test_latent_experts_work_between_two_projections():
    moe = make(latent_size=8, latent_bias=True, router=spec(TopKRouter, norm_topk_prob=True), num_experts=1, top_k=1)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    inner = SwiGLU(8, d_ff=24).double()
    inner.load_state_dict({name: p[0] for name, p in moe.experts.state_dict().items()})
    torch.testing.assert_close(moe(x), moe.latent_out_proj(inner(moe.latent_in_proj(x))))


CONFIG = dict(vocab_size=50, d_model=16, norm=spec(RMSNorm))


def config(ffn, layers=2):
    return ModelConfig(layers=layers * (Layer(ffn=ffn),), **CONFIG)


def sparse_ffn(**options):
    router = spec(TopKRouter, norm_topk_prob=True)
    return spec(MoE, num_experts=4, top_k=2, expert=spec(SwiGLU, d_ff=24), router=router, **options)


def test_an_upcycled_model_starts_as_the_dense_one():
    dense = CausalLM(config(spec(SwiGLU, d_ff=24)))
    for options in ({}, {"num_shared_experts": 1}):
        sparse = CausalLM(config(sparse_ffn(**options)))
        upcycle(dense, sparse)
        tokens = torch.randint(50, (2, 7))
        torch.testing.assert_close(sparse(tokens), dense(tokens), atol=1e-5, rtol=1e-5)
    layer, ffn = MoE(16, **sparse_ffn().options), SwiGLU(16, d_ff=24)
    upcycle(ffn, layer)
    x = torch.randn(1, 3, 16)
    torch.testing.assert_close(layer(x), ffn(x))
    layer, before = MoE(16, **sparse_ffn(num_shared_experts=1).options), {}
    before = {name: p.clone() for name, p in layer.state_dict().items()}
    with pytest.raises(ConfigError, match=r"gate_proj.weight \(4, 24, 16\) can't be filled.*\(20, 16\)"):
        upcycle(SwiGLU(16, d_ff=20), layer)
    with pytest.raises(ConfigError, match="up_proj.bias of the dense model would be lost"):
        upcycle(MLP(16, d_ff=24), MoE(16, num_experts=4, top_k=2, expert=EXPERTS["mlp"]))
    assert all(torch.equal(p, before[name]) for name, p in layer.state_dict().items())


def test_shared_layers_can_not_ask_for_a_loss():
    """Only the last pass's would stay."""
    for options in (dict(load_balance_alpha=0.1), dict(z_loss_weight=0.1)):
        shared = Layer(ffn=sparse_ffn(**options), shared="a")
        with pytest.raises(
            ConfigError, match=r"layers\[1\] shares weights as 'a', so only the auxiliary loss of its last pass"
        ):
            CausalLM(ModelConfig(layers=(shared, shared), **CONFIG))
    CausalLM(ModelConfig(layers=2 * (Layer(ffn=sparse_ffn(), shared="a"),), **CONFIG))


def test_a_model_with_experts_is_data():
    """Dense layers among sparse ones; YAML and back; a copy; initial weights; decay; FLOPs on the meta device."""
    layers = (Layer(ffn=spec(SwiGLU, d_ff=64)), Layer(ffn=sparse_ffn(load_balance_alpha=0.01, num_shared_experts=1)))
    whole = ModelConfig(layers=layers, **CONFIG)
    assert ModelConfig.from_yaml(whole.to_yaml()) == whole
    model = CausalLM(whole)
    loss = model.loss(torch.randint(50, (2, 9))) + model.auxiliary_loss()
    loss.backward()
    assert model.auxiliary_loss().item() >= 0.01 - 1e-6
    assert copy.deepcopy(model).layers[1].ffn.auxiliary_loss is None
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model(torch.randint(50, (2, 9)))
    assert model.auxiliary_loss() == 0
    experts = model.layers[1].ffn.experts
    assert experts.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert experts.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2), rel=0.1)
    assert list(statistics(model)) == ["layers.1.ffn"]
    # 2 FLOPs for each weight that a token meets: 2 routed experts and a shared one, and the router
    assert flops(whole, time=6).ffn == 6 * 2 * (3 * 16 * 64 + 3 * 3 * 16 * 24 + 4 * 16)


def test_stacked_biases_are_free_of_decay():
    moe = make(expert=EXPERTS["glu with biases"], router=spec(TopKRouter, bias=True))
    biases = {name for name, _ in moe.named_parameters() if name.endswith("bias")}
    assert len(biases) == 4 and biases <= spared_from_decay(moe)


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(texts, value=math.nan):
    """Texts of other lengths in one batch, padding on the left, and where it isn't; no product survives NaN."""
    longest = max(map(len, texts))
    rows = [F.pad(text, (0, 0, longest - len(text), 0), value=value) for text in texts]
    valid = torch.arange(longest) >= longest - torch.tensor([[len(text)] for text in texts])
    return torch.stack(rows), valid


def texts_of(*lengths):
    return [torch.randn(n, 16, dtype=torch.float64) for n in lengths]


ROUTERS = {
    "softmax": spec(TopKRouter),
    "softmax_of_top_k": spec(TopKRouter, scoring="softmax_of_top_k"),
    "sigmoid": spec(TopKRouter, scoring="sigmoid", norm_topk_prob=True, correction_bias=True, n_group=2),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_is_left_out(name):
    """Each text's result and its gradient as alone; 0 on the padding, and no gradient, whatever stood there."""
    moe, texts = make(router=ROUTERS[name], num_shared_experts=1), texts_of(5, 2, 9, 0)
    x, valid = padded(texts)
    x.requires_grad_()
    y = moe(x, Context(valid=valid))
    y.square().sum().backward()
    assert y[~valid].abs().max() == x.grad[~valid].abs().max() == 0
    alone = [text[None].clone().requires_grad_() for text in texts]
    for text in alone:
        moe(text).square().sum().backward()
    for whole, parts in ((y, [moe(text) for text in alone]), (x.grad, [text.grad for text in alone])):
        torch.testing.assert_close(whole[valid], torch.cat(parts, 1)[0], atol=1e-12, rtol=0)
    moe(x, Context(valid=torch.ones_like(valid) & False))
    assert moe.statistics is None and moe.auxiliary_loss is None


@pytest.mark.parametrize("over", ["batch", "sequence"])
@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_losses_statistics_and_bias_are_those_of_the_tokens_without_padding(over, router):
    """Over the batch those of one long text; per sequence the mean of each sequence's own."""
    rate = 0.1 if router == "sigmoid" else 0.0
    options = dict(load_balance_alpha=0.5, z_loss_weight=0.1, balance_over=over, bias_update_rate=rate)
    moe, texts = make(router=ROUTERS[router], **options), texts_of(5, 2, 9, 0)
    x, valid = padded(texts)
    moe(x, Context(valid=valid))
    auxiliary, found = moe.auxiliary_loss, moe.statistics
    load = moe.load.clone() if rate else None
    auxiliary.backward()
    gradient = moe.router.weight.grad.clone()
    moe.zero_grad()
    moe(torch.cat(texts)[None])
    expected, one = moe.auxiliary_loss, moe.statistics
    if over == "sequence":
        z_losses, own = [0.1 * router_z_loss(text @ moe.router.weight.T) for text in (*texts[:3], torch.cat(texts))], []
        for text, z_loss in zip(texts[:3], z_losses, strict=False):
            moe(text[None])
            own.append(moe.auxiliary_loss - z_loss)
        expected = sum(own) / 3 + z_losses[3]
    torch.testing.assert_close(auxiliary, expected, atol=1e-12, rtol=0)
    expected.backward()
    torch.testing.assert_close(gradient, moe.router.weight.grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.as_dict(), one.as_dict())
    assert torch.equal(found.chosen, one.chosen)
    if rate:
        assert torch.equal(load, found.counts) and load.sum() == 2 * 16


@pytest.mark.parametrize("router", [spec(TopKRouter), spec(TopKRouter, noise=True), spec(ExpertChoiceRouter)])
def test_capacity_noise_and_the_experts_choice_are_over_the_valid_tokens(router):
    moe, texts = make(4, router=router, capacity_factor=0.5), texts_of(3, 7, 1)
    x, valid = padded(texts)
    torch.manual_seed(1)
    y = moe(x, Context(valid=valid))[valid]
    dropped = moe.statistics.dropped
    torch.manual_seed(1)
    torch.testing.assert_close(y, moe(torch.cat(texts)[None])[0], atol=1e-12, rtol=0)
    assert moe.statistics.dropped == dropped > 0
    assert moe.statistics.counts.max() == math.ceil(0.5 * 11 * 2 / 4)


@pytest.mark.parametrize("layer", [dict(), dict(parallel=True), dict(placement="post"), dict(placement="sandwich")])
def test_a_model_leaves_padding_out_whole_and_in_pieces(layer):
    """And token by token behind a cache, where `valid` covers the tokens before too."""
    layer = Layer(mixer=spec(Attention, num_heads=2, rope_theta=1e4), ffn=sparse_ffn(num_shared_experts=1), **layer)
    model = CausalLM(ModelConfig(layers=(layer, layer), init_std=0.3, **CONFIG)).double()
    long, short = torch.randint(50, (2, 9))
    batch, valid = torch.stack([long, F.pad(short[:5], (4, 0))]), torch.arange(9) >= torch.tensor([[0], [4]])
    expected = model(long[None])[0], model(short[None, :5])[0]
    whole = model(batch, valid=valid)
    wanted = [s.wanted for s in statistics(model).values()]
    assert [w.sum().item() for w in wanted] == 2 * [2 * 14]
    state, pieces = model.new_state(), []
    for start, end in ((0, 2), (2, 7), (7, 8), (8, 9)):
        pieces.append(model(batch[:, start:end], state, valid=valid[:, :end]))
    for y in (whole, torch.cat(pieces, 1)):
        torch.testing.assert_close(y[0], expected[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(y[1, 4:], expected[1], atol=1e-6, rtol=0)


def test_padding_that_does_not_fit_is_named():
    moe, x = make(), torch.randn(2, 4, 16, dtype=torch.float64)
    for shape in ((2, 3), (3, 4)):
        with pytest.raises(ConfigError, match=r"context.valid has shape .*, and must be .* so \(2, 4\) or longer"):
            moe(x, Context(valid=torch.ones(shape, dtype=torch.bool)))
    none = Context(valid=torch.ones(2, 4, dtype=torch.bool))
    assert moe(x[:, :0], none).shape == (2, 0, 16)
    with torch.device("meta"):
        assert make()(x.to("meta"), Context(valid=torch.ones(2, 4, dtype=torch.bool))).shape == x.shape


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=9), r"top_k is 9, and must lie between 1 and num_experts = 8"),
        (dict(top_k=0), r"top_k is 0"),
        (dict(num_experts=0), r"num_experts is 0"),
        (dict(top_k=9, router=spec(ExpertChoiceRouter)), r"top_k is 9"),
        (dict(router=spec(TopKRouter, n_group=3)), r"n_group is 3, and must divide num_experts = 8"),
        (dict(router=spec(TopKRouter, n_group=4, topk_group=5)), r"topk_group is 5"),
        (dict(top_k=3, router=spec(TopKRouter, n_group=4)), r"but the topk_group = 1 best groups of 2 hold 2 experts"),
        (dict(top_k=1, router=spec(TopKRouter, n_group=8, group_score="top2")), r"needs two experts in a group"),
        (dict(router=spec(TopKRouter, scoring="tanh")), r"scoring is 'tanh'; choose one of softmax"),
        (dict(router=spec(TopKRouter, group_score="mean")), r"group_score is 'mean'"),
        (dict(router=spec(TopKRouter, scoring="softmax_of_top_k", correction_bias=True)), r"correction_bias needs"),
        (dict(router=spec(TopKRouter, jitter=1.0)), r"jitter is 1.0"),
        (dict(capacity_factor=0.0), r"capacity_factor is 0.0, and must be above 0"),
        (dict(capacity_factor=-1.0), r"capacity_factor is -1.0"),
        (dict(eval_capacity_factor=0.0), r"eval_capacity_factor is 0.0"),
        (dict(balance_over="token"), r"balance_over is 'token'"),
        (dict(num_shared_experts=-1), r"num_shared_experts is -1"),
        (dict(num_shared_experts=1, shared_expert=EXPERTS["mlp"]), r"give one of the two"),
        (dict(shared_expert_gate=True), r"nothing to gate"),
        (dict(latent_size=0), r"latent_size is 0"),
        (dict(bias_update_rate=0.1), r"no bias to move"),
        (dict(bias_update_rate=-0.1), r"bias_update_rate is -0.1, and can't be below 0"),
        (dict(capacity_factor=math.inf), r"capacity_factor is inf, and must be above 0 and finite"),
        (dict(expert=lambda d: MLP(d, d_ff=8), num_shared_experts=1), r"names no d_ff to multiply by it"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_an_expert_that_cannot_be_stacked_is_named():
    class Scaled(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.scale, self.proj = nn.Parameter(torch.ones(d_model)), nn.Linear(d_model, d_model)

    with pytest.raises(ConfigError, match="Scaled can't be an expert: scale is in no linear map"):
        MoE(16, num_experts=2, top_k=1, expert=Scaled)


def test_nan_is_named_where_it_arises():
    moe = make()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    x[0, 2] = math.nan
    with pytest.raises(FloatingPointError, match=r"logits are NaN for 1 of 5 tokens"):
        moe(x)


@pytest.mark.parametrize("scoring", ["softmax", "softmax_of_top_k", "sigmoid"])
def test_infinite_logits_and_nan_from_elsewhere_are_named(scoring):
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    moe = make(router=spec(TopKRouter, scoring=scoring, noise=True, bias=True))
    for value, what in ((math.nan, "NaN"), (math.inf, "infinite")):
        for parameter in (moe.router.bias, moe.router.noise):
            kept = parameter.data.clone()
            parameter.data[0] = value
            if parameter is moe.router.bias or what == "NaN":
                with pytest.raises(FloatingPointError, match=rf"logits are {what} for 5 of 5 tokens"):
                    moe(x)
            parameter.data = kept
    moe.router.bias.data.fill_(-math.inf)
    with pytest.raises(FloatingPointError, match="logits are infinite"):
        moe(x)
    moe.router.bias.data[:2] = 0.0  # an expert may be shut out
    moe(x)
    assert moe.statistics.counts.tolist() == [5, 5, 0, 0, 0, 0, 0, 0]
    with pytest.raises(FloatingPointError, match="correction bias is .* holds NaN"):
        route(torch.randn(3, 2), 1, scoring="sigmoid", correction_bias=torch.tensor([0.0, math.nan]))
    with pytest.raises(FloatingPointError, match="logits are NaN for 1 of 3"):
        expert_choice(torch.tensor([[1.0], [math.nan], [2.0]]), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=9), r"top_k is 9, and must lie between 1 and num_experts = 8"),
        (dict(top_k=0), r"top_k is 0"),
        (dict(top_k=2, n_group=3), r"n_group is 3, and must divide num_experts = 8"),
        (dict(top_k=4, n_group=4), r"best groups of 2 hold 2 experts"),
        (dict(top_k=2, scoring="tanh"), r"scoring is 'tanh'"),
        (dict(top_k=2, group_score="mean"), r"group_score is 'mean'"),
    ],
)
def test_route_names_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        route(torch.randn(4, 8), **options)


def test_expert_choice_names_an_impossible_capacity():
    for capacity in (5, -1):
        with pytest.raises(ConfigError, match=f"capacity is {capacity}, and must lie between 0 and the 4 tokens"):
            expert_choice(torch.randn(4, 8), capacity)


def test_routers_say_what_they_are():
    assert repr(make().router) == "TopKRouter(16 → 8, bias=False, top_k=2, scoring='softmax')"
    assert repr(ExpertChoiceRouter(16, 8, 2)) == "ExpertChoiceRouter(16 → 8, bias=False, top_k=2)"


@pytest.mark.parametrize("shape", [(4, 16), (2, 3, 4, 16), (1, 4, 15)])
def test_an_input_of_another_shape_is_named(shape):
    with pytest.raises(ConfigError, match=r"x has shape \(.*\), and a mixture takes \(batch, time, 16\)"):
        MoE.forward.__wrapped__(make(), torch.randn(shape, dtype=torch.float64))  # without the tests' own checks


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 1, 9], [6, -1, 0]])
@pytest.mark.parametrize("name", ["reference", "segments", "grouped_mm", "by_expert"])
def test_counts_that_do_not_fit_the_rows_are_named(name, counts):
    x, W = torch.randn(5, 16), torch.randn(3, 16, 16)
    with kernels(name), pytest.raises(ConfigError, match=r"counts must be 0 or more and sum to the 5 rows of x"):
        if name == "by_expert":
            expert_swiglu(x, W, W, W, torch.tensor(counts))
        else:
            expert_linear(x, W, torch.tensor(counts))


def test_a_whole_layer_compiles():
    """In a process of its own: the checks of shape annotations that tests install can't be traced."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_shapes_that_do_not_fit_are_named():
    x, W = torch.randn(4, 8), torch.randn(3, 5, 8)
    with pytest.raises(ConfigError, match=r"counts has 2 entries for the 3 experts"):
        expert_linear(x, W, torch.tensor([2, 2]))
    with pytest.raises(ConfigError, match=r"rows of 7, and weight \(3, 5, 8\) takes rows of 8"):
        expert_linear(x[:, :7], W, torch.tensor([2, 1, 1]))


@pytest.mark.parametrize("kernel", ["reference", "by_expert"])
def test_gated_experts_that_do_not_fit_are_named(kernel):
    x, (gate, up, down), even = torch.randn(24, 16), gated_weights(), torch.tensor([8, 8, 8])
    with kernels(kernel):
        for counts in ([12, 12], [8, 8, 4, 4]):
            with pytest.raises(ConfigError, match=f"counts has {len(counts)} entries for the 3 experts"):
                expert_swiglu(x, gate, up, down, torch.tensor(counts))
        for weights in ((gate, up[:2], down), (gate, up[:, :4], down), (gate, up, down[:, :8])):
            with pytest.raises(ConfigError, match=r"gate \(3, 8, 16\), up .* and down .* don't fit together"):
                expert_swiglu(x, *weights, even)
        with pytest.raises(ConfigError, match=r"rows of 16, and weight \(3, 8, 8\) takes rows of 8"):
            expert_swiglu(x, gate[..., :8], up[..., :8], down[:, :8], even)


def compiled_equals_eager():
    for options in ({}, dict(load_balance_alpha=0.1, num_shared_experts=1), dict(expert=EXPERTS["glu with biases"])):
        torch._dynamo.reset()
        moe, x = make(**options, dtype=torch.float32), torch.randn(2, 7, 16, requires_grad=True)
        other = copy.deepcopy(moe)
        found = []
        for one in (moe, torch.compile(other, backend="aot_eager")):
            loss = one(x).square().sum()
            auxiliary = moe.auxiliary_loss if one is moe else other.auxiliary_loss
            (loss if auxiliary is None else loss + auxiliary).backward()
            found.append([loss.detach(), auxiliary is None, x.grad, *(p.grad for p in one.parameters())])
            x.grad = None
        torch.testing.assert_close(found[0], found[1])


def gated_weights() -> list[nn.Parameter]:
    return [nn.Parameter(0.3 * torch.randn(shape)) for shape in ((3, 8, 16), (3, 8, 16), (3, 16, 8))]


def swiglu_backward(kernel: str, x, weights, counts=(3, 17, 4)) -> None:
    with kernels(kernel):
        expert_swiglu(x, *weights, torch.tensor(counts)).square().sum().backward()


@pytest.mark.parametrize("counts", [(3, 17, 4), (24, 0, 0), (0, 0, 24)])
def test_gradients_in_memory_used_before_are_the_same(counts):
    """Three steps, with other rows for each expert, so that what an idle expert finds there must be cleared."""
    x, weights = torch.randn(24, 16), gated_weights()
    addresses = []
    for sizes in ((8, 8, 8), counts, (5, 9, 10)):
        swiglu_backward("reference", x, weights, sizes)
        expected = [w.grad.clone() for w in weights]
        for w in weights:
            w.grad = None
        swiglu_backward("by_expert", x, weights, sizes)
        torch.testing.assert_close([w.grad for w in weights], expected, rtol=1e-4, atol=1e-3)
        addresses.append([w.grad.data_ptr() for w in weights])
        for w in weights:
            w.grad = None
    assert addresses[0] == addresses[1] == addresses[2]


def test_a_gradient_that_somebody_holds_is_not_overwritten():
    x, weights = torch.randn(24, 16), gated_weights()
    for _ in range(2):  # the second lies in memory used before
        for w in weights:
            w.grad = None
        swiglu_backward("by_expert", x, weights)
    held, row, before = [w.grad for w in weights[:2]], weights[2].grad[1, 2].numpy(), weights[2].grad[1, 2].clone()
    copies = [g.clone() for g in held]
    for w in weights:
        w.grad = None
    swiglu_backward("by_expert", 3 * x, weights)
    assert all(torch.equal(g, c) for g, c in zip(held, copies, strict=True))
    assert (row == before.numpy()).all()


def test_gradients_add_up_over_backward_passes():
    x, weights = torch.randn(24, 16), gated_weights()
    for scale in (1, 2, 3):
        swiglu_backward("by_expert", scale * x, weights)
    sums = [w.grad.clone() for w in weights]
    for w in weights:
        w.grad = None
    for scale in (1, 2, 3):
        swiglu_backward("reference", scale * x, weights)
    torch.testing.assert_close(sums, [w.grad for w in weights], rtol=1e-4, atol=1e-4)


def test_the_memory_of_gradients_goes_with_the_weights():
    weights = gated_weights()
    others = len(_spare)
    swiglu_backward("by_expert", torch.randn(24, 16), weights)
    held = weights[0].grad
    for w in weights:
        w.grad = None
    assert len(_spare) == others + 2  # the first gradient is still held
    twin = copy.deepcopy(weights[1])
    assert len(_spare) == others + 2
    del weights, w
    assert len(_spare) == others
    del held, twin  # a gradient that outlives its weight
    assert len(_spare) == others


def gradients_by(kernel: str, x, weights, inputs):
    with kernels(kernel):
        return torch.autograd.grad(expert_swiglu(x, *weights, torch.tensor([3, 17, 4])).square().sum(), inputs)


def test_weights_that_are_no_leaves_get_their_own_gradients():
    """One weight used twice, a transposed one, and pieces cut from a vector at each step, whose ids come back."""
    x, (gate, _, down) = torch.randn(24, 16), gated_weights()
    sideways, flat = nn.Parameter(down.detach().mT), nn.Parameter(0.3 * torch.randn(3 * gate.numel()))
    for _ in range(20):
        parts = [part.view(w.shape) for part, w in zip(flat.chunk(3), (gate, gate, down), strict=True)]
        cases = ((gate, gate, down), (gate, down)), ((gate, sideways, down), (gate, sideways, down)), (parts, (flat,))
        for weights, inputs in cases:
            found, expected = (gradients_by(kernel, x, weights, inputs) for kernel in ("by_expert", "reference"))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_two_backward_passes_of_one_graph_do_not_share_memory():
    x, weights = torch.randn(24, 16), gated_weights()
    gradients_by("by_expert", x, weights, weights)  # leaves memory to use again
    with kernels("by_expert"):
        y = expert_swiglu(x, *weights, torch.tensor([3, 17, 4]))
    first = torch.autograd.grad(y.sum(), weights, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(3 * y.sum(), weights)
    torch.testing.assert_close(first, tuple(copies), rtol=0, atol=0)
    torch.testing.assert_close(second, tuple(3 * g for g in first), rtol=1e-4, atol=1e-3)


def test_threads_that_share_weights_get_their_own_gradients():
    weights, wrong = gated_weights(), []

    def work():
        for _ in range(50):
            x = torch.randn(24, 16)
            found = torch.autograd.grad(_ByExpert.apply(x, *weights, [3, 17, 4]).square().sum(), weights)
            y = expert_swiglu.reference(x, *weights, torch.tensor([3, 17, 4]))
            for a, b in zip(found, torch.autograd.grad(y.square().sum(), weights), strict=True):
                wrong.append(not torch.allclose(a, b, rtol=1e-4, atol=1e-3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 50 * 3 and not any(wrong)


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_weight_costs_no_product(frozen):
    x, weights = torch.randn(24, 16), gated_weights()
    count = {}
    for frozen_one in (None, frozen):
        for i, w in enumerate(weights):
            w.requires_grad_(i != frozen_one)
        with FlopCounterMode(display=False) as counter:
            swiglu_backward("by_expert", x, weights)
        count[frozen_one] = counter.get_total_flops()
    assert count[None] - count[frozen] == 2 * 24 * 16 * 8


if __name__ == "__main__":
    compiled_equals_eager()
