"""Behind chapter 01: looking inside a model, the induction experiment, and its record."""

import dataclasses

import pytest
import torch

from llmlib import notebook
from llmlib.attention import Attention, max_logits
from llmlib.notebook.experiments import induction


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return induction.make_model(seed=0)


def test_attention_weights_are_the_softmax_of_the_scores(model):
    text, _ = induction.repeats(3, torch.Generator().manual_seed(0))
    found = notebook.attention_weights(model, text)
    for (q, k, _, _), weights in zip(notebook.attention_calls(model, text), found, strict=True):
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(41, 41).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(weights, scores.softmax(-1))


def test_attention_weights_see_sinks_and_grouped_heads():
    layer = Attention(16, num_heads=4, num_kv_heads=2, sinks=True)
    (weights,) = notebook.attention_weights(layer, torch.randn(1, 5, 16))
    assert weights.shape == (1, 4, 5, 5)
    torch.testing.assert_close(weights[0, :, 0, 0], torch.full((4,), 0.5), atol=0.05, rtol=0)  # one key, one sink


def test_largest_logits_agree_with_the_library():
    layer, x = Attention(32, num_heads=4, num_kv_heads=2, rope_theta=1e4), torch.randn(2, 9, 32)
    torch.testing.assert_close(notebook.largest_logits(layer, x)[0], max_logits(layer, x))


def test_texts_begin_with_the_start_token_and_repeat():
    text, period = induction.repeats(50, torch.Generator().manual_seed(0))
    assert (text[:, 0] == induction.START).all() and text[:, 1:].min() >= 1 and text.max() < induction.VOCAB
    assert period.min() >= 8 and period.max() <= 20
    again = induction.repeated(period)
    for row, p, known in zip(text, period.tolist(), again, strict=True):
        for i in range(induction.TIME):
            assert known[i] == (i > p)
            if known[i]:  # the present token stood p earlier, and what followed it then follows now
                assert row[i] == row[i - p] and row[i + 1] == row[i + 1 - p]


def test_scores_find_ideal_heads():
    period, t = torch.tensor([9, 12]), induction.TIME
    at = torch.arange(t)
    before = torch.zeros(2, 1, t, t)
    before[:, 0, at, (at - 1).clamp(min=0)] = 1
    after = torch.zeros(2, 1, t, t)
    for row, p in enumerate(period.tolist()):
        after[row, 0, at, torch.where(at > p, at - p + 1, 0)] = 1
    found = induction.scores([before, after], period)
    assert found["previous"].flatten().tolist() == [1, 0]
    assert found["induction"].flatten().tolist() == [0, 1]
    assert found["sink"].flatten().tolist() == [0, 1] and found["aside"].abs().max() == 0


def test_training_is_the_same_on_every_run(model):
    logs = [induction.train_on_repeats(induction.make_model(seed=1), 4, seed=1, every=2) for _ in range(2)]
    assert dataclasses.asdict(logs[0]) == dataclasses.asdict(logs[1]) and logs[0].steps == [2, 4]


def test_clip_holds_the_logits():
    model = induction.make_model(seed=0)
    log = induction.train_on_repeats(model, 30, learning_rate=0.1, every=10, clip=2.0)
    free = induction.train_on_repeats(induction.make_model(seed=0), 30, learning_rate=0.1, every=10)
    assert max(log.logit) < 4 < max(free.logit)


def test_the_record_is_complete_and_tells_the_chapter_story():
    record = notebook.recorded("attention")
    assert record["provenance"]["command"] == "make record CHAPTER=01-attention"
    runs = {key: run for key, run in record.items() if key != "provenance"}
    assert len(runs) == 33 and all(run["steps"][-1] == 400 for run in runs.values())
    last = {arm: [run["repeated"][-1] for key, run in runs.items() if key.startswith(f"{arm}, seed")]
            for arm in ("two layers", "one layer", "fast")}  # fmt: skip
    assert max(last["two layers"]) < 0.5 < 2 < min(last["one layer"]) and min(last["fast"]) > 3
