"""The scaling-law explorer: what a training budget buys, and how sure anyone can be.

    explorer(compute=3.8e25, law="refit")     # on a page, with no kernel
    live(compute=3.8e25)                      # an ipywidgets widget: its inputs and answers are traits

Every number comes from `llmlib.scaling`; `scaling_explorer.js` holds the same formulas and a test compares them.
"""

import math
from dataclasses import replace
from functools import cache

from llmlib import scaling
from llmlib.errors import require
from llmlib.interactive import Embedded, embed, widget

LABELS = {
    "refit": "Chinchilla’s runs, fitted again",
    "epoch": "Epoch’s replication (2024)",
    "hoffmann-rounded": "Chinchilla as printed (2022)",
    "hoffmann-tex": "Chinchilla, unrounded (TeX source)",
    "muennighoff": "Muennighoff (2023), C4",
    "kaplan": "Kaplan (2020)",
    "ours": "This book’s own runs",
    "moe": "Mixture of experts (2025)",
    "custom": "Your own constants",
}
INPUTS = {
    "compute": 5.76e23, "law": "refit", "N": 7e9, "D": 2e12, "served": 0.0, "unique": 0.0, "counting": "law",
    "experts": 8.0, "memory": 0.0, "weights": 16.0, "activations": 16.0, "kv": 16.0, "chip": "H100", "chips": 1024.0,
    "mfu": 0.4, "price": 2.0, "constants": [1.8172181, 477.82587, 2143.4174, 0.3473105, 0.36717243], "runs": "book",
    "drop": 0.0, "delta": 1e-3, "objective": "sum", "digits": 0.0, "csv": "", "tab": "mine", "width": 10.0,
    "shift": 1.0, "low": 768.0, "high": 1.5e9,
}  # fmt: skip
"""What the reader sets, with the value a page starts from. 0 stands for "no limit" in served, unique and memory."""
CONSTANTS = ("E", "A", "B", "alpha", "beta")
ANSWERS = ("N_opt", "D_opt", "loss", "ratio", "N_serve", "D_serve", "saved", "loss_mine", "excess", "wasted")
"""What the explorer works out, by `answer`; None where a law has no such answer."""


def explorer(**start) -> Embedded:
    """The explorer in the page. `start`: any of `INPUTS`, such as `compute=3.8e25` or `tab="refit"`."""
    return embed("scaling_explorer", state(**start), height=980, title="Scaling-law explorer")


def live(**start):
    """The explorer as a widget: each of `INPUTS` and of `ANSWERS` is a trait, for `observe`, `link` and `jslink`.

    The answers follow the inputs in Python too, with no browser attached."""
    box = widget("scaling_explorer", **state(**start), **dict.fromkeys(ANSWERS))

    def follow(change=None):
        with box.hold_sync():
            for name, value in answer(**{key: getattr(box, key) for key in INPUTS}).items():
                setattr(box, name, value)

    box.observe(follow, names=list(INPUTS))
    follow()
    return box


def state(**start) -> dict:
    """The whole model of the view: the inputs, the published constants and models, the runs, the resampled laws.

    Raises ConfigError for an input that doesn't exist or a law that isn't known."""
    unknown = sorted(set(start) - set(INPUTS))
    require(not unknown, f"the explorer has no input {', '.join(unknown)}: choose from {', '.join(INPUTS)}")
    _known(start.get("law", "refit"))
    from llmlib.notebook import recorded

    note = "bytes of Python; N without the input embedding; so small a range doesn't pin the five constants down"
    source = "llmlib.scaling on book/recorded/scaling.json"
    return INPUTS | start | {
        "laws": {name: _law(name) for name in LABELS if name in scaling.LAWS}
        | {"ours": own()["constants"] | {"source": source, "note": note}},
        "labels": LABELS,
        "draws": {"refit": recorded("scaling-refit")["draws"], "ours": own()["draws"]},
        "data": own()["runs"],
        "data_reach": own()["budgets"],
        "models": [[m.name, m.year, m.N, m.N_active, m.D, m.certainty, m.source] for m in scaling.published_models()],
        "hardware": {name: chip._asdict() for name, chip in scaling.CHIPS.items()},
        "moe": {
            "floor": scaling._MOE_FLOOR, "start": scaling._MOE_START, "limit": scaling._MOE_LIMIT,
            "rows": [[experts, *row] for experts, row in scaling._MOE_TABLE.items()],
        },
        "reach": {"data": scaling.REACH_DATA, "parameters": scaling.REACH_PARAMETERS},
        "bits": scaling.PRECISION_REACH,
    }  # fmt: skip


def _law(name: str) -> dict:
    law = scaling.LAWS[name]
    keys = ("alpha_N", "alpha_D", "N_c", "D_c", "a", "b") if name == "kaplan" else CONSTANTS
    return {key: float(getattr(law, key)) for key in keys} | {"source": law.source, "note": law.note}


@cache
def own() -> dict:
    """Chapter 09's runs, their law and 200 resamples of it, as book/recorded/scaling_explorer.py stored them."""
    from llmlib.notebook import recorded

    return recorded("scaling-explorer")


def _known(law: str) -> None:
    require(law in LABELS, f"law {law!r} is not known: choose from {', '.join(LABELS)}")


def current_law(law, constants, experts, weights, activations, kv, **_):
    """The law that the inputs name; fewer bits than 16 make parameters count less: A·(N_eff/N)^−α."""
    _known(law)
    if law == "kaplan":
        return scaling.LAWS["kaplan"]
    if law == "custom":
        chosen = scaling.ParametricLaw(*constants)
    else:
        chosen = scaling.moe(experts) if law == "moe" else _named(law)
    kept = scaling.precision(1.0, weights=weights, activations=activations, kv=kv) / scaling.precision(1.0)
    return replace(chosen, A=chosen.A * kept**-chosen.alpha)


def _named(law: str) -> scaling.ParametricLaw:
    return scaling.ParametricLaw(**own()["constants"]) if law == "ours" else scaling.LAWS[law]


def answer(**inputs) -> dict:
    """`ANSWERS` for a full set of `INPUTS`, as `llmlib.scaling` gives them."""
    C, N, D, served, unique = (float(inputs[key]) for key in ("compute", "N", "D", "served", "unique"))
    law = current_law(**inputs)
    if isinstance(law, scaling.KaplanLaw):
        N_opt, D_opt = law.optimal(C)
        known = {"N_opt": N_opt, "D_opt": D_opt, "loss": law.loss(N_opt, D_opt), "ratio": D_opt / N_opt}
        mine = law.loss(N, D)
        known |= {"loss_mine": mine, "excess": mine - law.loss(*law.joint_optimal(6 * N * D))}
        return dict.fromkeys(ANSWERS) | {key: float(value) for key, value in known.items()}

    def loss(N, D):
        return scaling.data_constrained(N, D, unique, law) if unique else law.loss(N, D)

    def best(C):
        return scaling.data_constrained_optimal(C, unique, law) if unique else law.optimal(C)

    N_opt, D_opt = best(C)
    if inputs["memory"]:
        N_opt = min(N_opt, inputs["memory"] / scaling.moe_total_parameters(1, _experts(inputs)))
        D_opt = C / (6 * N_opt)
    known = {"N_opt": N_opt, "D_opt": D_opt, "loss": loss(N_opt, D_opt), "ratio": D_opt / N_opt}
    if served:
        N_serve, D_serve = _serving(law, known["loss"], served, unique, N_opt)
        lifetime = scaling.lifetime_flops
        known |= {"N_serve": N_serve, "D_serve": D_serve}
        known["saved"] = 1 - lifetime(N_serve, D_serve, served) / lifetime(N_opt, D_opt, served)
    known |= {"loss_mine": loss(N, D), "excess": loss(N, D) - loss(*best(6 * N * D))}
    if not unique:
        known["wasted"] = law.wasted(N, D)
    return dict.fromkeys(ANSWERS) | {key: float(value) for key, value in known.items()}


def _experts(inputs: dict) -> float:
    return inputs["experts"] if inputs["law"] == "moe" else 1.0


def _serving(law, loss, served, unique, start):
    """(N, D) of this loss with the least training and serving; with repeated data by golden section in log N."""
    if not unique:
        return scaling.inference_aware(law, loss, served)

    def tokens(N):
        low, high = 0.0, math.log(1e30)
        if scaling.data_constrained(N, 1e30, unique, law) > loss:
            return math.inf
        for _ in range(64):
            middle = (low + high) / 2
            enough = scaling.data_constrained(N, math.exp(middle), unique, law) < loss
            low, high = (low, middle) if enough else (middle, high)
        return math.exp((low + high) / 2)

    def cost(x):
        return scaling.lifetime_flops(math.exp(x), tokens(math.exp(x)), served)

    low, high, golden = math.log(start) - 7, math.log(start) + 0.5, (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(60):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = cost(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = cost(right)
    N = math.exp((low + high) / 2)
    return N, tokens(N)
