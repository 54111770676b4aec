"""Chapter 01's interactive: its numbers are the library's."""

import random
import sys
from pathlib import Path

import pytest
import torch

from llmlib.interactive import source
from llmlib.interactive.attention import START, figure, weights

pytest.importorskip("playwright")
sys.path.insert(0, str(Path(__file__).parents[1] / "book" / "tools"))


@pytest.fixture(scope="module")
def chromium():
    from browser import launched

    with launched() as browser:
        yield browser


def states(count: int) -> list[dict]:
    rng = random.Random(0)
    pairs = lambda: [[round(rng.uniform(-3, 3), 2) for _ in range(2)] for _ in START["tokens"]]  # noqa: E731
    masks = ("none", "causal", "window")
    return [
        START
        | {"q": pairs(), "k": pairs(), "temperature": 10 ** rng.uniform(-1, 1), "mask": rng.choice(masks)}
        | {"sink": rng.random() < 0.5, "sink_logit": rng.uniform(-4, 6)}
        for _ in range(count)
    ]  # fmt: skip


def test_weights_equal_python_and_the_view_answers_to_the_keyboard(chromium):
    page = chromium.new_page()
    page.set_content(figure(sink=True).page())
    formula = source("attention").partition("const softmaxRow")[2].partition("const KEYS")[0]
    page.add_script_tag(content=f"window.softmaxRow{formula}")
    for state in states(200):
        rows = page.evaluate("s => s.tokens.map((_, i) => softmaxRow(s, i))", state)
        torch.testing.assert_close(torch.tensor(rows, dtype=torch.float64), weights(state), rtol=1e-9, atol=1e-12)

    said = page.locator(".say").inner_text()
    share = 100 * weights(START | {"sink": True})[2].max().item()
    assert f"{share:.1f} %" in said
    page.get_by_label("temperature").first.fill("10")
    page.get_by_label("temperature").first.press("Enter")
    share = 100 * weights(START | {"sink": True, "temperature": 10})[2].max().item()
    page.wait_for_function(f"document.querySelector('.lm-interactive').firstElementChild.shadowRoot.querySelector('.say')"
                           f".textContent.includes('{share:.1f} %')")  # fmt: skip
    page.get_by_role("slider", name="key of cat").press("ArrowLeft")
    moved = page.evaluate("document.querySelector('.lm-interactive').lmModel.get('k')[1]")
    assert moved == [pytest.approx(START["k"][1][0] - 0.1), START["k"][1][1]]


def test_live_figure_is_a_widget_with_traits():
    live = figure(live=True, temperature=2.0)
    seen = []
    live.observe(lambda change: seen.append(change["new"]), "temperature")
    live.temperature = 3.0
    assert seen == [3.0] and live.tokens == START["tokens"]
