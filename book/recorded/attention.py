"""Chapter 01: induction heads, sinks and exploding logits, several seeds each (about eight minutes on one core)."""

import dataclasses
import sys

import torch

from llmlib.model import spec
from llmlib.norm import RMSNorm
from llmlib.notebook import recording
from llmlib.notebook.experiments.induction import make_model, train_on_repeats

FAST = 3e-2  # ten times the learning rate that works
NORM = {"qk_norm": spec(RMSNorm)}
ARMS = {  # name: layers, options of Attention, options of the training, seeds
    "two layers": (2, {}, {}, 8),
    "one layer": (1, {}, {}, 4),
    "learned sink": (2, {"sinks": True}, {}, 4),
    "gate": (2, {"gate": "elementwise"}, {}, 4),
    "QK-norm": (2, NORM, {}, 4),
    "fast": (2, {}, {"learning_rate": FAST}, 3),
    "fast, QK-norm": (2, NORM, {"learning_rate": FAST}, 3),
    "fast, QK-clip": (2, {}, {"learning_rate": FAST, "clip": 20.0}, 3),
}


def run(layers: int, options: dict, training: dict, seed: int) -> dict:
    log = train_on_repeats(make_model(layers, seed, **options), 400, seed=seed, **training)
    return {name: [round(v, 4) for v in values] for name, values in dataclasses.asdict(log).items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with recording("attention", command="make record CHAPTER=01-attention") as record:
        for arm, (layers, options, training, seeds) in ARMS.items():
            for seed in range(seeds):
                record(f"{arm}, seed {seed}", lambda a=(layers, options, training, seed): run(*a))
                print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
