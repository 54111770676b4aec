"""Scaling laws: against the papers' printed tables, an independent optimiser, and properties that must hold."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from llmlib import scaling
from llmlib.scaling import LAWS, ParametricLaw, TransformerShape, fit_parametric

TEX, EPOCH = LAWS["hoffmann-tex"], LAWS["epoch"]
LLM_SCALE = (ParametricLaw(1.8, 480.0, 2100.0, 0.35, 0.37), (7.5, 10.3), (9.0, 11.5))
TOY_SCALE = (ParametricLaw(0.6, 8.0, 30.0, 0.3, 0.35), (3.2, 5.6), (4.5, 7.5))


def sample(law, sizes, tokens, n=60, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(*sizes, n), 10 ** rng.uniform(*tokens, n)
    return N, D, law.loss(N, D) * np.exp(noise * rng.standard_normal(n))


# ------------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize(("law", "sizes", "tokens"), [LLM_SCALE, TOY_SCALE])
def test_fit_finds_the_law_behind_exact_losses(law, sizes, tokens):
    fit = fit_parametric(*sample(law, sizes, tokens))
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit, name) == pytest.approx(getattr(law, name), rel=1e-6)


@pytest.mark.parametrize(("law", "sizes", "tokens"), [LLM_SCALE, TOY_SCALE])
def test_no_other_optimiser_does_better(law, sizes, tokens):
    """Nelder–Mead from ten places, scipy's, with tolerances below the objective's own size."""
    N, D, loss = sample(law, sizes, tokens, noise=0.01, seed=3)
    fit = fit_parametric(N, D, loss)

    def objective(t):
        e, a, b = np.exp(t[:3])
        return 1e3 * scaling.huber_objective(ParametricLaw(e, a, b, t[3], t[4]), N, D, loss)

    rng = np.random.default_rng(0)
    start = np.array([np.log(law.E), np.log(law.A), np.log(law.B), law.alpha, law.beta])
    options = {"maxiter": 6000, "maxfev": 6000, "xatol": 1e-9, "fatol": 1e-13}
    found = min(
        minimize(objective, start + 0.1 * rng.standard_normal(5), method="Nelder-Mead", options=options).fun
        for _ in range(10)
    )
    assert fit.objective == pytest.approx(scaling.huber_objective(fit, N, D, loss), rel=1e-9)
    assert fit.objective * 1e3 <= found * (1 + 1e-9)


def test_the_fit_of_hoffmanns_runs_is_the_published_one():
    """Epoch's notebook ends at an objective of 0.0010182740 on these 240 points."""
    from llmlib.notebook import recorded

    found = recorded("scaling-refit")
    assert found["points"]["runs"] == 240
    assert found["objective"] == pytest.approx(0.0010182740, rel=1e-7)
    for name, value in found["constants"].items():
        assert getattr(LAWS["refit"], name) == value
        assert value == pytest.approx(getattr(EPOCH, name), rel=0.03)
    low, high = found["tokens_per_parameter_95"]["5.76e+23"]
    assert (round(low), round(high)) == (8, 35)


def test_fit_does_not_depend_on_the_order_of_runs():
    N, D, loss = sample(*LLM_SCALE, noise=0.02)
    fit = fit_parametric(N, D, loss)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(N.size)
        again = fit_parametric(N[order], D[order], loss[order])
        assert again.objective == pytest.approx(fit.objective, rel=1e-9)
        assert again.alpha == pytest.approx(fit.alpha, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(E=st.floats(0.3, 3), alpha=st.floats(0.15, 0.7), beta=st.floats(0.15, 0.7), scale=st.integers(0, 4))
def test_fit_recovers_any_law_at_any_scale(E, alpha, beta, scale):
    """Losses at which each of the three terms matters, at sizes of 1e4…1e6 up to 1e8…1e10."""
    N0, D0 = 10.0 ** (4 + scale), 10.0 ** (5 + scale)
    law = ParametricLaw(E, 1.5 * N0**alpha, 1.5 * D0**beta, alpha, beta)
    rng = np.random.default_rng(0)
    N, D = N0 * 10 ** rng.uniform(0, 2, 50), D0 * 10 ** rng.uniform(0, 2, 50)
    fit = fit_parametric(N, D, law.loss(N, D))
    np.testing.assert_allclose(fit.loss(N, D), law.loss(N, D), rtol=1e-5)


def test_fit_is_fast_on_240_points():
    N, D, loss = sample(*LLM_SCALE, n=240, noise=0.02)
    fit_parametric(N, D, loss)
    start = time.process_time()
    fit_parametric(N, D, loss)
    assert time.process_time() - start < 1


def test_no_point_is_dropped_silently():
    N, D, loss = sample(*LLM_SCALE, noise=0.01)
    assert fit_parametric(N, D, loss).runs.shape == (3, 60)
    worse = loss.copy()
    worse[7] *= 3
    extra = fit_parametric(N, D, worse).objective - fit_parametric(N, D, loss).objective
    assert extra == pytest.approx(1e-3 * np.log(3), rel=0.05)  # one outlier costs δ·|r|


def test_bootstrap_covers_the_truth_and_is_reproducible():
    law, sizes, tokens = LLM_SCALE
    fit = fit_parametric(*sample(law, sizes, tokens, n=120, noise=0.01, seed=5))
    boot = fit.bootstrap(200, seed=1)
    for name in ("E", "alpha", "beta", "a"):
        low, high = boot.interval(name, 0.98)
        assert low < getattr(law, name) < high
    low, high = boot.tokens_per_parameter(1e23, 0.98)
    assert low < law.tokens_per_parameter(1e23) < high
    assert boot.interval("alpha", 0.5)[1] < boot.interval("alpha", 0.9)[1]
    again = fit.bootstrap(200, seed=1)
    np.testing.assert_array_equal(again.samples("E"), boot.samples("E"))
    draws = zip(*map(boot.samples, ("E", "A", "B", "alpha", "beta")), strict=True)
    sizes = [ParametricLaw(*draw).optimal(1e23)[0] for draw in draws]
    wanted = tuple(np.quantile(sizes, [0.1, 0.9]))
    assert boot.interval(lambda one: one.optimal(1e23)[0]) == pytest.approx(wanted)


def test_each_resample_is_a_fit_of_its_own():
    N, D, loss = sample(*LLM_SCALE, n=40, noise=0.01, seed=2)
    boot = fit_parametric(N, D, loss).bootstrap(5, seed=3)
    counts = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=5)
    for row, objective in zip(counts, boot.samples("objective"), strict=True):
        drawn = np.repeat(np.arange(40), row)
        assert fit_parametric(N[drawn], D[drawn], loss[drawn]).objective == pytest.approx(objective, rel=1e-6)


GOOD = sample(*LLM_SCALE, n=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda N, D, loss: (np.where(N[2] == N, 0, N), D, loss), r"N\[2\] = 0.0 .* finite and positive"),
        (lambda N, D, loss: (N, -D, loss), r"D\[0\] = -.*12 bad of 12"),
        (lambda N, D, loss: (N, D, np.where(N[4] == N, np.nan, loss)), r"loss\[4\] = nan .*leave out the runs"),
        (lambda N, D, loss: (N, D, np.where(N[4] == N, np.inf, loss)), r"loss\[4\] = inf"),
        (lambda N, D, loss: (N[:5], D[:5], loss[:5]), r"5 runs can't determine 5 constants: give at least 6"),
        (lambda N, D, loss: (N, D, loss[:-1]), r"'N': 12, 'D': 12, 'loss': 11"),
        (lambda N, D, loss: (N, 20 * N, loss), r"one line .* add runs of other D/N"),
        (lambda N, D, loss: (N, 20 * N * np.linspace(1, 1.0001, 12), loss), r"one line .* add runs of other D/N"),
        (lambda N, D, loss: (0 * N + 1e9, D, loss), r"one line"),
        (lambda N, D, loss: ([], [], []), r"0 runs"),
    ],
)
def test_bad_runs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fit_parametric(*change(*GOOD))


# ------------------------------------------------------------------------------------------------ the law


@settings(max_examples=40, deadline=None)
@given(
    C=st.floats(1e15, 1e27), name=st.sampled_from(["hoffmann-rounded", "hoffmann-tex", "epoch", "refit", "muennighoff"])
)
def test_the_optimum_spends_the_budget_and_nothing_beats_it(C, name):
    law = LAWS[name]
    N, D = law.optimal(C)
    assert pytest.approx(C, rel=1e-12) == 6 * N * D
    near = N * np.geomspace(0.5, 2, 101)
    assert law.loss(N, D) <= law.loss(near, C / (6 * near)).min() * (1 + 1e-15)
    assert law.compute_for(law.loss(N, D)) == pytest.approx(C, rel=1e-8)
    assert law.wasted(N, D) == pytest.approx(0, abs=1e-8)
    assert law.matching_parameters(D) == pytest.approx(N, rel=1e-10)
    assert law.tokens_for(N, law.loss(N, D)) == pytest.approx(D, rel=1e-8)


def test_what_the_constants_say_at_chinchillas_budget():
    """93, 59 and 18 tokens per parameter: arXiv 2404.10102's point about rounding."""
    ratios = [LAWS[name].tokens_per_parameter(5.76e23) for name in ("hoffmann-rounded", "hoffmann-tex", "epoch")]
    assert [round(r) for r in ratios] == [93, 59, 18]
    assert LAWS["hoffmann-rounded"].optimal(5.76e23)[0] == pytest.approx(32e9, rel=0.01)
    assert [round(LAWS[n].a, 2) for n in ("hoffmann-tex", "epoch", "muennighoff")] == [0.46, 0.51, 0.50]


def test_the_rule_of_twenty_at_7b():
    N, D = EPOCH.optimal(5.88e21)
    assert pytest.approx(6.9e9, rel=0.01) == N
    assert pytest.approx(142e9, rel=0.01) == D


def test_a_loss_below_the_floor_is_refused():
    with pytest.raises(ValueError, match="not above the irreducible loss"):
        TEX.compute_for(1.5)
    assert TEX.tokens_for(1e6, 2.0) == np.inf


def test_kaplan():
    kaplan = LAWS["kaplan"]
    assert scaling.kaplan(N=8.8e13) == scaling.kaplan(D=5.4e13) == 1
    assert scaling.kaplan(C=3.1e8 * scaling.PF_DAY) == pytest.approx(1)
    assert kaplan.loss(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    N, D = kaplan.joint_optimal(1e21)
    near = N * np.geomspace(0.8, 1.25, 9)
    assert kaplan.loss(N, D) <= kaplan.loss(near, 1e21 / (6 * near)).min() + 1e-14
    assert kaplan.optimal(scaling.PF_DAY) == (1.3e9, 2e10)
    with pytest.raises(ValueError, match="C alone"):
        scaling.kaplan(N=1e9, C=1e20)
    with pytest.raises(ValueError, match="needs N"):
        scaling.kaplan()


# ------------------------------------------------------------------------------------------------ other approaches


HOFFMANN_TABLE_3 = [
    (400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12),
    (175e9, 3.85e24, 3.7e12), (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12), (1e12, 1.27e26, 21.2e12),
    (10e12, 1.30e28, 216.2e12),
]  # fmt: skip


def test_approach_1s_published_table_is_a_power_law_of_exponent_one_half():
    N, C, D = np.array(HOFFMANN_TABLE_3).T
    assert scaling.fit_power_law(C, N).exponent == pytest.approx(0.50, abs=0.005)
    np.testing.assert_allclose(6 * N * D, C, rtol=0.06)
    assert 19.9 < (D / N).min() < (D / N).max() < 22.5


def curves(law, sizes, steps=60):
    N = np.repeat(sizes, steps)
    D = (sizes[:, None] * np.geomspace(1, 400, steps)).ravel()
    return N, D, law.loss(N, D)


def test_approaches_1_and_2_find_the_exponent_of_a_synthetic_law():
    sizes = np.geomspace(3e7, 1e10, 40)
    assert scaling.approach1(*curves(TEX, sizes), bins=60).a == pytest.approx(TEX.a, abs=0.03)
    C = np.repeat(np.geomspace(1e19, 1e22, 7), 9)
    N = TEX.optimal(C)[0] * np.tile(np.geomspace(0.5, 2, 9), 7)
    found = scaling.approach2(N, C / (6 * N), TEX.loss(N, C / (6 * N)))
    assert found.a == pytest.approx(TEX.a, abs=1e-3)
    assert 6 * np.prod(found.optimal(1e21)) == pytest.approx(1e21, rel=1e-9)


def test_approach_2_needs_minima():
    N, D, loss = GOOD
    with pytest.raises(ValueError, match="2 budgets with 3 or more sizes"):
        scaling.approach2(N, D, loss)


def test_a_parabola_is_biased_by_unequal_exponents_and_by_where_one_looks():
    even = ParametricLaw(1.8, 500.0, 500.0, 0.35, 0.35)
    assert scaling.parabola_bias(even, 1e21, width=10) == pytest.approx(0, abs=1e-9)
    wide, narrow = (scaling.parabola_bias(TEX, 1e21, width=w) for w in (10, 2))
    assert wide > narrow > 0
    assert abs(scaling.parabola_bias(even, 1e21, width=10, shift=3)) > 0.02


def test_counting_without_embeddings_turns_half_into_three_quarters():
    """Pearce & Song, arXiv 2406.12907: a law with a ≈ .5 looks like one with .74 to .78 at Kaplan's sizes."""
    assert scaling.kaplan_exponent(TEX) == pytest.approx(0.75, abs=0.01)
    assert scaling.kaplan_exponent(EPOCH) == pytest.approx(0.78, abs=0.01)
    assert scaling.kaplan_exponent(EPOCH, 1e12, 1e14) == pytest.approx(EPOCH.a, abs=0.01)
    assert scaling.kaplan_exponent(EPOCH, omega=0.0) == pytest.approx(EPOCH.a, abs=1e-9)
    N = 1e6
    C = scaling.kaplan_budget(EPOCH, N)
    near = N * np.geomspace(1 / 1.1, 1.1, 21)
    assert np.argmin(EPOCH.loss(scaling.total_parameters(near), C / (6 * near))) == 10


# ------------------------------------------------------------------------------------------------ data, serving


def test_what_repeated_data_is_worth():
    """4 epochs 3.73 U, 16 epochs 10.6 U, without end 16.4 U: arXiv 2305.16264's constants."""
    worth = [scaling.effective_amount(epochs, 1.0, scaling.REACH_DATA) for epochs in (0.5, 1, 4, 16, 1e9)]
    assert [round(float(w), 2) for w in worth] == [0.5, 1.0, 3.73, 10.58, 16.39]
    assert scaling.effective_amount(2e9, 1e9, 1e12) == pytest.approx(2e9)


def test_with_enough_data_the_constraint_is_not_felt():
    law = LAWS["muennighoff"]
    N, D = law.optimal(1e20)
    assert scaling.data_constrained(N, D, 10 * D) == pytest.approx(law.loss(N, D), rel=1e-12)
    assert scaling.data_constrained_optimal(1e20, 10 * D) == pytest.approx((N, D), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    C=st.floats(1e18, 1e25), unique=st.floats(1e8, 1e12), name=st.sampled_from(["muennighoff", "epoch", "hoffmann-tex"])
)
def test_the_data_constrained_optimum_is_one(C, unique, name):
    law = LAWS[name]
    N, D = scaling.data_constrained_optimal(C, unique, law)
    near = N * np.geomspace(1e-2, 1e2, 4001)
    assert (
        scaling.data_constrained(N, D, unique, law)
        <= scaling.data_constrained(near, C / (6 * near), unique, law).min() + 1e-12
    )


def test_serving_1e11_tokens_wants_a_smaller_model():
    """arXiv 2401.00448 with the TeX constants: 7B's loss and 1e11 tokens served → 6.06B on 1.16 times the data."""
    D = TEX.tokens_for(7e9, TEX.best_loss(6 * 7e9 * (7e9 / TEX.G) ** (TEX.alpha / TEX.beta) / TEX.G))
    loss = TEX.loss(7e9, D)
    N, more = scaling.inference_aware(TEX, loss, 1e11)
    assert pytest.approx(6.06e9, rel=2e-3) == N
    assert more / D == pytest.approx(1.16, abs=0.01)
    assert scaling.inference_aware(TEX, loss, 0) == pytest.approx((7e9, D), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(C=st.floats(1e18, 1e25), served=st.floats(1e6, 1e15))
def test_the_inference_aware_optimum_is_one(C, served):
    loss = EPOCH.best_loss(C)
    N, D = scaling.inference_aware(EPOCH, loss, served)
    assert EPOCH.loss(N, D) == pytest.approx(loss, rel=1e-9)
    near = N * np.geomspace(0.2, 5, 2001)
    others = scaling.lifetime_flops(near, EPOCH.tokens_for(near, loss), served)
    assert scaling.lifetime_flops(N, D, served) <= np.nanmin(others) * (1 + 1e-9)


def test_inference_aware_refuses_the_impossible():
    with pytest.raises(ValueError, match="irreducible"):
        scaling.inference_aware(TEX, 1.6, 0)
    with pytest.raises(ValueError, match="≥ 0"):
        scaling.inference_aware(TEX, 2.5, -1)


@pytest.mark.parametrize(("experts", "N", "D"), [(1, 5.70e9, 29.2e9), (8, 3.76e9, 44.3e9), (32, 2.85e9, 58.4e9)])
def test_moe_optima_at_1e21_flops(experts, N, D):
    """arXiv 2502.05172, table 1."""
    assert scaling.moe(experts).optimal(1e21) == (pytest.approx(N, rel=2e-3), pytest.approx(D, rel=2e-3))


def test_moe_between_the_tables_rows():
    """Dropping a row and interpolating it back changes its constants by less than the table's rounding shows."""
    losses = [scaling.moe(e).loss(2e9, 5e10) for e in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)]
    assert np.all(np.diff(losses) < 0)
    knots = np.log(scaling.effective_experts(np.array([4, 8, 16])))
    m = np.log([24.8462, 21.8330, 19.0159])
    assert np.interp(knots[1], knots[[0, 2]], m[[0, 2]]) == pytest.approx(m[1], abs=2e-3)
    with pytest.raises(ValueError, match="1 to 32"):
        scaling.moe(64)


def test_moe_under_a_memory_cap():
    free, capped = scaling.moe_optimal(1e21, 8), scaling.moe_optimal(1e21, 8, memory=5e9)
    assert scaling.moe_total_parameters(capped[0], 8) == pytest.approx(5e9)
    assert capped[2] > free[2]
    assert scaling.moe_optimal(1e21, 8, memory=1e13) == pytest.approx(free)


def test_overtraining_is_the_same_law_and_gives_parallel_lines():
    law = LAWS["muennighoff"]
    over = scaling.overtraining(law)
    for C, M in ((1e20, 5.0), (1e23, 640.0)):
        N = (C / (6 * M)) ** 0.5
        assert over.loss(C, M) == pytest.approx(law.loss(N, M * N), rel=1e-12)
    slopes = [np.log((over.loss(1e20, M) - over.E) / (over.loss(1e22, M) - over.E)) / np.log(100) for M in (5, 20, 640)]
    assert slopes == pytest.approx([over.eta] * 3)
    assert over.best_multiplier == pytest.approx(law.tokens_per_parameter(1e22))
    with pytest.raises(ValueError, match="α = β"):
        scaling.overtraining(TEX)


def test_precision():
    full, four = scaling.precision(1e9), scaling.precision(1e9, weights=4)
    assert 0.99e9 < full < 1e9
    assert four / full == pytest.approx((1 - np.exp(-4 / 2.6745)) / (1 - np.exp(-16 / 2.6745)))
    assert scaling.precision(
        1e9, weights=1.0, reach={"weights": 1.0, "activations": 1e-3, "kv": 1e-3}
    ) == pytest.approx(1e9 * (1 - np.exp(-1)))


def test_learning_rate_and_batch():
    lr, batch = scaling.learning_rate_and_batch(1e9, 1e11)
    assert lr == pytest.approx(1.79 * 10 ** (-9 * 0.713 + 11 * 0.307))
    assert batch == pytest.approx(0.58 * 10 ** (11 * 0.571))
    lr, batch = scaling.learning_rate_and_batch(7e9, 2e12, "deepseek")
    assert lr == pytest.approx(4.2e-4, rel=0.05)  # DeepSeek LLM 7B was trained at 4.2e-4, arXiv 2401.02954 table 2
    assert batch == pytest.approx(2304 * 4096, rel=0.15)  # and with 2304 sequences of 4096
    with pytest.raises(ValueError, match="'steplaw' or 'deepseek'"):
        scaling.learning_rate_and_batch(1e9, 1e11, "karpathy")


# ------------------------------------------------------------------------------------------------ FLOPs and money


CHINCHILLA_A4 = [
    ((10, 640, 2560, 10, 64), 73e6, 1.03), ((20, 1024, 4096, 16, 64), 305e6, 1.10),
    ((24, 1280, 5120, 10, 128), 552e6, 1.08), ((26, 1792, 7168, 14, 128), 1.1e9, 1.04),
    ((28, 2048, 8192, 16, 128), 1.6e9, 1.03), ((40, 3584, 14336, 28, 128), 6.8e9, 0.99),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "parameters", "ratio"), CHINCHILLA_A4)
def test_chinchillas_flops_table(sizes, parameters, ratio):
    """arXiv 2203.15556, table A4: exact FLOPs over 6ND, to both printed digits."""
    shape = TransformerShape(*sizes, attention_matrices=5)
    assert shape.parameters == pytest.approx(parameters, rel=0.04)
    exact = scaling.training_flops(shape, 1.0, "chinchilla") / (6 * shape.parameters)
    assert round(exact, 2) == ratio
    ends = scaling.training_flops(shape, 1.0, "chinchilla-full") - scaling.training_flops(shape, 1.0, "chinchilla")
    assert ends == 12 * shape.vocab_size * shape.d_model


def test_palms_formula_for_gpt3():
    """arXiv 2204.02311, appendix B: 6N + 12·L·H·Q·T."""
    gpt3 = TransformerShape(96, 12288, 49152, 96, 128, 50257, 2048)
    assert gpt3.parameters == pytest.approx(175e9, rel=0.005)
    extra = scaling.training_flops(gpt3, 1.0, "palm") - 6 * gpt3.parameters
    assert extra == 12 * 96 * 96 * 128 * 2048
    assert scaling.training_flops(gpt3, 1.0, "causal") - 6 * gpt3.parameters == extra / 2
    assert scaling.training_flops(175e9, 300e9) == pytest.approx(3.15e23)
    with pytest.raises(ValueError, match="choose one of 6ND"):
        scaling.training_flops(gpt3, 1.0, "exact")


@pytest.mark.parametrize(
    ("N", "D", "hours", "chip", "mfu"),
    [
        (70e9, 2e12, 1_720_320, "A100", 0.435),
        (405e9, 15.6e12, 30.84e6, "H100", 0.345),
        (37e9, 14.8e12, 2.664e6, "H800", 0.346),
    ],
)
def test_reported_hours_give_plausible_utilisation(N, D, hours, chip, mfu):
    found = scaling.model_flops_utilisation(6 * N * D, hours, chip)
    assert found == pytest.approx(mfu, abs=6e-4)
    assert scaling.training_cost(6 * N * D, chip, 1000, found).chip_hours == pytest.approx(hours)


def test_training_cost():
    cost = scaling.training_cost(8.4e23, "A100", count=2048, mfu=0.5, price_per_hour=1.5, overhead=1.1)
    hours = 8.4e23 / (312e12 * 0.5 * 3600)
    assert cost == pytest.approx((hours / 2048 / 24, hours, 1.5 * hours, 0.44 * hours))
    with pytest.raises(ValueError, match="choose one of V100"):
        scaling.training_cost(1e20, "A1000")
    with pytest.raises(ValueError, match=r"mfu = 40 must lie in \(0, 1\]"):
        scaling.training_cost(1e20, mfu=40)


def test_published_models():
    models = scaling.published_models()
    assert len(models) == 41
    assert len({m.name for m in models}) == 41
    assert all(0 < m.N_active <= m.N and m.D > 0 and m.source for m in models)


def test_import_needs_no_torch():
    code = "import sys, llmlib.scaling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ the experiment


def recorded_runs():
    from llmlib.notebook import recorded

    return [run for run in recorded("scaling").values() if isinstance(run, dict) and "loss" in run]


def test_every_recorded_run_spent_its_budget_on_the_model_it_names():
    from llmlib import cost

    runs = recorded_runs()
    assert sum(run["lr_factor"] == 1 for run in runs) >= 24
    for run in runs:
        config = scaling.byte_model(run["d_model"], run["num_layers"])
        parts = cost.parameters(config)
        assert run["N"] == parts.total - parts.embedding
        assert run["C"] == pytest.approx(run["budget"], rel=0.005)
        assert run["C"] == (6 * run["N"] + 6 * run["num_layers"] * 64 * run["d_model"]) * run["D"]


def test_the_experiments_count_of_flops_is_the_one_on_the_module():
    """6N + 6·L·T·d against the products counted on the model; norms are all the difference."""
    from llmlib import cost

    config = scaling.byte_model(32, 2).replace(max_seq_len=64)
    N = cost.parameters(config).total - cost.parameters(config).embedding
    assert scaling.training_flops(config, 1.0) == pytest.approx(6 * N + 6 * 2 * 64 * 32, rel=0.01)


def test_every_recorded_budget_has_its_best_size_inside():
    runs = [run for run in recorded_runs() if run["lr_factor"] == 1 and run["seed"] == 0]
    best = []
    for budget in sorted({run["budget"] for run in runs}):
        row = sorted((run["N"], run["loss"]) for run in runs if run["budget"] == budget)
        lowest = min(row, key=lambda pair: pair[1])
        assert row[0] != lowest != row[-1]
        best.append(lowest)
    assert np.all(np.diff([n for n, _ in best]) > 0) and np.all(np.diff([loss for _, loss in best]) < 0)


def test_a_run_of_the_experiment():
    run = scaling.byte_run(6, 1, 2e8)
    assert run["C"] == pytest.approx(2e8, rel=0.05)
    assert 2 < run["loss"] < np.log(256)
