"""Exercises of chapter 09."""

import math

import numpy as np

from llmlib.notebook.exercises import wrong
from llmlib.scaling import LAWS, ParametricLaw, fit_parametric, inference_aware, lifetime_flops, parabola_vertex

_LAW = ParametricLaw(1.7, 300.0, 900.0, 0.31, 0.4)


def _number(value, what: str) -> float:
    if value is None:
        wrong(f"{what} is None: is the `return` missing?")
    return float(value)


def huber(objective) -> None:
    """objective(residuals, delta) → the sum of Huber losses."""
    small, large = np.array([2e-4, -5e-4]), np.array([0.02, -0.5])
    got = _number(objective(small, 1e-3), "the objective")
    if not math.isclose(got, (small**2).sum() / 2, rel_tol=1e-9):
        wrong("for residuals within ±δ it should be the sum of r²/2")
    got = _number(objective(large, 1e-3), "the objective")
    if math.isclose(got, 1e-3 * (0.52 - 1e-3) / 2, rel_tol=1e-6):
        wrong("this is the mean; the objective is a sum over the runs")
    if not math.isclose(got, 1e-3 * (0.52 - 1e-3), rel_tol=1e-9):
        wrong("beyond ±δ it should grow in a straight line, join the parabola at δ, and treat both signs alike")


def optimal(allocate) -> None:
    """allocate(C, E, A, B, alpha, beta) → N and D of least loss."""
    constants = (_LAW.E, _LAW.A, _LAW.B, _LAW.alpha, _LAW.beta)
    for C in (1e18, 3e22):
        N, D = allocate(C, *constants)
        if not math.isclose(6 * N * D, C, rel_tol=1e-6):
            wrong(f"at C = {C:g} it spends 6ND = {6 * N * D:.3g} FLOPs, not the budget")
        best = _LAW.best_loss(C)
        if _LAW.loss(N, D) > best * (1 + 1e-9):
            wrong(f"at C = {C:g} its loss is {_LAW.loss(N, D):.4f}, and {best:.4f} can be had for the same budget")


def vertex(find) -> None:
    """find(N, loss) → the N at the bottom of a parabola in log N."""
    N = np.geomspace(1e6, 1e8, 7)
    loss = _LAW.loss(N, 1e17 / (6 * N))
    got, right = _number(find(N, loss), "the vertex"), parabola_vertex(N, loss)[0]
    if math.isclose(got, N[np.argmin(loss)], rel_tol=1e-9):
        wrong("this is the best of the runs; the bottom of the parabola lies between two of them")
    linear = np.polyfit(N, loss, 2)
    if math.isclose(got, -linear[1] / (2 * linear[0]), rel_tol=1e-3):
        wrong("this parabola is in N; use one in log N, where the sizes are evenly spaced")
    if not math.isclose(got, right, rel_tol=1e-6):
        wrong(f"for the runs N = {N[0]:.0e} … {N[-1]:.0e} it gives {got:.4g}, {got / right:.3f} times the right value")


def epochs(worth) -> None:
    """worth(tokens, unique, reach) → tokens of fresh data that repeated data are worth."""
    if not math.isclose(_number(worth(5e8, 1e9, 15.4), "the worth"), 5e8, rel_tol=1e-9):
        wrong("half an epoch is all fresh: 5e8 of 1e9 tokens are worth 5e8")
    if not math.isclose(worth(1e9, 1e9, 15.4), 1e9, rel_tol=1e-9):
        wrong("one epoch has no repetitions: 1e9 of 1e9 tokens are worth 1e9")
    for n in (2, 16, 1000):
        right = 1e9 * (1 + 15.4 * (1 - math.exp(-(n - 1) / 15.4)))
        if not math.isclose(worth(n * 1e9, 1e9, 15.4), right, rel_tol=1e-9):
            wrong(f"{n} epochs are {n - 1} repetitions; check what decays, and from where it is counted")


def flops(count) -> None:
    """count(num_layers, d_model, d_ff, num_heads, num_kv_heads, head_dim, vocab_size, context) → FLOPs per token."""
    sizes = (32, 4096, 14336, 32, 8, 128, 128256, 8192)
    layers, d, f, h, g, q, v, T = sizes
    block = layers * (d * h * q * 2 + d * g * q * 2 + 3 * d * f)
    scores = 6 * layers * h * q * T
    got = _number(count(*sizes), "the count")
    right = 6 * (block + v * d) + scores
    causes = {
        6 * (block + v * d): "the products of queries with keys and of weights with values are missing",
        right + scores: "the scores above the diagonal are masked: half of the products need not be counted",
        right - 6 * v * d: "the head's product is missing: d_model × vocab_size for each token",
        right + 6 * v * d: "looking up an embedding is no matrix product: count the head only",
        right / 3: "this is the forward pass alone; the backward pass costs twice as much",
        right + 6 * layers * 2 * d * (h - g) * q: "keys and values have num_kv_heads heads, not num_heads",
        right - 6 * layers * d * f: "a SwiGLU has three matrices, not two",
    }  # fmt: skip
    for value, cause in causes.items():
        if math.isclose(got, value, rel_tol=1e-6):
            wrong(cause)
    if not math.isclose(got, right, rel_tol=1e-6):
        wrong(f"for Llama-3-8B at 8,192 tokens it gives {got:.4g}, {got / right:.3f} times the right count")


def compute_for(budget) -> None:
    """budget(loss, law) → the least FLOPs that reach this loss."""
    for law in (_LAW, LAWS["epoch"]):
        for loss in (law.E + 0.1, law.E + 1):
            got, right = _number(budget(loss, law), "the budget"), law.compute_for(loss)
            if not math.isclose(got, right, rel_tol=1e-3):
                wrong(f"to reach {loss:.2f} it spends {got:.3g} FLOPs, {got / right:.3f} times the least")


def serving(size) -> None:
    """size(law, loss, served) → the N that reaches the loss with the least FLOPs for training and serving."""
    law = LAWS["epoch"]
    loss = law.best_loss(1e22)
    for served in (0, 1e11, 1e13):
        N, (best_N, best_D) = _number(size(law, loss, served), "N"), inference_aware(law, loss, served)
        D = law.tokens_for(N, loss)
        if not math.isfinite(D):
            wrong(f"with {served:g} tokens served its model of {N:.3g} parameters can't reach the loss on any data")
        extra = lifetime_flops(N, D, served) / lifetime_flops(best_N, best_D, served) - 1
        if extra > 1e-4:
            wrong(f"with {served:g} tokens served its lifetime costs {extra:.1%} more than it has to")


def design(runs) -> None:
    """runs: (N, D) pairs, at most 30 and 3e20 FLOPs in all, that whose α has an 80 % interval of .03 at most."""
    N, D = np.array(list(runs), float).T
    if len(N) > 30:
        wrong(f"there are {len(N)} runs; at most 30 are allowed")
    if 6 * (N * D).sum() > 3e20 * (1 + 1e-9):
        wrong(f"the runs cost {6 * (N * D).sum():.3g} FLOPs; the budget is 3e20")
    law, rng = LAWS["epoch"], np.random.default_rng(0)
    widths = []
    for _ in range(4):
        fit = fit_parametric(N, D, law.loss(N, D) * np.exp(0.005 * rng.standard_normal(len(N))))
        low, high = fit.bootstrap(60, seed=1).interval("alpha", 0.8)
        widths.append(high - low)
    if np.mean(widths) > 0.03:
        wrong(f"the 80 % interval of α is {np.mean(widths):.3f} wide on average; spread sizes and D/N further apart")


def _never(*_args) -> None:
    return None


WRONG = {
    "huber": [
        _never,
        lambda r, d: np.mean(np.where(abs(r) <= d, r**2 / 2, d * (abs(r) - d / 2))),
        lambda r, d: np.sum(r**2) / 2,
    ],
    "optimal": [
        lambda C, E, A, B, a, b: ((C / 6) ** 0.5, (C / 6) ** 0.5),
        lambda C, E, A, B, a, b: ((C / 120) ** 0.5, C),
    ],
    "vertex": [
        _never,
        lambda N, loss: N[np.argmin(loss)],
        lambda N, loss: -np.divide(*np.polyfit(N, loss, 2)[1::-1]) / 2,
    ],
    "epochs": [_never, lambda D, U, R: D, lambda D, U, R: U * (1 + R * (1 - math.exp(-D / U / R)))],
    "flops": [
        _never,
        lambda L, d, f, h, g, q, v, T: 6 * (L * (2 * d * h * q + 2 * d * g * q + 3 * d * f) + v * d),
        lambda L, d, f, h, g, q, v, T: 6 * L * (4 * d * h * q + 3 * d * f) + 6 * v * d + 6 * L * h * q * T,
    ],
    "compute_for": [_never, lambda loss, law: law.compute_for(loss) * 1.1],
    "serving": [_never, lambda law, loss, served: law.optimal(1e22)[0], lambda law, loss, served: 1.0],
    "design": [
        [(n, 20 * n) for n in np.geomspace(3e7, 3e8, 12)],
        [(1e9, 1e10)] * 31,
        [(1e10, 1e12)] * 6,
        [(n, C / 6 / n) for C in np.geomspace(1e17, 3.2e19, 6) for n in (C / 120) ** 0.5 * np.geomspace(1 / 3, 3, 5)],
    ],
}
