"""What holds for the whole repository: notebooks that ran, names defined once, options that are set, pages listed."""

import ast
import json
import re
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median, quantiles

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted([*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("book/*.ipynb")])
CHAPTERS = [path for path in NOTEBOOKS if path.parent.name == "chapters"]
MODULES = sorted((ROOT / "llmlib").rglob("*.py"))
BOXES = {
    "predict", "objectives", "prerequisites", "symbols", "takeaway", "misconception", "exercise", "fullsize",
}  # fmt: skip
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|Users|work)/[\w./-]+|site-packages/[\w/]+\.py")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]+|\[?<matplotlib|\bText\(|<Axes|<Figure|\bArtist\b")
COLOUR = re.compile(r"""["']#[0-9a-fA-F]{3,8}["']|\bcolor=["'](?!none|currentcolor|inherit|k["']|w["'])[a-z]+["']""")
notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict]:
    found = json.loads(path.read_text())["cells"]
    return [cell | {"text": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


def outputs(cell: dict) -> list[str]:
    """The text of what a cell shows."""
    data = [output.get("data", {}).get("text/plain", output.get("text", "")) for output in cell["outputs"]]
    return ["".join(text) for text in data]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


# --- notebooks --------------------------------------------------------------------------------------------------------


@notebook
def test_every_cell_was_run_in_order_from_a_fresh_kernel(path):
    counts = [cell["execution_count"] for cell in cells(path) if cell["text"].strip()]
    assert counts == list(range(1, len(counts) + 1)), "nbval compares nothing in a cell that was never run"


@notebook
def test_no_output_is_an_error(path):
    for cell in cells(path):
        errors = [output["evalue"] for output in cell["outputs"] if output["output_type"] == "error"]
        assert not errors or "raises-exception" in tags(cell), errors


@notebook
def test_metadata_is_bare_and_names_no_machine(path):
    content = json.loads(path.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}
    assert set(content["metadata"]["language_info"]) == {"name"}
    assert not MACHINE.findall(path.read_text())
    assert path.stat().st_size < 1_000_000
    assert all(cell.get("id") for cell in content["cells"]), "cells need stable ids"


@notebook
def test_outputs_show_no_repr(path):
    for cell in cells(path):
        for text, output in zip(outputs(cell), cell["outputs"], strict=True):
            if set(output.get("data", {})) & {"image/svg+xml", "image/png", "text/html"}:
                continue  # shown instead of the text
            assert not ADDRESS.search(text), f"end the cell with a semicolon or without a value:\n{cell['text'][-200:]}"


@notebook
def test_figures_have_alternative_text(path):
    for cell in cells(path):
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        if kinds & {"image/svg+xml", "image/png"}:
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 20, f"mystnb: {{image: {{alt: …}}}} is missing or too short for\n{cell['text'][:200]}"


@chapter
def test_cells_are_short(path):
    lengths = [len(cell["text"].splitlines()) for cell in cells(path)]
    assert median(lengths) <= 8
    assert quantiles(lengths, n=10)[-1] <= 25


@notebook
def test_colours_come_from_the_palette(path):
    for cell in cells(path):
        assert not COLOUR.search(cell["text"]), f"take it from llmlib.notebook.colours():\n{cell['text'][:300]}"


@chapter
def test_boxes_are_known_and_labelled(path):
    text = "\n\n".join(cell["text"] for cell in cells(path, "markdown"))
    kinds = re.findall(r'<div class="box (\w+)">', text)
    assert set(kinds) <= BOXES
    assert {"predict", "objectives", "prerequisites", "symbols", "exercise"} <= set(kinds)
    assert text.count("<div") == text.count("</div>")
    starts = re.findall(r'<div class="box \w+">\n(.*)\n', text)
    assert all(line == "" for line in starts), "a blank line after the <div> makes its inside Markdown"


@chapter
def test_a_chapter_sets_itself_up_on_colab(path):
    """The first cell installs llmlib where it is missing, with --no-deps, and pins no package of Colab's."""
    first = cells(path)[0]["text"]
    assert "find_spec" in first and "llmlib" in first and "--no-deps" in first
    assert not re.search(r"(torch|numpy)\s*[=<>~]=", first)


@chapter
def test_exercises_are_complete(path):
    text = "\n\n".join(cell["text"] for cell in cells(path, "markdown"))
    exercises = len(re.findall(r'<div class="box exercise">', text))
    solutions = sum("solution" in tags(cell) and "hide-input" in tags(cell) for cell in cells(path))
    assert 6 <= exercises <= 8
    assert solutions >= exercises
    assert text.count("<summary>Hint") >= exercises


# --- names ------------------------------------------------------------------------------------------------------------


def definitions(source: str) -> set[str]:
    """Public functions and classes at the top of a source text; lines of shell and magics are left out."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        return set()  # a cell whose whole body was a magic
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def test_a_name_is_defined_once_in_the_book():
    where = defaultdict(set)
    for module in MODULES:
        if "exercises" in module.parts or "experiments" in module.parts:
            continue  # answers to the exercises, and a chapter's own experiment
        for name in definitions(module.read_text()):
            where[name].add(module.relative_to(ROOT).as_posix())
    package = set(where)
    for path in CHAPTERS:
        for cell in cells(path):
            if "solution" in tags(cell):
                continue
            for name in definitions(cell["text"]):
                where[name].add(path.stem)
    twice = {name: sorted(places) for name, places in where.items() if len(places) > 1}
    twice = {name: places for name, places in twice.items() if name not in package or any("-" in p for p in places)}
    assert not twice, "a chapter shows the library's code; it doesn't define it again"


def options(module: Path) -> list[tuple[str, ast.arg]]:
    """Keyword-only parameters with a default, each with its function's name."""
    functions = (node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef))
    return [
        (function.name, argument)
        for function in functions
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        if default is not None
    ]


def test_no_option_that_nothing_sets():
    """Each is set somewhere by name: in a preset, a chapter, a table, a test."""
    files = [*MODULES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("book/**/*.py")]
    texts = [path.read_text() for path in files]
    text = "\n".join([*texts, *(cell["text"] for path in NOTEBOOKS for cell in cells(path))])
    used = Counter(re.findall(r"\b(\w+)=(?!=)", text)) + Counter(re.findall(r"[\"'](\w+)[\"']", text))
    unset = []
    for module in MODULES:
        for function, argument in options(module):
            declarations = 0 if argument.annotation else 1
            if used[argument.arg] <= declarations:
                unset.append(f"{module.relative_to(ROOT)}: {function}({argument.arg}=…)")
    assert not unset, "an option that nothing sets is not needed:\n" + "\n".join(unset)


# --- the site's sources -----------------------------------------------------------------------------------------------


def listed() -> set[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return {toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])}


def test_the_contents_list_what_there_is():
    for name in listed():
        assert any((ROOT / f"{name}{suffix}").exists() for suffix in (".md", ".ipynb")), name
    for path in NOTEBOOKS:
        assert path.relative_to(ROOT).with_suffix("").as_posix() in listed(), f"{path.name} is not in _toc.yml"


def test_every_module_is_in_the_reference():
    text = "\n".join(path.read_text() for path in ROOT.glob("book/api/*.md"))
    documented = set(re.findall(r"automodule:: llmlib\.(\w+)", text))
    there = {p.stem if p.is_file() else p.name for p in (ROOT / "llmlib").iterdir() if not p.name.startswith("_")}
    modules = {n for n in there if (ROOT / f"llmlib/{n}.py").exists() or (ROOT / f"llmlib/{n}/__init__.py").exists()}
    assert modules == documented, "book/api/*.md lists the modules"


def test_references_are_in_order_and_have_an_address():
    text = (ROOT / "book" / "references.bib").read_text()
    keys = re.findall(r"^@\w+\{([^,]+),", text, re.M)
    assert keys == sorted(keys)
    assert len(keys) == len(set(keys))
    for entry in text.split("\n@")[1:]:
        assert re.search(r"^\s*(eprint|url)\s*=", entry, re.M), entry.partition(",")[0]
        assert re.search(r"^\s*title\s*=", entry, re.M), entry.partition(",")[0]


def test_the_repository_is_small_and_names_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    paths = [ROOT / name for name in files if name and (ROOT / name).is_file()]
    assert all(path.stat().st_size < 1_000_000 for path in paths)
    for path in paths:
        if path.suffix in {".md", ".toml", ".yml", ".yaml", ".cff", ".json", ".js", ".css", ".bib"}:
            assert not MACHINE.findall(path.read_text()), path


def test_the_site_loads_nothing_from_third_parties():
    for path in [*ROOT.glob("book/assets/*"), *ROOT.glob("book/templates/**/*.html"), *ROOT.glob("llmlib/**/*.js")]:
        for address in re.findall(r"""(?:src|href|import|url)\s*[=(]?\s*["'(](https?://[^"')]+)""", path.read_text()):
            pytest.fail(f"{path.relative_to(ROOT)} loads {address}")
