"""The runs of chapter 09 (scaling.json), the law fitted to them and 200 resamples of it, for the explorer.

    make record CHAPTER=scaling_explorer

Stored, because where the data pin the constants down so little, another processor's rounding may end elsewhere.
When scaling.json has changed, delete scaling-explorer.json first, and run book/scaling-explorer.ipynb again afterwards.
"""

import numpy as np

from llmlib.interactive.scaling_explorer import CONSTANTS
from llmlib.notebook import recorded, recording
from llmlib.scaling import fit_parametric

DRAWS = 200


def chapter_runs() -> list[dict]:
    """The runs at the experiment's own learning rate."""
    return [run for run in recorded("scaling").values() if isinstance(run, dict) and run.get("lr_factor") == 1]


def short(value: float) -> float:
    return float(f"{value:.6g}")


def main() -> None:
    runs, budgets = chapter_runs(), [run["budget"] for run in chapter_runs()]
    columns = [[run[key] for run in runs] for key in ("N", "D", "loss")]
    fit = fit_parametric(*columns)
    resampled = fit.bootstrap(DRAWS, seed=0)
    with recording("scaling-explorer", "make record CHAPTER=scaling_explorer") as record:
        record("runs", lambda: [[N, D, short(loss)] for N, D, loss in zip(*columns, strict=True)])
        record("budgets", lambda: [min(budgets), max(budgets)])
        record("constants", lambda: {name: short(getattr(fit, name)) for name in CONSTANTS})
        record("draws", lambda: [list(map(short, row)) for row in np.transpose([*map(resampled.samples, CONSTANTS)])])


if __name__ == "__main__":
    main()
