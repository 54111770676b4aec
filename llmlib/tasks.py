"""Synthetic tasks, each of which asks one thing of a sequence model: to recall, to copy, to track a state, to keep.

Each function gives a `Batch` of its sizes, `seed` and `step` alone, so it trains a model and evaluates it:

    train(model, lambda step: mqar(64, num_pairs=8, length=64, vocab_size=128, step=step), steps=1000)
    test = mqar(256, num_pairs=8, length=64, vocab_size=128, seed=1)
    accuracy(model(test.inputs), test.targets)

A target is what the model must say once it has read the input at the same place; where `scored` is False it is IGNORED.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmlib.data import IGNORED, Batch
from llmlib.errors import require

FILLER = ("rain", "falls", "on", "the", "hills", "all", "day", ".")
PASSKEY_VOCABULARY = (*"0123456789", "the key is", "what is the key?", *FILLER)
"""What each token of `passkey` stands for: the digits, the two marks, the words of the filler."""


def mqar(
    batch_size: int,
    *,
    num_pairs: int,
    length: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    seed: int = 0,
    step: int = 0,
) -> Batch:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs k₁ v₁ … kₙ vₙ, then each key once, alone.

        3 71 9 64 | 0 0 9 0 3 0 0 0        n = 2: after this 9 the answer is 64, after this 3 it is 71

    The rest is divided into places of two tokens; a key stands first in its place, and all else is blank. Place i has
    probability ∝ i^(power − 1): with the paper's 0.01 most questions come soon, as repetitions in real text do, and 1
    spreads them evenly. A text's keys are all different, and so are its values.

    vocab_size  token 0 is the blank, 1 … v/2 − 1 are keys, v/2 … v − 1 are values
    Chance: 2/v, and 1/num_pairs for a model that names any value of the text.
    Raises ConfigError where the pairs and their questions don't fit into the length, or the keys into the vocabulary.
    """
    half, places = vocab_size // 2, length // 2 - num_pairs
    require(num_pairs >= 1, f"num_pairs is {num_pairs}, and must be at least 1")
    require(
        places >= num_pairs,
        f"length is {length}, and num_pairs = {num_pairs} pairs with a place of two tokens for the question of each "
        f"need 4 · {num_pairs} = {4 * num_pairs}: give a longer text or fewer pairs",
    )
    require(
        half - 1 >= num_pairs,
        f"vocab_size is {vocab_size}, so there are {vocab_size} // 2 − 1 = {half - 1} keys for num_pairs = {num_pairs} "
        f"pairs: give {2 * (num_pairs + 1)} or more",
    )
    draw = _generator(seed, step)
    keys = 1 + _distinct(draw, batch_size, num_pairs, np.ones(half - 1))
    values = half + _distinct(draw, batch_size, num_pairs, np.ones(vocab_size - half))
    place = _distinct(draw, batch_size, num_pairs, np.arange(1.0, places + 1) ** (power - 1))
    inputs = np.zeros((batch_size, length), dtype=np.int64)
    inputs[:, 0 : 2 * num_pairs : 2], inputs[:, 1 : 2 * num_pairs : 2] = keys, values
    targets = np.full_like(inputs, IGNORED)
    at = 2 * (num_pairs + place)
    np.put_along_axis(inputs, at, keys, 1)
    np.put_along_axis(targets, at, values, 1)
    return _batch(inputs, targets)


def copying(batch_size: int, length: int, *, letters: int = 26, seed: int = 0, step: int = 0) -> Batch:
    """Say a string of random letters again (arXiv 2402.01032): begin x₁ … x_L copy x₁ … x_{L−1}.

    That is 2 · length + 1 tokens. Scored are the last L places, from the mark `copy` on: the next letter of the copy.
    Vocabulary: 0 … letters − 1 are the letters, `letters` is the mark at the beginning, `letters` + 1 the mark `copy`.
    Chance: 1/letters. Raises ConfigError for a string of no letters or an alphabet of fewer than two.
    """
    require(length >= 1, f"length is {length}, and a string has at least 1 letter")
    require(letters >= 2, f"letters is {letters}, and a string that says something needs 2 different ones or more")
    text = _generator(seed, step).integers(0, letters, (batch_size, length))
    begin, copy = (np.full((batch_size, 1), letters + i) for i in (0, 1))
    inputs = np.concatenate([begin, text, copy, text[:, :-1]], 1)
    targets = np.full_like(inputs, IGNORED)
    targets[:, length + 1 :] = text
    return _batch(inputs, targets)


def parity(batch_size: int, length: int, *, seed: int = 0, step: int = 0) -> Batch:
    """Track one bit: y_t = (x₁ + … + x_t) mod 2 for random bits x (arXiv 2411.12537), scored at every place.

    Vocabulary: 0 and 1. Chance: 1/2. Raises ConfigError for a text of no bits.
    """
    require(length >= 1, f"length is {length}, and a text has at least 1 bit")
    bits = _generator(seed, step).integers(0, 2, (batch_size, length))
    return _batch(bits, bits.cumsum(1) % 2)


def passkey(
    batch_size: int, length: int, *, digits: int = 5, depth: float | None = None, seed: int = 0, step: int = 0
) -> Batch:
    """Find a number in filler text (arXiv 2305.16300): … filler … key d₁ … dₙ … filler … ask d₁ … dₙ₋₁.

    The filler is one sentence over and over. Scored are the last n places, from the question on.

    depth  where in the filler the number stands, from 0 (first) to 1 (last); None: anywhere
    Vocabulary: `PASSKEY_VOCABULARY`, 20 tokens, in which digits stand for themselves. Chance: 1/10 for each digit.
    Raises ConfigError where the number doesn't fit into the length.
    """
    filler = length - 2 * digits - 1
    require(digits >= 1, f"digits is {digits}, and a number has at least 1")
    require(
        filler >= 0,
        f"length is {length}, and a number of digits = {digits}, said and asked for, needs 2 · {digits} + 1 = "
        f"{2 * digits + 1}: give a longer text or fewer digits",
    )
    require(depth is None or 0 <= depth <= 1, f"depth is {depth}, and must lie between 0 and 1")
    draw = _generator(seed, step)
    number = draw.integers(0, 10, (batch_size, digits))
    before = draw.integers(0, filler + 1, batch_size) if depth is None else np.full(batch_size, round(depth * filler))
    key, ask = (np.full((batch_size, 1), 10 + i) for i in (0, 1))
    inputs = np.tile(12 + np.arange(length) % len(FILLER), (batch_size, 1))
    np.put_along_axis(inputs, before[:, None] + np.arange(digits + 1), np.concatenate([key, number], 1), 1)
    inputs[:, -digits:] = np.concatenate([ask, number[:, :-1]], 1)
    targets = np.full_like(inputs, IGNORED)
    targets[:, -digits:] = number
    return _batch(inputs, targets)


@torch.no_grad()
def accuracy(logits: Float[Tensor, "*b v"], targets: Int64[Tensor, "*b"]) -> float:
    """The share of targets, leaving out those that are IGNORED, whose logit is the largest at their place.

    Raises ValueError when all targets are IGNORED.
    """
    scored = targets != IGNORED
    require(bool(scored.any()), "no target is scored: all are IGNORED", ValueError)
    return (logits.argmax(-1) == targets)[scored].float().mean().item()


def _generator(seed: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, step]))


def _distinct(draw: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """In each row `count` different numbers, one after the other, each with probability ∝ its weight among those left.

    It is a race: number i arrives after an exponential time of rate wᵢ, and is then the next with exactly that
    probability.
    """
    return (draw.exponential(size=(rows, len(weights))) / weights).argsort(1)[:, :count]


def _batch(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
