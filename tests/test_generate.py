"""Sampling: greedy equals recomputation, filters keep what they say, seeds repeat, prompts of any length."""

import pytest
import torch

from llmlib.attention import Attention
from llmlib.errors import ConfigError
from llmlib.ffn import SwiGLU
from llmlib.generate import generate, sample
from llmlib.model import CausalLM, Layer, ModelConfig, spec
from llmlib.norm import RMSNorm
from llmlib.position import LearnedPosition


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layer = Layer(spec(Attention, num_heads=2, rope_theta=10000.0), spec(SwiGLU, d_ff=32))
    config = ModelConfig(vocab_size=17, d_model=16, norm=spec(RMSNorm), layers=2 * (layer,), init_std=0.5)
    return CausalLM(config).double()


def prompts(b=3, t=5):
    return torch.randint(0, 17, (b, t), generator=torch.Generator().manual_seed(4))


def recompute(model, tokens, n):
    """Greedy decoding with no cache: the whole text again for each token."""
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def test_greedy_equals_recomputation(model):
    torch.testing.assert_close(model.generate(prompts(), 20), recompute(model, prompts(), 20))


def test_each_token_is_read_once(model):
    lengths = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model.generate(prompts(), 6)
    hook.remove()
    assert lengths == [5, 1, 1, 1, 1, 1]


def test_prompts_of_different_lengths_come_back_as_if_alone(model):
    texts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    together = model.generate(texts, 9)
    for text, out in zip(texts, together, strict=True):
        alone = model.generate(torch.tensor([text]), 9)[0]
        torch.testing.assert_close(out, alone)
    equal = model.generate([[1, 2], [3, 4]], 3)
    assert [len(row) for row in equal] == [5, 5]


def test_a_seed_repeats_and_another_differs(model):
    options = {"temperature": 1.0, "top_k": 9, "top_p": 0.95}
    one, same, other = (model.generate(prompts(), 30, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(one[:, :5], prompts())


def test_samples_follow_the_distribution():
    """20 000 draws: each frequency within four standard errors of softmax(logits / temperature)."""
    logits, n = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 20_000
    draws = sample(logits.expand(n, 4), 0.7, generator=torch.Generator().manual_seed(0))
    p = (logits[0] / 0.7).softmax(-1)
    error = (torch.bincount(draws, minlength=4) / n - p).abs()
    assert (error < 4 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 50}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.65}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 1}, {0}),
    ],
)
def test_filters_keep_exactly_what_they_say(options, allowed):
    """softmax([2, 1, 0, −1]) = .644, .237, .087, .032: the nucleus of .65 needs two tokens, that of .6 one."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(5000, 4)
    draws = sample(logits, 1.0, generator=torch.Generator().manual_seed(0), **options)
    assert set(draws.tolist()) == allowed


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-45, 1e-300])
def test_the_colder_the_greedier(temperature):
    logits = torch.tensor([[-2.0, 50.0, 49.0], [3.0, 1.0, 2.0]])
    assert sample(logits, temperature).tolist() == sample(logits).tolist() == [1, 0]


def test_a_text_that_outgrows_the_table_of_positions_is_refused_before_it_begins(model):
    """The last token is never read, so it needs no position; padding takes none either."""
    small = CausalLM(model.config.replace(position=spec(LearnedPosition, max_positions=8))).double()
    assert small.generate(prompts(), 4).shape == (3, 9)
    assert [len(row) for row in small.generate([[1], [1, 2, 3, 4, 5]], 4)] == [5, 9]
    seen = []
    with pytest.raises(ConfigError, match="a prompt of 5 tokens and 5 new ones don't fit in this model's 8 positions"):
        small.generate(prompts(), 5, stream=seen.append)
    assert seen == []


def test_stop_ends_a_sequence(model):
    free = model.generate(prompts(), 20)
    stop = free[0, 9].item()
    first = [(row[5:] == stop).nonzero()[0, 0].item() if (row[5:] == stop).any() else None for row in free]
    stopped = model.generate(prompts(), 20, stop=stop)
    for row, before, at in zip(stopped, free, first, strict=True):
        end = 25 if at is None else 5 + at
        assert torch.equal(row[:end], before[:end])
        assert (row[end:] == stop).all()
    alone = model.generate(prompts()[:1], 20, stop=stop)[0]
    assert torch.equal(alone, stopped[0])
    as_list = model.generate([p.tolist() for p in prompts()], 20, stop=stop)
    assert [len(row) for row in as_list] == [25 if at is None else 6 + at for at in first]


def test_several_tokens_may_stop_a_sequence(model):
    """Each row ends at its first stop, whichever it is, and repeats that one."""
    free = model.generate(prompts(), 20)
    stop = {free[0, 9].item(), free[1, 12].item()}
    stopped = model.generate(prompts(), 20, stop=stop)
    cut = model.generate([p.tolist() for p in prompts()], 20, stop=stop)
    for row, before, shorter in zip(stopped.tolist(), free.tolist(), cut, strict=True):
        end = next((i for i in range(5, 25) if before[i] in stop), 24)
        assert row == before[: end + 1] + (24 - end) * [before[end]]
        assert shorter.tolist() == before[: end + 1]
    assert torch.equal(model.generate(prompts(), 20, stop=()), free)


def test_stream_sees_each_token_as_it_comes(model):
    columns = []
    out = model.generate(prompts(), 7, stream=columns.append)
    assert torch.equal(torch.stack(columns, 1), out[:, 5:])


def test_generation_leaves_the_mode_as_it_was(model):
    model.train()
    model.generate(prompts(), 1)
    assert model.training
    model.eval()
    model.generate(prompts(), 1)
    assert not model.training
    out = model.generate(prompts(), 3)
    model.loss(out).backward()
    assert model.embedding.weight.grad is not None
    model.zero_grad()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (prompts()[0], {}, r"shape \(5,\), and must be \(batch, time\): use tokens\[None\]"),
        (prompts()[:, :0], {}, "a prompt needs at least one token"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompt in the list"),
        (prompts() + 15, {}, "vocabulary is 0 to 16: was it encoded by another tokenizer"),
        (prompts() - 17, {}, "the prompt has token -"),
        (prompts(), {"temperature": -1}, "temperature is -1"),
        (prompts(), {"top_k": 0}, "top_k is 0"),
        (prompts(), {"top_p": 1.5}, "top_p is 1.5"),
        (prompts(), {"top_p": 0}, "top_p is 0"),
        (prompts(), {"top_k": 2.5}, "top_k is 2.5, and must be a whole number"),
        (prompts(), {"temperature": float("nan")}, "temperature is nan"),
        (prompts(), {"seed": 2**64}, "seed is 18446744073709551616, and must fit in 64 bits"),
        (prompts(), {"max_new_tokens": -2}, "max_new_tokens is -2"),
    ],
)
def test_bad_requests(model, tokens, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, tokens, **{"max_new_tokens": 3, **options})


def test_zero_new_tokens_returns_the_prompt(model):
    assert torch.equal(model.generate(prompts(), 0), prompts())
