"""Block diagrams, outlines and differences say what the configs say."""

import re
import xml.etree.ElementTree as ET

import pytest

from llmlib import presets
from llmlib.attention import Attention
from llmlib.diagram import diagram, difference, difference_table, outline, runs
from llmlib.ffn import MLP, SwiGLU
from llmlib.model import Layer, ModelConfig, spec
from llmlib.norm import RMSNorm

A = Layer(spec(Attention, num_heads=4), spec(SwiGLU, d_ff=64))
B = Layer(spec(Attention, num_heads=4, window=16), spec(SwiGLU, d_ff=64))


def config(*layers, **changes):
    return ModelConfig(vocab_size=61, d_model=32, norm=spec(RMSNorm), layers=layers).replace(**changes)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((A, A, A), [((A,), 3)]),
        ((A, B, A, B), [((A, B), 2)]),
        ((B, B, A, B, B, A), [((B, B, A), 2)]),
        ((A, A, B, B, B), [((A,), 2), ((B,), 3)]),
        ((A, B, B), [((A,), 1), ((B,), 2)]),
        ((A,), [((A,), 1)]),
        ((), []),
    ],
)
def test_runs_find_the_pattern(layers, expected):
    assert runs(layers) == expected
    assert tuple(layer for pattern, count in runs(layers) for layer in pattern * count) == layers


@pytest.mark.parametrize(
    "shape",
    [
        config(A, A, B),
        config(*(Layer(A.mixer, A.ffn, parallel=True, parallel_norms=n) for n in (1, 2))),
        config(*(Layer(A.mixer, A.ffn, placement=p) for p in ("post", "inside", "sandwich"))),
        presets.get("gpt2"),
        presets.get("llama-3.1-8b"),
    ],
)
def test_diagrams_are_drawn_inside_their_frame(shape):
    root = ET.fromstring(str(diagram(shape)))
    _, _, width, height = map(float, root.get("viewBox").split())
    text = " ".join(root.itertext())
    for pattern, count in runs(shape.layers):
        assert count == 1 or f"× {count}" in text
        for layer in pattern:
            for part in (layer.mixer, layer.ffn):
                assert part.cls.__name__ in text
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for label in root.iter("{http://www.w3.org/2000/svg}text"):
        assert float(label.get("y")) <= height
    assert f"{shape.vocab_size:,}" in text


def test_colours_come_from_the_page_or_the_palette():
    """So that a diagram reads on a light and on a dark page: no black, no white."""
    from llmlib.diagram import PALETTE

    used = set(re.findall(r'(?:fill|stroke)="([^"]+)"', str(diagram(presets.get("gpt2")))))
    assert used <= {"currentColor", "none", *PALETTE.values()}


def test_notebooks_show_a_drawing_and_files_hold_it(tmp_path):
    drawing = diagram(config(A))
    assert str(drawing) in drawing._repr_html_()
    drawing.save(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == str(drawing)


def test_outline_is_the_same_flow_in_words():
    lines = outline(config(A, A, B, tie_embeddings=True))
    assert lines[0] == "embedding  61 × 32"
    assert "2 ×" in lines
    assert any("window 16" in line for line in lines)
    assert lines[-1] == "head, tied to the embedding"


def test_difference_names_each_option_once():
    rows = difference(presets.get("llama-2-7b"), presets.get("llama-3-8b"))
    assert ("vocab_size", "32,000", "128,256") in rows
    assert ("mixer.num_kv_heads", "32", "8") in rows
    assert ("ffn.d_ff", "11,008", "14,336") in rows
    assert len(rows) == len(set(rows)) == 5
    assert difference(config(A), config(A, name="b")) == []


def test_an_option_left_out_is_its_default():
    one, other = spec(MLP, d_ff=8), spec(MLP, d_ff=8, bias=True)
    assert difference(config(Layer(ffn=one)), config(Layer(ffn=other))) == []
    rows = difference(config(Layer(ffn=one)), config(Layer(ffn=other.replace(bias=False))))
    assert rows == [("ffn.bias", "True", "False")]


def test_difference_of_patterns_and_lengths():
    rows = dict((what, (a, b)) for what, a, b in difference(config(A, A, A), config(A, B, A, B)))
    assert rows["number of layers"] == ("3", "4")
    assert "2 × (" in rows["pattern of layers"][1]
    assert rows["mixer.window"] == ("—", "16")


def test_difference_table_holds_every_row():
    one, other = presets.get("gpt2"), presets.get("llama-3-8b")
    text = list(ET.fromstring(str(difference_table(one, other))).itertext())
    for row in difference(one, other):
        assert all(cell in text for cell in row)
