"""Fit Hoffmann's law again to the 240 runs that Besiroglu et al. (arXiv 2404.10102) read off its figure 4.

    python book/recorded/scaling_refit.py svg_extracted_data.csv

The points belong to github.com/epoch-research/analyzing-chinchilla (data/svg_extracted_data.csv) and are not part of
this repository; the constants found here, and those of 300 resamples, are. N and 6ND are its columns "Model Size"
and "Training FLOP"; like Besiroglu et al., the 5 runs of greatest loss are left out.
"""

import csv
import hashlib
import sys
from pathlib import Path

import numpy as np

from llmlib.notebook import recording
from llmlib.scaling import fit_parametric

DRAWS = 300
BUDGETS = (1e19, 1e20, 1e21, 1e22, 5.76e23, 1e24, 1e25, 1e26)


def runs(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with path.open(newline="") as file:
        rows = [(row["Model Size"], row["Training FLOP"], row["loss"]) for row in csv.DictReader(file)]
    N, C, loss = np.array([row for row in rows if all(row)], float).T
    kept = loss < np.sort(loss)[-5]
    return N[kept], (C / (6 * N))[kept], loss[kept]


def refit(path: Path) -> dict:
    fit = fit_parametric(*runs(path))
    boot = fit.bootstrap(DRAWS, seed=0)
    names = ("E", "A", "B", "alpha", "beta")
    return {
        "points": {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "runs": fit.runs.shape[1],
        },
        "constants": {name: float(f"{getattr(fit, name):.8g}") for name in names},
        "objective": fit.objective,
        "draws": [[float(f"{value:.6g}") for value in row] for row in np.transpose([boot.samples(n) for n in names])],
        "tokens_per_parameter_95": {f"{C:g}": boot.tokens_per_parameter(C, 0.95) for C in BUDGETS},
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with recording("scaling-refit", "python book/recorded/scaling_refit.py svg_extracted_data.csv") as record:
        for key, value in refit(Path(sys.argv[1])).items():
            record(key, lambda value=value: value)
