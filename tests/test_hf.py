"""Checkpoints of published families give the logits of transformers, the reference implementation."""

import families
import pytest
import torch

from llmlib import load

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to answer for


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def tokens(b=2, t=40, seed=0):
    return torch.randint(0, 97, (b, t), generator=torch.Generator().manual_seed(seed))


def assert_same_logits(mine, theirs):
    """Within 1e-4 of the standard deviation of the logits."""
    error = (mine - theirs).abs().max() / theirs.std()
    assert error < 1e-4, f"off by {error:.2g} standard deviations"


@pytest.mark.parametrize("case", families.CASES)
@torch.no_grad()
def test_logits_equal_the_reference(case, checkpoints):
    theirs, folder = families.saved(case, checkpoints)
    mine = load(folder)
    assert mine.num_parameters() == theirs.num_parameters()
    for t in (1, 5, 40):
        assert_same_logits(mine(tokens(t=t)), theirs(tokens(t=t)).logits)


@pytest.mark.parametrize("case", families.CASES)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(case, checkpoints):
    mine = load(families.saved(case, checkpoints)[1])
    state = mine.new_state()
    pieces = [mine(piece, state) for piece in tokens().split([11, 1, 1, 9, 1, 17], dim=1)]
    assert_same_logits(torch.cat(pieces, 1)[:, -1:], mine(tokens())[:, -1:])


@pytest.mark.parametrize("case", families.CASES)
@torch.no_grad()
def test_greedy_generation_is_the_references(case, checkpoints):
    theirs, folder = families.saved(case, checkpoints)
    prompt = tokens(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(load(folder).generate(prompt, 12), expected)
