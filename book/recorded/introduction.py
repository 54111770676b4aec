"""The record behind chapter 00: the pocket model of its interactive figure, trained for 6,000 steps (resumable).

make record CHAPTER=00-introduction
"""

import math
from pathlib import Path

import torch

from llmlib.data import corpus_digest, decode, encode, load_corpus
from llmlib.interactive.introduction import pack
from llmlib.model import CausalLM
from llmlib.notebook import recording
from llmlib.notebook.experiments.introduction import pocket, round_weights_
from llmlib.train import evaluate, train

STEPS, BATCH, TIME = 6000, 8, 256
CHECKPOINT = Path(__file__).parents[2] / "_build" / "introduction.pt"


def trained() -> tuple[CausalLM, dict]:
    """The model and its losses: (step, nats per byte on the validation split)."""
    torch.manual_seed(0)
    model = CausalLM(pocket())
    history = train(
        model, load_corpus(), steps=STEPS, batch_size=BATCH, time=TIME, learning_rate=6e-3, schedule="linear",
        floor=0.0, warmup=200, seed=0, evaluate_every=500, checkpoint=CHECKPOINT, checkpoint_every=25,
    )  # fmt: skip
    every = [s for s in range(STEPS) if s == 0 or math.floor(math.log(s, 1.1)) != math.floor(math.log(s + 1, 1.1))]
    smooth = history.smoothed(20)
    return model, {
        "steps": [s + 1 for s in every], "losses": [round(smooth[s], 3) for s in every],
        "evaluations": [[step, round(loss, 4)] for step, loss in history.evaluations],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with recording("introduction", command="make record CHAPTER=00-introduction") as record:
        model, losses = trained()
        record("corpus", corpus_digest)
        record("training", lambda: {"steps": STEPS, "batch_size": BATCH, "time": TIME} | losses)
        round_weights_(model)
        record("validation", lambda: round(evaluate(model, load_corpus().validation, time=TIME, windows=None), 3))
        record("model", lambda: pack(model))
        prompt = encode("    def __init__(self")[None]
        record("sample", lambda: decode(model.generate(prompt, 300, temperature=0.7, seed=0)[0]))


if __name__ == "__main__":
    main()
