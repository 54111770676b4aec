"""The chapters' tools: figures that are the same on every run, checks that refuse, exercises, records, tables."""

import importlib
import io
import json
import pkgutil

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

from llmlib import notebook
from llmlib.errors import ConfigError
from llmlib.moe import Routing, RoutingStatistics, route
from llmlib.notebook import exercises, records, tables


@pytest.fixture(autouse=True)
def fresh_style():
    notebook.style()
    yield
    plt.close("all")
    mpl.rcdefaults()


def double(x):
    return 2 * x


def test_check_accepts_equal_functions_and_prints_one_line(capsys):
    notebook.check(double, lambda x: x + x, torch.randn(3, 2, dtype=torch.float64))
    assert capsys.readouterr().out == "✓ double = <lambda>: outputs and gradients agree to 1e-10\n"


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        (lambda x: 4 * x, "2 times the right one"),
        (lambda x: 2 * x[:1], "has shape (1, 2), but should have (3, 2)"),
        (lambda x: (2 * x).float(), "has dtype torch.float32"),
        (lambda x: 2 * x.detach(), "no gradient flows through yours"),
        (lambda x: 2 * x + x - x.detach(), "gradient with respect to input 0"),
        (lambda _: None, "returned nothing"),
        (lambda x: torch.where(x > 0, 2 * x, torch.nan), "not a number"),
    ],
)
def test_check_says_what_differs(wrong, complaint):
    with pytest.raises(AssertionError, match=complaint.replace("(", r"\(").replace(")", r"\)")):
        notebook.check(wrong, double, torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, 6.0]], dtype=torch.float64))


def test_check_compares_tensors():
    notebook.check(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="1 of 2 places"):
        notebook.check(torch.ones(2), torch.tensor([1.0, 2.0]))


def passed() -> RoutingStatistics:
    """Four tokens, of two experts the first wanted by three of them, and room for two."""
    logits = torch.tensor([[2.0, 0.0]] * 3 + [[0.0, 2.0]])
    wanted = Routing.of(logits, *route(logits, 1))
    return RoutingStatistics.of(wanted, wanted.limited(2))


def test_loads_of_experts_stand_against_an_even_one(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    notebook.expert_loads({"layer 3": passed()})
    (ax,) = plt.gcf().axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([3 / 4, 1 / 4, 2 / 4, 1 / 4])
    assert ax.lines[0].get_ydata() == pytest.approx([0.5, 0.5])
    assert ax.get_title() == "layer 3\nMaxVio 0.50, entropy 0.37 of 0.69, 25.0% dropped"


def svg() -> str:
    out = io.StringIO()
    plt.savefig(out, format="svg", metadata={"Date": None})
    plt.close()
    return out.getvalue()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: notebook.heatmap({"a": torch.eye(4), "b": torch.ones(4, 4)}, list("abcd"), list("abcd")),
        lambda: notebook.heatmap(torch.eye(3) - 0.5, signed=True),
        lambda: notebook.lines([1, 2, 4], {"one": [1, 2, 3], "two": [3, 2, 1]}, xlabel="x", ylabel="y", log="x"),
        lambda: notebook.expert_loads({"first": passed(), "second": passed(), "third": passed()}),
        lambda: notebook.boxes({"a": (1, 1, "a", "blue"), "b": (4, 1, "b", "")}, [("a", "b", "to")]),
    ],
    ids=["heatmaps", "signed", "lines", "experts", "boxes"],
)
def test_figures_are_the_same_on_every_run_and_have_no_background(draw, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    drawn = []
    for _ in range(2):
        draw()
        drawn.append(svg())
    assert drawn[0] == drawn[1]
    assert "fill: #ffffff" not in drawn[0] and "dc:date" not in drawn[0] and "<text" not in drawn[0]


def test_axes_are_readable_on_white_and_on_dark():
    def luminance(colour):
        rgb = mpl.colors.to_rgb(colour)
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ink = luminance(notebook.colours()["ink"])
    assert 1.05 / (ink + 0.05) > 4 and (ink + 0.05) / (luminance("#14181e") + 0.05) > 4


def test_style_uses_one_thread_and_fixes_the_seed():
    notebook.style()
    first = torch.rand(3)
    notebook.style()
    assert torch.equal(first, torch.rand(3)) and torch.get_num_threads() == 1


def test_table_is_text_and_html(monkeypatch):
    shown = {}
    monkeypatch.setattr(tables, "_display", lambda **forms: shown.update(forms))
    notebook.table([{"model": "a<b", "size": 12345}, {"model": "c", "size": 7}], caption="Sizes")
    assert "a&lt;b" in shown["html"] and "<caption>Sizes</caption>" in shown["html"]
    assert '<td style="text-align:right">7</td>' in shown["html"] and '<td style="text-align:left">c' in shown["html"]
    assert shown["text"].splitlines() == ["model  size", "─────  ──────", "a<b    12\u202f345", "c      7", "Sizes"]


def test_matrix_shades_by_size_and_sign(monkeypatch):
    shown = {}
    monkeypatch.setattr(tables, "_display", lambda **forms: shown.update(forms))
    notebook.matrix(torch.tensor([[1.0, -0.5], [0.0, float("-inf")]]))
    blue, orange = notebook.colours()["blue"], notebook.colours()["orange"]
    assert f"background:{blue}73" in shown["html"] and f"background:{orange}39" in shown["html"]
    assert "−0.50" in shown["text"] and "−inf" in shown["text"]


def test_show_gives_the_source_with_one_line_of_docstring(capsys):
    notebook.show(exercises.verdict)
    out = capsys.readouterr().out
    assert out.startswith("# llmlib.notebook.exercises\ndef verdict(") and 'or None when it is right."""' in out
    notebook.show(records.recording)
    assert "interrupted" not in capsys.readouterr().out
    notebook.show(records.recording, docstring=True)
    assert "interrupted" in capsys.readouterr().out


def test_recording_resumes_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_REPOSITORY", tmp_path)
    monkeypatch.setattr(records, "provenance", lambda command: {"command": command})
    calls = []

    def measure(i):
        calls.append(i)
        if i == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return i * 10

    for _ in range(2):
        try:
            with notebook.recording("try", command="make record") as record:
                for i in range(3):
                    record(f"run {i}", lambda i=i: measure(i))
        except KeyboardInterrupt:
            assert json.loads((tmp_path / "try.json").read_text())["results"] == {"run 0": 0}
    assert calls == [0, 1, 1, 2] and not list(tmp_path.glob("*.partial"))
    assert notebook.recorded("try") == {
        "run 0": 0, "run 1": 10, "run 2": 20, "provenance": {"command": "make record"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="nothing is recorded as 'other'"):
        notebook.recorded("other")


def test_full_size_says_when_nothing_is_measured_and_shows_what_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "_REPOSITORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notebook.full_size("01-attention", pytest.fail)
    assert "Not yet measured" in capsys.readouterr().out
    with notebook.recording("full-size-01-attention", command="c") as record:
        record("rows", lambda: [{"length": 8192, "ms": 1.25}])
    notebook.full_size("01-attention", pytest.fail)
    out = capsys.readouterr().out
    assert "1.25" in out and "Recorded on" in out and "by c" in out


CHAPTERS = [m.name for m in pkgutil.iter_modules(exercises.__path__)]
REFUSED = [
    (chapter, name, i)
    for chapter in CHAPTERS
    for name, answers in importlib.import_module(f"llmlib.notebook.exercises.{chapter}").WRONG.items()
    for i in range(len(answers))
]


@pytest.mark.parametrize("chapter, name, i", REFUSED)
def test_checkers_refuse_wrong_answers(chapter, name, i):
    answer = importlib.import_module(f"llmlib.notebook.exercises.{chapter}").WRONG[name][i]
    assert notebook.verdict(f"{chapter}/{name}", answer)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_exercise_has_wrong_answers_to_refuse(chapter):
    module = importlib.import_module(f"llmlib.notebook.exercises.{chapter}")
    assert module.WRONG.keys() == exercises.checkers(chapter).keys()


def test_exercise_names_what_it_does_not_know():
    with pytest.raises(ConfigError, match="no chapter called 'nowhere'"):
        notebook.exercise("nowhere/thing", None)
