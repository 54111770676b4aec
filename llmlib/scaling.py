"""Scaling laws: how a language model's loss depends on its size, its data and the compute it is given.

Numpy only. Throughout: N parameters, D training tokens, L loss in nats per token, C = 6ND training FLOPs.
Every function takes numbers or arrays and broadcasts. Provenance of each constant stands beside it:
"printed" was read in the paper or its data, "secondary" in other papers that quote it, "computed" is worked out here.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

PF_DAY = 8.64e19
"""FLOPs in one petaFLOP/s-day, Kaplan's unit of compute."""


# ------------------------------------------------------------------------------------------------ the law


@dataclass(frozen=True)
class ParametricLaw:
    r"""L(N, D) = E + A/N^α + B/D^β (Hoffmann et al., arXiv 2203.15556, eq. 10).

    E is the loss that no model can go below, A/N^α the price of a finite model, B/D^β the price of finite data.
    The constants may be arrays of one shape: the methods then work on all the laws at once.
    """

    E: float | np.ndarray
    A: float | np.ndarray
    B: float | np.ndarray
    alpha: float | np.ndarray
    beta: float | np.ndarray
    name: str = ""
    source: str = ""
    note: str = ""

    def loss(self, N, D):
        """L(N, D) in nats per token."""
        N, D = _positive("N", N), _positive("D", D)
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def a(self):
        """The exponent of N_opt ∝ C^a: a = β/(α+β)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self):
        """The exponent of D_opt ∝ C^b: b = α/(α+β) = 1 − a."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self):
        """G = (αA/βB)^(1/(α+β)), the constant of the optimum."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def optimal(self, C):
        """(N_opt, D_opt) = (G·(C/6)^a, (C/6)^b / G): the least loss that C = 6ND FLOPs can buy."""
        C = _positive("C", C)
        return self.G * (C / 6) ** self.a, (C / 6) ** self.b / self.G

    def tokens_per_parameter(self, C):
        """D_opt/N_opt at the budget C."""
        N, D = self.optimal(C)
        return D / N

    def best_loss(self, C):
        """The loss at the optimum of the budget C."""
        return self.loss(*self.optimal(C))

    def compute_for(self, loss):
        """The least FLOPs that reach this loss: C = 6·(K/(L−E))^((α+β)/αβ), K = A·G^−α + B·G^β."""
        loss = _positive("loss", loss)
        if np.any(loss <= self.E):
            raise ValueError(f"loss {loss} is not above the irreducible loss E = {self.E}: no budget reaches it")
        K = self.A * self.G**-self.alpha + self.B * self.G**self.beta
        return 6 * (K / (loss - self.E)) ** ((self.alpha + self.beta) / (self.alpha * self.beta))

    def wasted(self, N, D):
        """The share of 6ND that a compute-optimal run of equal loss would have saved, in 0…1."""
        return 1 - self.compute_for(self.loss(N, D)) / (6 * np.asarray(N, float) * D)

    def tokens_for(self, N, loss):
        """The tokens that bring a model of N parameters to this loss: D = (B/(L − E − A/N^α))^(1/β); inf if none do."""
        room = np.asarray(loss - self.E - self.A * _positive("N", N) ** -self.alpha, float)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(room > 0, (self.B / room) ** (1 / self.beta), np.inf)[()]

    def matching_parameters(self, D):
        """The N for which D tokens are compute-optimal: N = G·(G·D)^(β/α)."""
        return self.G * (self.G * _positive("D", D)) ** (self.beta / self.alpha)


@dataclass(frozen=True)
class KaplanLaw:
    r"""Kaplan et al. (arXiv 2001.08361), N counted without embeddings, L in nats.

    loss: L(N, D) = ((N_c/N)^(α_N/α_D) + D_c/D)^α_D (eq. 1.5). optimal: N = 1.3e9·c^.73, D = 2e10·c^.27, c in PF-days
    (table 6, from the fit in steps, L(N, S_min)). Their product is not C/6: c is C_min, the compute at a small batch.
    """

    alpha_N: float = 0.076
    alpha_D: float = 0.103
    N_c: float = 6.4e13
    D_c: float = 1.8e13
    name: str = "kaplan"
    source: str = "Kaplan et al. (2020), arXiv 2001.08361, eq. 1.5 and table 6 (secondary)"
    note: str = "N without embeddings; an optimum that later work did not confirm"
    a: float = 0.73
    b: float = 0.27

    def loss(self, N, D):
        """L(N, D) in nats per token."""
        N, D = _positive("N", N), _positive("D", D)
        return ((self.N_c / N) ** (self.alpha_N / self.alpha_D) + self.D_c / D) ** self.alpha_D

    def optimal(self, C):
        """(N_opt, D_opt) as published: 1.3e9·c^.73 parameters and 2e10·c^.27 tokens, c = C/8.64e19 PF-days."""
        c = _positive("C", C) / PF_DAY
        return 1.3e9 * c**self.a, 2e10 * c**self.b

    def joint_optimal(self, C):
        """(N, D) that minimise this law's own L(N, D) on C = 6ND: N = (r·N_c^r·C/(6·D_c))^(1/(1+r)), r = α_N/α_D."""
        r, C = self.alpha_N / self.alpha_D, _positive("C", C)
        N = (r * self.N_c**r * C / (6 * self.D_c)) ** (1 / (1 + r))
        return N, C / (6 * N)

    def tokens_per_parameter(self, C):
        """D_opt/N_opt at the budget C."""
        N, D = self.optimal(C)
        return D / N


def kaplan(*, N=None, D=None, C=None):
    """Kaplan's laws in nats (arXiv 2001.08361, eqs. 1.1–1.5, secondary; N without embeddings).

    L(N) = (8.8e13/N)^.076, L(D) = (5.4e13/D)^.095, L(C) = (3.1e8/c)^.050 with c in PF-days; N and D: the joint law."""
    if C is not None:
        if N is not None or D is not None:
            raise ValueError("kaplan takes C alone, or N and D: give one or the other")
        return (3.1e8 / (_positive("C", C) / PF_DAY)) ** 0.050
    if N is not None and D is not None:
        return LAWS["kaplan"].loss(N, D)
    if N is not None:
        return (8.8e13 / _positive("N", N)) ** 0.076
    if D is not None:
        return (5.4e13 / _positive("D", D)) ** 0.095
    raise ValueError("kaplan needs N (parameters), D (tokens), both, or C (FLOPs)")


_HOFFMANN = "Hoffmann et al. (2022), arXiv 2203.15556"
LAWS: dict[str, ParametricLaw | KaplanLaw] = {
    law.name: law
    for law in (
        ParametricLaw(
            1.69, 406.4, 410.7, 0.34, 0.28, "hoffmann-rounded", f"{_HOFFMANN}, eq. 10 (secondary)",
            "as printed, to two digits: the rounding alone moves the optimum by more than half",
        ),
        ParametricLaw(
            math.exp(0.5267228), math.exp(6.0073404), math.exp(6.0179186), 0.33917084, 0.2849083, "hoffmann-tex",
            f"{_HOFFMANN}, the constants in the paper's TeX source (printed)", "what eq. 10 was rounded from",
        ),
        ParametricLaw(
            1.81686, 482.00572, 2085.43420, 0.34781, 0.36585, "epoch",
            "Besiroglu et al. (2024), arXiv 2404.10102 (printed), on 240 of Hoffmann's 245 points",
            "the same runs fitted again, to the minimum",
        ),
        ParametricLaw(
            1.8172181, 477.82587, 2143.4174, 0.3473105, 0.36717243, "refit",
            "fit_parametric on the same 240 points: book/recorded/scaling-refit.json (computed)",
            "the exact minimum of the published objective; its 300 resamples give the bands",
        ),
        ParametricLaw(
            1.869, 521.0, 1488.0, 0.3526596, 0.3526596, "muennighoff",
            "Muennighoff et al. (2023), arXiv 2305.16264 (printed)", "α = β by assumption; fitted on C4",
        ),
        KaplanLaw(),
    )
}  # fmt: skip
"""The constants by name, each with its source. `refit` is what pages start from."""


def _positive(name: str, value) -> np.ndarray:
    value = np.asarray(value, float)
    if not np.all(value > 0):
        raise ValueError(f"{name} must be positive, got {value[~(value > 0)].flat[0]}: give a count, not a logarithm")
    return value[()]


# ------------------------------------------------------------------------------------------------ fitting it


@dataclass(frozen=True)
class ParametricFit(ParametricLaw):
    """A law fitted to runs: the constants, the runs, and the sum of Huber losses that was reached."""

    runs: np.ndarray = field(default=None, repr=False)
    delta: float = 1e-3
    objective: float = 0.0

    def bootstrap(self, n: int = 1000, seed: int = 0) -> "Bootstrap":
        """Fit again on n resamples of the runs, drawn with replacement."""
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(self.runs.shape[1], np.full(self.runs.shape[1], 1 / self.runs.shape[1]), size=n)
        return Bootstrap(self, replace(self, **_constants(*_minimise(self.runs, weights.astype(float), self.delta))))

    @property
    def residuals(self) -> np.ndarray:
        """log(observed) − log(fitted), run by run."""
        N, D, loss = self.runs
        return np.log(loss / self.loss(N, D))


@dataclass(frozen=True)
class Bootstrap:
    """n laws, each fitted to a resample: `laws` has arrays of n for constants, so a quantity comes for all at once."""

    fit: ParametricFit
    laws: ParametricLaw

    def samples(self, quantity: str | Callable) -> np.ndarray:
        """n values of a constant ("alpha", "a", "E" …) or of any function of a law."""
        return np.asarray(getattr(self.laws, quantity) if isinstance(quantity, str) else quantity(self.laws))

    def interval(self, quantity: str | Callable, level: float = 0.8) -> tuple[float, float]:
        """The central interval: `interval("alpha")`, `interval(lambda law: law.tokens_per_parameter(1e24), .95)`."""
        low, high = np.quantile(self.samples(quantity), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def tokens_per_parameter(self, C: float, level: float = 0.8) -> tuple[float, float]:
        """The interval of D_opt/N_opt at a budget."""
        return self.interval(lambda law: law.tokens_per_parameter(C), level)


def fit_parametric(N, D, loss, *, delta: float = 1e-3) -> ParametricFit:
    """Fit E, A, B, α, β by minimising Σ Huber_δ(log L_i − log L̂(N_i, D_i)), the objective of arXiv 2203.15556 §3.3.

    For each (α, β) on a grid the other three are linear: weighted least squares finds them. Newton's method goes on
    from the best ones. The sum, not the mean, and a tolerance relative to the objective (~1e-3): see arXiv 2404.10102.
    N and D: parameters and tokens, loss: nats per token, at least 6 runs, in any order and at any scale.
    Raises ValueError for values that aren't positive and finite, lengths that differ, or runs on a single ray.
    """
    runs = _checked_runs(N, D, loss)
    theta, objective, centre = _minimise(runs, np.ones((1, runs.shape[1])), delta)
    constants = {key: float(value[0]) for key, value in _constants(theta, objective, centre).items()}
    return ParametricFit(**constants, name="fit", runs=runs, delta=delta)


def huber_objective(law: ParametricLaw, N, D, loss, *, delta: float = 1e-3, reduce: str = "sum") -> float:
    """Σ (or the mean) of Huber_δ(log L − log L̂): r²/2 within δ, δ(|r| − δ/2) beyond."""
    r = np.abs(np.log(loss) - np.log(law.loss(N, D)))
    h = np.where(r <= delta, r * r / 2, delta * (r - delta / 2))
    return float({"sum": np.sum, "mean": np.mean}[reduce](h))


def _checked_runs(N, D, loss, least: int = 6) -> np.ndarray:
    columns = {"N": np.ravel(N), "D": np.ravel(D), "loss": np.ravel(loss)}
    sizes = {name: column.size for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"N, D and loss must have one entry per run, got {sizes}: pass three lists of one length")
    for name, column in columns.items():
        bad = np.flatnonzero(~(np.isfinite(column.astype(float)) & (column.astype(float) > 0)))
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}] = {column[bad[0]]} ({bad.size} bad of {column.size}): every {name} must be finite "
                "and positive; leave out the runs that diverged or never ran"
            )
    if sizes["N"] < least:
        raise ValueError(f"{sizes['N']} runs can't determine 5 constants: give at least {least}, better 20 or more")
    runs = np.array(list(columns.values()), float)
    spread = np.linalg.svd(np.log(runs[:2]) - np.log(runs[:2]).mean(1, keepdims=True), compute_uv=False)
    if spread[1] < 1e-3 * max(spread[0], 1e-3):
        raise ValueError(
            "all runs lie on one line in (log N, log D), such as one D/N ratio: size and data can't be told apart; "
            "add runs of other D/N at some of the sizes"
        )
    return runs


def _constants(theta: np.ndarray, objective: np.ndarray, centre: tuple[float, float]) -> dict[str, np.ndarray]:
    a, b, e, alpha, beta = theta.T
    x0, y0 = centre
    E, A, B = np.exp(e), np.exp(a + alpha * x0), np.exp(b + beta * y0)
    return {"E": E, "A": A, "B": B, "alpha": alpha, "beta": beta, "objective": objective}


def _minimise(runs, weights, delta):
    """The minimum for each row of weights (k n) → θ = (a, b, e, α, β) (k 5), objective (k), centre of log N and log D.

    a and b are taken at the centre of the data, where they hardly depend on α and β: the problem is then well scaled.
    """
    N, D, loss = runs
    centre = np.log(N).mean(), np.log(D).mean()
    x, y, target = np.log(N) - centre[0], np.log(D) - centre[1], np.log(loss)
    starts = _grid(x, y, loss, weights)
    k, s = starts.shape[:2]
    theta, value = _polish(starts.reshape(-1, 5), x, y, target, np.repeat(weights, s, axis=0), delta)
    best = value.reshape(k, s).argmin(1)
    return theta.reshape(k, s, 5)[np.arange(k), best], value.reshape(k, s)[np.arange(k), best], centre


_EXPONENTS = np.geomspace(0.03, 1.5, 18)
_FLOOR = 1e-9


def _grid(x, y, loss, weights, keep=3):
    """The `keep` best grid points per row of weights: (E, A, B) by least squares for each (α, β), kept positive."""
    alpha, beta = (g.ravel() for g in np.meshgrid(_EXPONENTS, _EXPONENTS))
    basis = np.stack([np.exp(-np.outer(alpha, x)), np.exp(-np.outer(beta, y)), np.ones((alpha.size, x.size))], 1) / loss
    gram = np.einsum("gin,gjn,kn->kgij", basis, basis, weights, optimize=True)
    moment = np.einsum("gin,kn->kgi", basis, weights, optimize=True)
    scale = np.trace(gram, axis1=2, axis2=3)[..., None, None]
    solution = np.linalg.solve(gram + 1e-9 * scale * np.eye(3), moment[..., None])[..., 0]
    solution = np.maximum(solution, 1e-3 * loss.min())
    squares = np.einsum("kgi,kgij,kgj->kg", solution, gram, solution) - 2 * (solution * moment).sum(-1)
    chosen = np.argsort(squares, axis=1)[:, :keep]
    rows = np.arange(len(weights))[:, None]
    return np.concatenate([np.log(solution[rows, chosen]), alpha[chosen][..., None], beta[chosen][..., None]], -1)


def _polish(theta, x, y, target, weights, delta, steps=300, tolerance=1e-13):
    """Damped Newton on the exact Huber objective, all rows at once; a row stops when it can gain no more."""
    theta, value = theta.copy(), _value(theta, x, y, target, weights, delta)
    damping, stalled = np.full(len(theta), 1e-3), np.zeros(len(theta), int)
    for _ in range(steps):
        live = np.flatnonzero(stalled < 8)
        if not live.size:
            break
        step = _newton_step(theta[live], x, y, target, weights[live], delta, damping[live])
        trial = theta[live] + np.clip(step, -1.5, 1.5)
        trial[:, 2] = np.maximum(trial[:, 2], target.min() + math.log(_FLOOR))
        trial[:, 3:] = np.clip(trial[:, 3:], 1e-3, 10)
        new = _value(trial, x, y, target, weights[live], delta)
        gain = value[live] - new
        better = gain > 0
        theta[live[better]], value[live[better]] = trial[better], new[better]
        damping[live] = np.clip(np.where(better, damping[live] / 4, damping[live] * 6), 1e-12, 1e9)
        stalled[live] = np.where(gain > tolerance * value[live], 0, stalled[live] + 1)
    return theta, value


def _shares(theta, x, y):
    """log L̂ (k n), and the three terms' shares of L̂ (3 k n)."""
    a, b, e, alpha, beta = theta.T[:, :, None]
    terms = np.stack([a - alpha * x, b - beta * y, e + 0 * x])
    top = terms.max(0)
    parts = np.exp(terms - top)
    total = parts.sum(0)
    return top + np.log(total), parts / total


def _value(theta, x, y, target, weights, delta):
    r = np.abs(target - _shares(theta, x, y)[0])
    return (weights * np.where(r <= delta, r * r / 2, delta * (r - delta / 2))).sum(1)


def _newton_step(theta, x, y, target, weights, delta, damping):
    """−(H + λ·diag)⁻¹·g. The Hessian of a log-sum-exp is Σ pᵢ gᵢgᵢᵀ − ḡḡᵀ; curvature of the wrong sign is flipped."""
    fitted, (p, q, s) = _shares(theta, x, y)
    r = target - fitted
    pull = weights * np.clip(r, -delta, delta)
    inside = weights * (np.abs(r) <= delta)
    J = np.stack([p, q, s, -p * x, -q * y], -1)
    gradient = -np.einsum("kn,kni->ki", pull, J)
    H = np.einsum("kn,kni,knj->kij", inside + pull, J, J, optimize=True)
    px, qy = p * x, q * y
    for i, j, term in ((0, 0, p), (1, 1, q), (2, 2, s), (0, 3, -px), (3, 3, px * x), (1, 4, -qy), (4, 4, qy * y)):
        second = (pull * term).sum(1)
        H[:, i, j] -= second
        if i != j:
            H[:, j, i] -= second
    gauss = np.einsum("kn,kni,kni->ki", weights * delta / np.maximum(np.abs(r), delta), J, J) + 1e-300
    unit = 1 / np.sqrt(gauss)
    values, vectors = np.linalg.eigh(H * unit[:, :, None] * unit[:, None, :])
    turned = np.einsum("kij,ki->kj", vectors, gradient * unit)
    return -unit * np.einsum("kij,kj->ki", vectors, turned / (np.abs(values) + damping[:, None]))


# ------------------------------------------------------------------------------------------------ approaches 1 and 2


@dataclass(frozen=True)
class PowerLaw:
    """y = factor·C^exponent, fitted on a log scale, with the points it went through."""

    exponent: float
    factor: float
    C: np.ndarray = field(default=None, repr=False)
    y: np.ndarray = field(default=None, repr=False)

    def __call__(self, C):
        return self.factor * _positive("C", C) ** self.exponent


class Allocation(NamedTuple):
    """N_opt(C), D_opt(C) and the best loss per budget, as approach 1 or 2 finds them; `a` is N's exponent."""

    N: PowerLaw
    D: PowerLaw
    loss: np.ndarray

    @property
    def a(self) -> float:
        return self.N.exponent

    def optimal(self, C):
        return self.N(C), self.D(C)


def fit_power_law(C, y) -> PowerLaw:
    """Least squares on log y = log factor + exponent·log C."""
    C, y = _positive("C", C), _positive("y", y)
    if np.unique(C).size < 2:
        raise ValueError(f"a power law needs at least 2 different budgets, got {np.unique(C).size}")
    exponent, intercept = np.polyfit(np.log(C), np.log(y), 1)
    return PowerLaw(float(exponent), float(np.exp(intercept)), C, y)


def approach1(N, D, loss, *, bins: int = 30) -> Allocation:
    """Hoffmann's approach 1: pool the points of many training curves, keep in each of `bins` log-spaced intervals of
    C = 6ND the point of least loss (the envelope), and fit N and D as powers of C. Left out are points that are
    no better than a smaller budget's, and winners of the smallest or largest size, which a still smaller or larger one
    might beat."""
    N, D, loss = _checked_runs(N, D, loss)
    C = 6 * N * D
    edges = np.geomspace(C.min(), C.max() * (1 + 1e-12), bins + 1)
    bin_of = np.clip(np.searchsorted(edges, C, side="right") - 1, 0, bins - 1)
    lowest = [where[np.argmin(loss[where])] for k in range(bins) if (where := np.flatnonzero(bin_of == k)).size]
    better = [i for n, i in enumerate(lowest) if n == 0 or loss[i] < loss[lowest[:n]].min()]
    envelope = [i for i in better if N.min() < N[i] < N.max()]
    return Allocation(fit_power_law(C[envelope], N[envelope]), fit_power_law(C[envelope], D[envelope]), loss[envelope])


def approach2(N, D, loss, *, tolerance: float = 0.1) -> Allocation:
    """Hoffmann's approach 2: group the runs by budget (C = 6ND equal within `tolerance`), fit in each group a parabola
    of the loss in log N, and fit the vertices as powers of C. A group needs 3 sizes, and a parabola open upwards."""
    N, D, loss = _checked_runs(N, D, loss)
    order = np.argsort(N * D)
    N, D, loss = N[order], D[order], loss[order]
    C = 6 * N * D
    groups = np.split(np.arange(C.size), np.flatnonzero(np.diff(np.log(C)) > tolerance) + 1)
    found = []
    for group in groups:
        if np.unique(N[group]).size >= 3:
            n_best, lowest, curvature = parabola_vertex(N[group], loss[group])
            if curvature > 0:
                found.append((np.exp(np.log(C[group]).mean()), n_best, lowest))
    if len(found) < 2:
        raise ValueError(
            f"approach 2 needs 2 budgets with 3 or more sizes around a minimum, found {len(found)} of {len(groups)}: "
            "add smaller and larger models at each budget"
        )
    budget, n_best, lowest = np.array(found).T
    return Allocation(fit_power_law(budget, n_best), fit_power_law(budget, budget / (6 * n_best)), lowest)


def parabola_vertex(N, loss) -> tuple[float, float, float]:
    """(N*, L*, curvature) of the parabola through one isoFLOP curve, least squares in x = log N."""
    x = np.log(_positive("N", N))
    c2, c1, c0 = np.polyfit(x - x.mean(), loss, 2)
    return float(np.exp(x.mean() - c1 / (2 * c2))), float(c0 - c1 * c1 / (4 * c2)), float(c2)


def parabola_bias(law: ParametricLaw, C, *, width: float = 10.0, shift: float = 1.0, points: int = 9):
    """N*/N_opt − 1 when a parabola is fitted to the exact law at `points` sizes from shift·N_opt/width to
    shift·N_opt·width: what approach 2 gets wrong with no noise at all (arXiv 2603.22339)."""
    C = float(C)
    centre = law.optimal(C)[0]
    N = centre * shift * np.geomspace(1 / width, width, points)
    return parabola_vertex(N, law.loss(N, C / (6 * N)))[0] / centre - 1


# ------------------------------------------------------------------------------------------------ Kaplan's bias


def total_parameters(N, omega: float = 47491.0):
    """N_total = N + ω·N^⅓: embeddings added to N others (Pearce & Song, arXiv 2406.12907, printed)."""
    N = _positive("N", N)
    return N + omega * N ** (1 / 3)


def kaplan_budget(law: ParametricLaw, N, omega: float = 47491.0):
    r"""The budget C = 6ND, N without embeddings, at which N is optimal for a law whose N has embeddings.

    Setting dL/dN = 0 at constant C gives C = 6N·(βB·T^(α+1) / (αA·N·T′))^(1/β) with T = N + ωN^⅓, T′ = 1 + ω/3·N^−⅔.
    """
    T, slope = total_parameters(N, omega), 1 + omega / 3 * np.asarray(N, float) ** (-2 / 3)
    ratio = law.beta * law.B * T ** (law.alpha + 1) / (law.alpha * law.A * N * slope)
    return 6 * N * ratio ** (1 / law.beta)


def kaplan_exponent(law: ParametricLaw, N_low=768.0, N_high=1.5e9, omega: float = 47491.0, points: int = 20) -> float:
    """The exponent of N_opt ∝ C^a that one reads off when embeddings are left out of N and of C, over a range of sizes
    (by default Kaplan's, 768 to 1.5e9): a law with a ≈ .5 looks like one with a ≈ .7 (arXiv 2406.12907)."""
    N = np.geomspace(N_low, N_high, points)
    return fit_power_law(kaplan_budget(law, N, omega), N).exponent


# ------------------------------------------------------------------------------------------------ less data than wished


def effective_amount(amount, unique, reach):
    """x′ = U + U·R*·(1 − e^(−R/R*)), R = x/U − 1 repetitions: what x is worth when only U of it is fresh.

    amount ≤ unique is worth itself. reach is R*, in repetitions (arXiv 2305.16264, eqs. 5 and 6)."""
    amount, unique = _positive("amount", amount), _positive("unique", unique)
    repeats = np.maximum(amount / unique - 1, 0)
    return np.minimum(amount, unique) + unique * reach * -np.expm1(-repeats / reach)


REACH_DATA, REACH_PARAMETERS = 15.387756, 5.309743
"""R_D* and R_N*, Muennighoff et al., arXiv 2305.16264 (printed)."""


def data_constrained(N, D, unique, law=None, *, r_data=REACH_DATA, r_parameters=REACH_PARAMETERS):
    """L(N′, D′) when D tokens are D/unique epochs over `unique` tokens (Muennighoff et al., arXiv 2305.16264).

    D′ is the effective data. N′ is the effective size: U_N, the N that the unique data alone deserves, and beyond
    it parameters count less and less. law defaults to the paper's own constants."""
    law = law or LAWS["muennighoff"]
    D_worth = effective_amount(D, unique, r_data)
    N_worth = effective_amount(N, law.matching_parameters(np.minimum(D, unique)), r_parameters)
    return law.loss(N_worth, D_worth)


def data_constrained_optimal(C, unique, law=None, *, r_data=REACH_DATA, r_parameters=REACH_PARAMETERS):
    """(N, D) of least `data_constrained` loss on C = 6ND.

    The slope dL/d log N = βB·D′^−β·s_D − αA·N′^−α·s_N, s = d log x′/d log x, rises with N: bisection finds its root."""
    law = law or LAWS["muennighoff"]
    C, unique = float(_positive("C", C)), float(_positive("unique", unique))
    low, high = math.log(1.0), math.log(C / 6)
    for _ in range(200):
        middle = (low + high) / 2
        N = math.exp(middle)
        D = C / (6 * N)
        base = law.matching_parameters(min(D, unique))
        # While D ≤ unique, U_N moves with D too; N ≤ U_N there except above the optimum, where the sign is the same.
        N_worth, D_worth = effective_amount(N, base, r_parameters), effective_amount(D, unique, r_data)
        s_N = N / N_worth * math.exp(-max(N / base - 1, 0) / r_parameters)
        s_D = D / D_worth * math.exp(-max(D / unique - 1, 0) / r_data)
        slope = law.beta * law.B * D_worth**-law.beta * s_D - law.alpha * law.A * N_worth**-law.alpha * s_N
        low, high = (low, middle) if slope > 0 else (middle, high)
    N = math.exp((low + high) / 2)
    return N, C / (6 * N)


# ------------------------------------------------------------------------------------------------ a model that serves


def inference_aware(law: ParametricLaw, loss, served):
    r"""(N, D) that reach `loss` with the least 6ND + 2N·served FLOPs, `served` tokens being generated or read in use.

    Sardana et al., arXiv 2401.00448. With u = A/N^α and v = B/D^β, u + v = L − E, the least cost is where
    αu = βv·(1 + served/(3D)): bisection on log N. served = 0 gives the compute-optimal pair.
    """
    room = float(loss) - law.E
    if room <= 0:
        raise ValueError(f"loss {loss} is not above the irreducible loss E = {law.E}: no model reaches it")
    if served < 0:
        raise ValueError(f"served must be a number of tokens ≥ 0, got {served}")
    low = math.log(law.A / room) / law.alpha
    high = low + 60
    for _ in range(200):
        middle = (low + high) / 2
        u = law.A * math.exp(-law.alpha * middle)
        v = room - u
        D = (law.B / v) ** (1 / law.beta) if v > 0 else math.inf
        too_big = v > 0 and law.alpha * u < law.beta * v * (1 + served / (3 * D))
        low, high = (low, middle) if too_big else (middle, high)
    N = math.exp((low + high) / 2)
    return N, float(law.tokens_for(N, loss))


def lifetime_flops(N, D, served):
    """6ND to train and 2N for each token served."""
    return 6 * np.asarray(N, float) * D + 2 * np.asarray(N, float) * served


class OvertrainingLaw(NamedTuple):
    """L = E + (a·M^η + b·M^−η)·C^−η with M = D/N (Gadre et al., arXiv 2403.08540, eq. 4)."""

    E: float
    a: float
    b: float
    eta: float

    def loss(self, C, M):
        C, M = _positive("C", C), _positive("M", M)
        return self.E + (self.a * M**self.eta + self.b * M**-self.eta) * C**-self.eta

    @property
    def best_multiplier(self) -> float:
        """The M of least loss at any budget: (b/a)^(1/2η)."""
        return (self.b / self.a) ** (1 / (2 * self.eta))


def overtraining(law: ParametricLaw) -> OvertrainingLaw:
    """The same law written in C and M = D/N, exact when α = β: η = α/2, a = B·6^η, b = A·6^η.

    Along any fixed M the loss then falls with C at one and the same slope, however far from optimal M is: parallel
    lines, which is why over-trained models can be predicted from cheap ones. Raises ValueError when α ≠ β."""
    if not math.isclose(law.alpha, law.beta, rel_tol=1e-9):
        raise ValueError(
            f"the over-training form needs α = β, this law has α = {law.alpha:.4f}, β = {law.beta:.4f}: fit one with "
            "equal exponents, or compare law.loss(N, D) directly"
        )
    eta = law.alpha / 2
    # N = √(C/6M), D = √(CM/6), so A·N^−2η = A·(6M)^η·C^−η and B·D^−2η = B·6^η·M^−η·C^−η.
    return OvertrainingLaw(law.E, law.A * 6**eta, law.B * 6**eta, eta)


# ------------------------------------------------------------------------------------------------ experts


_MOE_TABLE = {
    1: (30.3640, 0.1817, 53.9838, 0.1965),
    2: (27.7982, 0.1780, 66.8401, 0.2065),
    4: (24.8462, 0.1731, 87.7022, 0.2192),
    8: (21.8330, 0.1676, 119.9126, 0.2338),
    16: (19.0159, 0.1617, 167.5073, 0.2494),
    32: (16.5424, 0.1557, 234.6726, 0.2652),
}
_MOE_FLOOR, _MOE_START, _MOE_LIMIT = 1.3637, 2.0732, 290.4521


def effective_experts(experts):
    """Ê: 1/Ê = 1/(E − 1 + 1/(1/E_start − 1/E_max)) + 1/E_max: one expert counts as E_start, very many as E_max."""
    offset = 1 / (1 / _MOE_START - 1 / _MOE_LIMIT)
    return 1 / (1 / (_positive("experts", experts) - 1 + offset) + 1 / _MOE_LIMIT)


def moe(experts: float) -> ParametricLaw:
    """L = c + m/N^μ + n/D^ν with N *active* parameters, for a model of 1…32 experts of which a token takes one.

    Ludziejewski et al., arXiv 2502.05172, table 4 (printed), c = 1.3637. In the paper's joint law log m, μ, log n and ν
    are straight lines in log Ê (`effective_experts`), so between the table's rows they are interpolated in log Ê.
    """
    if not 1 <= experts <= 32:
        raise ValueError(f"experts = {experts}: the law was fitted for 1 to 32 experts; give a number in that range")
    at, knots = np.log(effective_experts(experts)), np.log(effective_experts(np.array(list(_MOE_TABLE))))
    log_m, mu, log_n, nu = (
        float(np.interp(at, knots, column))
        for column in (
            [math.log(row[0]) for row in _MOE_TABLE.values()], [row[1] for row in _MOE_TABLE.values()],
            [math.log(row[2]) for row in _MOE_TABLE.values()], [row[3] for row in _MOE_TABLE.values()],
        )
    )  # fmt: skip
    source = "Ludziejewski et al. (2025), arXiv 2502.05172, table 4 (printed)"
    A, B = math.exp(log_m), math.exp(log_n)
    return ParametricLaw(_MOE_FLOOR, A, B, mu, nu, f"moe-{experts:g}", source, "N is active")


def moe_total_parameters(active, experts, ffn_share: float = 2 / 3):
    """Parameters held in memory: active·(1 − s + s·E), s the feed-forward share of a dense block (8d² of 12d²: ⅔)."""
    return np.asarray(active, float) * (1 - ffn_share + ffn_share * experts)


def moe_optimal(C, experts, memory=None, ffn_share: float = 2 / 3):
    """(N active, D, loss) for a budget, with at most `memory` parameters in all. L on C = 6ND falls until N_opt, so
    under a cap the best N is the cap."""
    law = moe(experts)
    N, D = law.optimal(C)
    if memory is not None:
        N = min(N, memory / (1 - ffn_share + ffn_share * experts))
        D = C / (6 * N)
    return N, D, law.loss(N, D)


# ------------------------------------------------------------------------------------------------ precision


PRECISION_REACH = {"weights": 2.6745, "activations": 2.2102, "kv": 0.9578}
"""γ in bits for weights, activations and KV cache, as quoted for Kumar et al., arXiv 2411.04330 (unverified: not
checked against the paper's table)."""


def precision(N, *, weights=16.0, activations=16.0, kv=16.0, reach=None):
    """N_eff = N·Π(1 − e^(−P/γ)) over the precisions P, in bits, of weights, activations and KV cache while training
    (Kumar et al., arXiv 2411.04330, eq. 4)."""
    reach = reach or PRECISION_REACH
    kept = 1.0
    for name, bits in (("weights", weights), ("activations", activations), ("kv", kv)):
        kept = kept * -np.expm1(-_positive(name, bits) / reach[name])
    return _positive("N", N) * kept


# ------------------------------------------------------------------------------------------------ learning rate, batch


def learning_rate_and_batch(N, D, law: str = "steplaw"):
    """(peak learning rate, batch in tokens) that a published law recommends for N parameters and D tokens.

    "steplaw":  lr = 1.79·N^−.713·D^.307, batch = .58·D^.571  (Li et al., arXiv 2503.04715)
    "deepseek":  lr = .3118·C^−.1250, batch = .2920·C^.3271 with C = 6ND  (DeepSeek-AI, arXiv 2401.02954)
    Each holds for the optimiser, schedule and data of its paper: starting points, not truths.
    """
    N, D = _positive("N", N), _positive("D", D)
    if law == "steplaw":
        return 1.79 * N**-0.713 * D**0.307, 0.58 * D**0.571
    if law == "deepseek":
        return 0.3118 * (6 * N * D) ** -0.1250, 0.2920 * (6 * N * D) ** 0.3271
    raise ValueError(f"law {law!r} is not known: choose 'steplaw' or 'deepseek'")


# ------------------------------------------------------------------------------------------------ FLOPs and money


class TransformerShape(NamedTuple):
    """The sizes that decide a dense transformer's FLOPs."""

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    vocab_size: int = 32000
    context: int = 2048
    ffn_matrices: int = 2
    attention_matrices: int = 4

    @property
    def block_parameters(self) -> int:
        """Weights of the blocks' matrices: L·(4·d·H·Q + 2·d·f), or 5 with relative positions and 3 with a GLU."""
        attention = self.attention_matrices * self.d_model * self.num_heads * self.head_dim
        return self.num_layers * (attention + self.ffn_matrices * self.d_model * self.d_ff)

    @property
    def parameters(self) -> int:
        """Block weights and one vocabulary matrix."""
        return self.block_parameters + self.vocab_size * self.d_model


def training_flops(config, tokens, counting: str = "palm"):
    """FLOPs to train on `tokens`: forward, and twice as much backward.

    config: a number N, a `TransformerShape`, or a `ModelConfig` (counted by `llmlib.cost` on texts of max_seq_len, or
    2048 tokens where that isn't given: exact for any mixer).
    counting, for a `TransformerShape` of L layers, H heads of width Q, context T:
      "6ND"         6·N per token
      "palm"        6·N + 12·L·H·Q·T per token (Chowdhery et al., arXiv 2204.02311, appendix B)
      "causal"      6·N + 6·L·H·Q·T: half the score matrix is masked
      "chinchilla"  arXiv 2203.15556, appendix F: every product and the softmax, without embedding and logits; only
                    so, with attention_matrices=5 in N, does its table of exact/6ND come out
      "chinchilla-full"  the same with the embedding and logit products that appendix F lists
    """
    if isinstance(config, (int, float, np.ndarray, np.number)):
        return 6 * _positive("N", config) * _positive("tokens", tokens)
    if not isinstance(config, TransformerShape):
        from llmlib import cost

        context = config.max_seq_len or 2048
        return 3 * cost.flops(config, context).total / context * _positive("tokens", tokens)
    per_token = {
        "6ND": lambda s: 6 * s.parameters,
        "palm": lambda s: 6 * s.parameters + 12 * s.num_layers * s.num_heads * s.head_dim * s.context,
        "causal": lambda s: 6 * s.parameters + 6 * s.num_layers * s.num_heads * s.head_dim * s.context,
        "chinchilla": lambda s: 3 * _chinchilla_forward(s, ends=False),
        "chinchilla-full": lambda s: 3 * _chinchilla_forward(s, ends=True),
    }
    if counting not in per_token:
        raise ValueError(f"counting {counting!r} is not known: choose one of {', '.join(per_token)}")
    return per_token[counting](config) * _positive("tokens", tokens)


def _chinchilla_forward(s: TransformerShape, ends: bool) -> float:
    inner = s.num_heads * s.head_dim
    attention = 2 * 3 * s.d_model * inner + 2 * s.context * inner + 3 * s.num_heads * s.context
    attention += 2 * s.context * inner + 2 * inner * s.d_model
    dense = 2 * s.ffn_matrices * s.d_model * s.d_ff
    return s.num_layers * (attention + dense) + ends * 2 * 2 * s.vocab_size * s.d_model


class Chip(NamedTuple):
    """Peak dense BF16 FLOP/s (FP16 on V100) and board power in watts, from the maker's data sheet."""

    peak: float
    watts: float


CHIPS = {
    "V100": Chip(125e12, 300),
    "A100": Chip(312e12, 400),
    "H100": Chip(989.4e12, 700),
    "H800": Chip(989.4e12, 700),
    "H200": Chip(989.4e12, 700),
    "B200": Chip(2250e12, 1000),
    "MI300X": Chip(1307.4e12, 750),
}


class TrainingCost(NamedTuple):
    days: float
    chip_hours: float
    dollars: float
    energy_kwh: float


def training_cost(flops, chip="A100", count=1, mfu=0.4, price_per_hour=2.0, overhead=1.2) -> TrainingCost:
    """Days on `count` chips, chip-hours, price and energy of a run: chip-hours = FLOPs/(peak·MFU·3600).

    chip: a key of `CHIPS`, or a `Chip`. mfu: the share of peak that is reached. price_per_hour: dollars for one chip,
    an assumption. Energy: board power for the whole time, times `overhead` for the rest of the machine and cooling."""
    chip = _chip(chip)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu = {mfu} must lie in (0, 1]: it is the share of the chip's peak that training reaches")
    hours = _positive("flops", flops) / (chip.peak * mfu * 3600)
    return TrainingCost(
        hours / _positive("count", count) / 24, hours, hours * price_per_hour, hours * chip.watts / 1000 * overhead
    )


def model_flops_utilisation(flops, chip_hours, chip="A100"):
    """MFU = FLOPs/(chip-hours·3600·peak): what share of the chips' peak a reported run reached."""
    return _positive("flops", flops) / (_positive("chip_hours", chip_hours) * 3600 * _chip(chip).peak)


def _chip(chip) -> Chip:
    if isinstance(chip, Chip):
        return chip
    if chip not in CHIPS:
        raise ValueError(f"chip {chip!r} is not known: choose one of {', '.join(CHIPS)}, or pass Chip(peak, watts)")
    return CHIPS[chip]


# ------------------------------------------------------------------------------------------------ data that ships


class PublishedModel(NamedTuple):
    """One released model: total and active parameters, training tokens, where that is said, and how sure it is."""

    name: str
    year: int
    N: float
    N_active: float
    D: float
    source: str
    certainty: str


def published_models() -> list[PublishedModel]:
    """41 released models, from `published_models.csv`."""
    with (Path(__file__).parent / "published_models.csv").open(newline="", encoding="utf-8") as file:
        return [
            PublishedModel(
                row["name"], int(row["year"]), float(row["N_total"]), float(row["N_active"]), float(row["D"]),
                row["source"], row["certainty"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ the book's experiment


def byte_model(d_model: int, num_layers: int):
    """The config of the experiment's models: a byte-level decoder with RMSNorm, RoPE and a GELU MLP of 4·d_model."""
    from llmlib.attention import Attention
    from llmlib.ffn import MLP
    from llmlib.model import Layer, ModelConfig, spec
    from llmlib.norm import RMSNorm

    mixer = spec(Attention, num_heads=max(1, d_model // 8), rope_theta=1e4)
    layer = Layer(mixer, spec(MLP, d_ff=4 * d_model, bias=False))
    return ModelConfig(vocab_size=256, d_model=d_model, layers=num_layers * (layer,), norm=spec(RMSNorm))


def byte_run(
    d_model: int, num_layers: int, flops: float, *, seed: int = 0, lr_factor: float = 1.0, time: int = 64,
    batch: int = 16, device: str = "cpu",
) -> dict:  # fmt: skip
    """Train one model of the experiment with a budget of FLOPs, and measure its loss on files that it hasn't seen.

    N leaves the input embedding out (no products there) and has the head in; one token costs 6N + 6·L·T·d FLOPs
    (T = `time`; half of PaLM's 12: the mask). Learning rate min(.02, .02·(N/6e4)^−.7), down to 0 over the last 40 %.
    """
    import torch

    from llmlib.data import standard_library
    from llmlib.model import CausalLM
    from llmlib.train import evaluate, train

    corpus = standard_library()
    torch.manual_seed(seed)
    model = CausalLM(byte_model(d_model, num_layers)).to(device)
    N = model.num_parameters() - model.embedding.weight.numel()
    per_token = 6 * N + 6 * num_layers * time * d_model
    steps = round(flops / per_token / (batch * time))
    rate = lr_factor * min(0.02, 0.02 * (N / 6e4) ** -0.7)
    train(
        model, corpus, steps=steps, batch_size=batch, time=time, learning_rate=rate, warmup=min(100, steps // 10),
        schedule="trapezoid", floor=0.0, seed=seed, progress=False,
    )  # fmt: skip
    loss = evaluate(model, corpus.validation, batch_size=64, time=time, windows=2**17 // time)
    D = steps * batch * time
    return {
        "d_model": d_model, "num_layers": num_layers, "budget": flops, "seed": seed, "lr_factor": lr_factor,
        "N": N, "D": D, "C": per_token * D, "loss": loss,
    }  # fmt: skip
