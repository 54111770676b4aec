"""Balance on a model that really trains: what chapter 06 shows."""

import pytest
import torch

from llmlib.data import load_corpus
from llmlib.notebook.experiments.balance import sparse_model, train_sparse, worst_violation

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.mark.slow
def test_the_bias_brings_max_violation_under_a_tenth(corpus):
    """And without it a few experts take nearly all; the loss lies between."""
    violation = {}
    for balanced_by, steps in (("nothing", 80), ("the loss", 300), ("the bias", 300)):
        model = sparse_model(balanced_by)
        history = train_sparse(model, corpus, steps=steps)
        assert history.losses[-1] < 3
        violation[balanced_by] = worst_violation(model, corpus)
    assert violation["the bias"] < 0.1
    assert 0.1 < violation["the loss"] < 1 < violation["nothing"]
