"""Chapter 00's interactive: the model in the page is the model in Python."""

import sys
from pathlib import Path

import pytest
import torch

from llmlib.data import encode
from llmlib.generate import sample
from llmlib.interactive import source
from llmlib.interactive.introduction import figure, pack, unpack
from llmlib.model import CausalLM
from llmlib.notebook.experiments.introduction import pocket, round_weights_

pytest.importorskip("playwright")
sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "tools"))
TEXT = "class Café:\n    def spam(self, eggs=3):\n        return eggs * 'ham'\n\n"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """Random weights, large enough that every part matters."""
    torch.manual_seed(0)
    model = CausalLM(pocket()).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.ndim == 2 else weight.copy_(1 + 0.3 * torch.randn_like(weight))
    return round_weights_(model)


@pytest.fixture(scope="module")
def page(model):
    from browser import launched

    with launched() as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
        page.set_content(figure(pack(model)).page())
        module = source("introduction").partition("const LM =")[2].partition("\nexport default")[0]
        page.add_script_tag(content=f"window.LM ={module}")
        page.evaluate("packed => { window.net = LM.load(packed); }", pack(model))
        yield page


def test_pack_keeps_what_six_bits_keep(model):
    again = unpack(pack(model))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=1e-6, atol=1e-8)
    torch.manual_seed(1)
    fresh = CausalLM(pocket())
    kept = round_weights_(CausalLM(pocket()))
    kept.load_state_dict(fresh.state_dict())
    for name, weight in round_weights_(kept).named_parameters():
        error = (weight - fresh.get_parameter(name)).abs()
        step = fresh.get_parameter(name).abs().amax(-1, keepdim=True) / 31
        assert (error <= 0.51 * step).all()


def test_logits_equal_python(model, page):
    tokens = encode(TEXT * 3)[:200]
    with torch.no_grad():
        logits = model(tokens[None])[0]
    for n in (1, 5, 17, 200):
        mine = page.evaluate("bytes => Array.from(LM.follow(net, bytes).logits)", tokens[:n].tolist())
        torch.testing.assert_close(torch.tensor(mine), logits[n - 1], rtol=1e-4, atol=1e-4)
    surprise = page.evaluate("bytes => LM.follow(net, bytes).surprise", tokens.tolist())
    expected = -logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(surprise[1:]), expected, rtol=1e-4, atol=1e-4)


def test_an_edit_is_read_again(model, page):
    page.evaluate("bytes => LM.follow(net, bytes).logits", encode("abcdef").tolist())
    edited = page.evaluate("bytes => Array.from(LM.follow(net, bytes).logits)", encode("abXd").tolist())
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(edited), model(encode("abXd")[None])[0, -1], rtol=1e-4, atol=1e-4)


def test_beyond_the_context_it_reads_the_last_window(model, page):
    tokens = encode(TEXT * 5)[:300]
    logits = page.evaluate("bytes => Array.from(LM.follow(net, bytes).logits)", tokens.tolist())
    with torch.no_grad():
        window = model(tokens[None, 64:])[0, -1]
    torch.testing.assert_close(torch.tensor(logits), window, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 256, 1.0), (0.5, 256, 1.0), (1.0, 3, 1.0), (1.3, 256, 0.6), (0.8, 9, 0.9)]
)
def test_distribution_equals_python(page, temperature, top_k, top_p):
    """What `sample` draws from is seen by handing its multinomial the probabilities."""
    logits = torch.randn(1, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    mine = page.evaluate("([l, t, k, p]) => Array.from(LM.distribution(l, t, k, p))",
                         [logits[0].tolist(), temperature, top_k, top_p])  # fmt: skip
    seen = []

    def watch(probabilities, *_, **__):
        seen.append(probabilities)
        return torch.zeros(1, 1, dtype=torch.long)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", watch)
        sample(logits, temperature, top_k, top_p)
    expected = (seen[0][0] / seen[0][0].sum()).double()
    torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), expected, rtol=1e-4, atol=1e-7)


def test_greedy_and_draws(page):
    assert page.evaluate("LM.distribution([0, 3, 1], 0, 256, 1).indexOf(1)") == 1
    draws = page.evaluate("Array.from({length: 3000}, (_, n) => LM.draw([0.5, 0, 0.2, 0.3], LM.uniform(3, n)))")
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.2, 0.3]), atol=0.03, rtol=0)
    assert shares[1] == 0


def test_the_page_answers(model, page):
    page.get_by_label("text", exact=True).fill("import ")
    first = page.locator(".bars button").first
    with torch.no_grad():
        best = model(encode("import ")[None])[0, -1].argmax().item()
    page.wait_for_function("""document.querySelector('.lm-interactive').lmModel.get('text') === 'import '""")
    page.get_by_label("temperature").first.fill("0")
    page.get_by_role("button", name="Write one byte").click()
    text = page.evaluate("document.querySelector('.lm-interactive').lmModel.get('text')")
    assert text == "import " + chr(best) or best > 127
    first.press("Enter")
    assert len(page.evaluate("document.querySelector('.lm-interactive').lmModel.get('text')")) == len(text) + 1
    page.get_by_role("button", name="Write 100 bytes").click()
    page.wait_for_function("document.querySelector('.lm-interactive').lmModel.get('text').length >= 108")
    page.get_by_role("button", name="Start again").click()
    page.wait_for_function(
        "document.querySelector('.lm-interactive').lmModel.get('text').startsWith('    def __init__')"
    )


def test_live_figure_is_a_widget_with_traits(model):
    live = figure(pack(model), live=True, temperature=1.5)
    seen = []
    live.observe(lambda change: seen.append(change["new"]), "text")
    live.text = "def "
    assert seen == ["def "]
    assert live.temperature == 1.5
