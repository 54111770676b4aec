"""embed, widget and the toolkit that every interactive figure draws with."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import llmlib.interactive as interactive
from llmlib.errors import ConfigError

pytest.importorskip("playwright")
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "book" / "tools"))

ROOT = "document.querySelector('.lm-interactive').firstElementChild.shadowRoot"
PROBE = """export default { render({ model, el }) {
  window.lm = lm;
  const ui = lm.panel(el, { title: "Probe" });
  const knob = lm.bind(model, "size", lm.slider({ label: "size", min: 1e3, max: 1e15, log: true }));
  const steps = lm.bind(model, "steps", lm.slider({ label: "steps", min: 0, max: 10, step: 1 }));
  const kind = lm.bind(model, "kind", lm.segmented({ label: "kind", options: [["a", "A"], ["b", "B"]] }));
  const on = lm.bind(model, "on", lm.toggle({ label: "on" }));
  const chart = lm.chart({ label: "weights", height: 200, x: { domain: [0, 10], label: "x" }, y: { domain: [0, 1] },
    draw(p) { p.line([[0, 0], [10, 1]], { color: "blue" });
      p.handle("steps", { x: model.get("steps"), label: "steps on the chart",
        move: x => lm.put(model, { steps: Math.round(x) }),
        nudge: dx => lm.put(model, { steps: model.get("steps") + dx }) }); } });
  ui.controls.append(knob.el, steps.el, kind.el, on.el); ui.body.append(chart.el);
  return lm.live(model, ui, () => { chart.redraw(); ui.say(`${lm.si(model.get("size"))} ${model.get("kind")}`); });
} };
"""
START = {"size": 7e10, "steps": 3, "kind": "a", "on": False}


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A folder of views that holds the toolkit and one small view."""
    folder = tmp_path / "interactive"
    folder.mkdir()
    (folder / "common.js").write_text((interactive.FOLDER / "common.js").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "probe.js").write_text(PROBE)
    (tmp_path / "palette.json").write_text((interactive.FOLDER.parent / "palette.json").read_text())
    monkeypatch.setattr(interactive, "FOLDER", folder)
    interactive.source.cache_clear()
    yield folder
    interactive.source.cache_clear()


@pytest.fixture(scope="module")
def chromium():
    from browser import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def page(chromium):
    context = chromium.new_context(viewport={"width": 700, "height": 700})
    opened, troubles = context.new_page(), []
    opened.on("console", lambda message: troubles.append(message.text))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    yield opened
    context.close()
    assert troubles == []


def show(page, *figures):
    page.set_content(figures[0].page().replace("</main>", "".join(f._repr_html_() for f in figures[1:]) + "</main>"))
    page.wait_for_selector(".say")


def get(page, key, nth=0):
    return page.evaluate("([k, n]) => document.querySelectorAll('.lm-interactive')[n].lmModel.get(k)", [key, nth])


def test_arrays_tensors_and_numbers_arrive(probe):
    html = interactive.embed("probe", {"a": np.eye(2), "b": torch.tensor([1.5]), "c": np.float64(2), "d": "</script>"})
    state = html._repr_html_().partition('<script type="application/json">')[2].partition("</script>")[0]
    assert json.loads(state) == {"a": [[1, 0], [0, 1]], "b": [1.5], "c": 2, "d": "</script>"}


def test_the_html_is_reproducible_and_needs_no_network(probe):
    html = interactive.embed("probe", START)._repr_html_()
    assert html == interactive.embed("probe", START)._repr_html_()
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "run this cell" in html


def test_bad_names_and_data_are_refused(probe):
    with pytest.raises(ConfigError, match="no interactive is called 'nope': there are probe"):
        interactive.embed("nope")
    with pytest.raises(ConfigError, match="can't be written as JSON"):
        interactive.embed("probe", {"x": float("nan")})._repr_html_()
    with pytest.raises(ConfigError, match="got a set"):
        interactive.embed("probe", {"x": {1}})._repr_html_()
    (probe / "broken.js").write_text("const view = 1;")
    with pytest.raises(ConfigError, match="one line that starts with 'export default', but has 0"):
        interactive.embed("broken")._repr_html_()


def test_typed_dragged_and_keyed(probe, page):
    show(page, interactive.embed("probe", START))
    box = page.get_by_role("textbox", name="size")
    assert box.input_value() == "70B"
    for text, value in (("1.4T", 1.4e12), ("5.76e14", 5.76e14), ("10^9", 1e9), ("2.5×10⁴", 2.5e4), ("1,000,000", 1e6)):
        box.fill(text)
        assert get(page, "size") == value
    box.fill("many")
    assert box.get_attribute("aria-invalid") == "true"
    box.press("Tab")
    assert box.input_value() == "1M"
    page.locator("input[type=range]").nth(1).press("ArrowRight")
    assert get(page, "steps") == 4
    page.get_by_role("slider", name="steps on the chart").press("ArrowRight")
    page.get_by_role("slider", name="steps on the chart").press("ArrowRight")
    assert get(page, "steps") == 6
    page.get_by_label("B", exact=True).check()
    page.get_by_label("on", exact=True).check()
    assert (get(page, "kind"), get(page, "on")) == ("b", True)
    page.wait_for_function(f"{ROOT}.querySelector('.say').textContent == '1M b'")


def test_two_figures_on_a_page_do_not_share_their_state(probe, page):
    show(page, interactive.embed("probe", START), interactive.embed("probe", START | {"size": 1e6}))
    page.get_by_role("textbox", name="size").nth(1).fill("2M")
    assert (get(page, "size", 0), get(page, "size", 1)) == (7e10, 2e6)


def test_jupyterlab_keeps_its_shortcuts_to_itself(probe, page):
    show(page, interactive.embed("probe", START))
    assert (
        page.evaluate("document.querySelector('.lm-interactive').firstElementChild.dataset.lmSuppressShortcuts")
        == "true"
    )


@pytest.mark.parametrize(
    ("where", "attribute", "dark", "light"),
    [("documentElement", "data-theme", "dark", "light"), ("documentElement", "theme", "dark", "light"),
     ("body", "data-jp-theme-light", "false", "true"),
     ("body", "data-vscode-theme-kind", "vscode-dark", "vscode-light")],
)  # fmt: skip
def test_every_hosts_dark_mode_is_followed(probe, page, where, attribute, dark, light):
    show(page, interactive.embed("probe", START))
    for value, wanted in ((dark, True), (light, False)):
        page.evaluate(f"document.{where}.setAttribute('{attribute}', '{value}')")
        page.wait_for_function(f"{ROOT}.querySelector('.lm').classList.contains('dark') === {str(wanted).lower()}")


def test_a_widget_has_typed_traits_that_observe_and_link(probe):
    import ipywidgets
    import traitlets

    box = interactive.widget("probe", **START, matrix=torch.eye(2))
    assert isinstance(box, ipywidgets.DOMWidget)
    assert box._esm == interactive.source("probe")
    assert box.matrix == [[1, 0], [0, 1]]
    seen = []
    box.observe(lambda change: seen.append(change.new), names="size")
    box.size = 1e12
    assert seen == [1e12]
    with pytest.raises(traitlets.TraitError):
        box.size = "large"
    slider = ipywidgets.FloatSlider(max=10)
    ipywidgets.link((slider, "value"), (box, "steps"))
    slider.value = 7
    assert box.steps == 7
    ipywidgets.jslink((slider, "value"), (box, "steps")).unlink()


def test_refresh_brings_a_notebooks_script_up_to_date(probe, tmp_path):
    html = interactive.embed("probe", START)._repr_html_()
    cell = {"cell_type": "code", "outputs": [{"data": {"text/html": html.splitlines(keepends=True)}}]}
    notebook = tmp_path / "x.ipynb"
    notebook.write_text(json.dumps({"cells": [cell]}))
    assert not interactive.refresh(notebook)
    (probe / "probe.js").write_text(PROBE.replace("weights", "shares"))
    interactive.source.cache_clear()
    assert interactive.refresh(notebook)
    stored = "".join(json.loads(notebook.read_text())["cells"][0]["outputs"][0]["data"]["text/html"])
    assert stored == interactive.embed("probe", START)._repr_html_()


NOTEBOOKS = sorted(REPOSITORY.glob("chapters/*.ipynb")) + sorted(REPOSITORY.glob("book/*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_the_current_scripts(notebook, tmp_path):
    copy = tmp_path / notebook.name
    copy.write_bytes(notebook.read_bytes())
    assert not interactive.refresh(copy), f"run: python -m llmlib.interactive {notebook.relative_to(REPOSITORY)}"
