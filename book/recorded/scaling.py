"""The experiment of chapter 09: small byte models at five budgets, stored run by run in scaling.json.

    make record CHAPTER=scaling

Two processes of one thread each. Interrupted, it goes on with the runs that are missing.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from llmlib.data import corpus_digest
from llmlib.notebook import recorded, recording
from llmlib.scaling import byte_run

# (d_model, num_layers): N from 2.0 thousand to 328 thousand
LADDER = ((6, 1), (8, 1), (12, 1), (16, 1), (24, 1), (24, 2), (32, 2), (40, 2), (48, 3), (56, 3), (72, 3), (80, 4))
BUDGETS = {3e10: range(6), 9e10: range(1, 7), 2.7e11: range(3, 9), 8e11: range(4, 10), 2.4e12: (8, 7, 9, 11)}
# How much the seed matters: a second one at the cheapest budget, and three in two places.
REPEATS = [(16, 1, 3e10, 2, 1.0), *((32, 2, 2.7e11, seed, 1.0) for seed in (1, 2))]
# Is the learning rate near its best?
RATES = [(16, 1, 9e10, 0, f) for f in (0.5, 2.0)] + [(32, 2, 9e10, 0, f) for f in (0.5, 2.0)]


def plan() -> dict[str, tuple]:
    """Every run by its key, the cheapest first."""
    grid = [(*LADDER[i], C, seed, 1.0) for C, part in BUDGETS.items() for i in part for seed in (0, 1)]
    kept = [run for run in grid if run[2] == min(BUDGETS) or run[3] == 0]
    runs = sorted(kept + REPEATS + RATES, key=lambda run: (run[2], run[3]))
    return {f"d={d} L={layers} C={C:g} seed={seed} lr×{factor:g}": run
            for run in runs for d, layers, C, seed, factor in [run]}  # fmt: skip


def measure(run: tuple) -> dict:
    torch.set_num_threads(1)
    d_model, num_layers, flops, seed, factor = run
    return byte_run(d_model, num_layers, flops, seed=seed, lr_factor=factor)


def main(budgets=tuple(BUDGETS)) -> None:
    torch.set_num_threads(1)
    with recording("scaling", "make record CHAPTER=scaling") as record, ProcessPoolExecutor(2) as pool:
        record("corpus sha256", corpus_digest)
        missing = {key: run for key, run in plan().items() if run[2] in budgets and key not in recorded("scaling")}
        waiting = {pool.submit(measure, run): key for key, run in missing.items()}
        for future in as_completed(waiting):
            result = record(waiting[future], future.result)
            print(f"{waiting[future]}: N {result['N']:,}, D {result['D']:,}, loss {result['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
