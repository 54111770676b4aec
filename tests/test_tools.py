"""The commands behind make: what they say when something is missing, and a small book built with them."""

import builtins
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "book" / "tools"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"book_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_venv_module_is_named_with_its_package(monkeypatch):
    real = builtins.__import__

    def without_ensurepip(name, *args):
        if name == "ensurepip":
            raise ImportError(name)
        return real(name, *args)

    environment = tool("environment")
    monkeypatch.setattr(builtins, "__import__", without_ensurepip)
    reason = environment.missing_venv()
    assert "ensurepip" in reason
    assert f"apt install python{sys.version_info.major}.{sys.version_info.minor}-venv" in reason


def test_the_environment_depends_on_the_pins(tmp_path, monkeypatch):
    environment = tool("environment")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    before = environment.fingerprint()
    (tmp_path / "requirements.txt").write_text("one-more==1.0\n")
    assert environment.fingerprint() != before


def test_without_a_browser_the_run_ends_with_the_remedy(monkeypatch):
    browser = tool("browser")
    monkeypatch.setattr(browser, "found", lambda: None)
    monkeypatch.setattr(browser, "install", lambda: None)
    with pytest.raises(SystemExit, match="apt install chromium.*playwright install chromium.*BOOK_BROWSER"):
        browser.executable()


def test_a_taken_port_gives_the_next_one(tmp_path):
    site = tool("site")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = site.server(tmp_path, port=port)
        assert port < server.server_port < port + 50
        server.server_close()


def test_processes_that_complete_the_site_wait_for_the_one_that_builds(tmp_path, monkeypatch):
    site, builds = tool("site"), []

    def slow_build(source, output):
        builds.append(output)
        index = output / "_build" / "html" / "index.html"
        index.parent.mkdir()  # twice at once is an error, as it is for the real build
        index.touch()
        time.sleep(0.2)
        index.write_text("whole")

    monkeypatch.setattr(site, "_build", slow_build)

    def complete(_) -> str:
        site.build(tmp_path, tmp_path, anew=False)
        return (tmp_path / "_build" / "html" / "index.html").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(complete, range(4))) == {"whole"}
    assert len(builds) == 1


def test_an_unknown_experiment_names_the_known_ones():
    record = tool("record")
    assert record.script("09-scaling").name == "scaling.py"
    with pytest.raises(SystemExit, match="'nothing' has no experiment; name one of .*scaling"):
        record.script("nothing")


def test_an_address_is_written_into_set_up_cells(tmp_path, monkeypatch):
    address = tool("address")
    monkeypatch.setattr(address, "ROOT", tmp_path)
    (tmp_path / "chapters").mkdir()
    notebook = tmp_path / "chapters" / "00-a.ipynb"
    notebook.write_text('%pip install --no-deps "git+https://github.com/OWNER/REPOSITORY"')
    assert address.write("someone/a-book") == [notebook]
    assert "git+https://github.com/someone/a-book" in notebook.read_text()
    with pytest.raises(SystemExit, match="owner/name"):
        address.write("someone")


def cell(kind: str, text: str) -> dict:
    bare = {"cell_type": kind, "id": f"c{abs(hash(text)) % 10**6}", "metadata": {}, "source": text}
    return bare | ({"execution_count": 1, "outputs": []} if kind == "code" else {})


def small_book(folder: Path, text: str) -> Path:
    """The book with one chapter in place of its own."""
    for name in ("book", "llmlib", "_config.yml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "chapters").mkdir()
    cells = [cell("markdown", f"# A chapter\n\n{text}"), cell("code", "# git+https://github.com/OWNER/REPOSITORY")]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "chapters" / "07-small.ipynb").write_text(json.dumps(content))
    pages = ("chapters/07-small", "book/notation", "book/bibliography", "book/api/index")
    toc = ["format: jb-book", "root: book/glossary", "chapters:", *(f"  - file: {page}" for page in pages)]
    (folder / "_toc.yml").write_text("\n".join(toc))
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("jupyter-book"), "build", folder, "-W", "--keep-going", "-n", "-q"]
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("BOOK_", "GITHUB_"))}
    return subprocess.run(command, env=bare | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_buttons_appear_when_the_repository_is_known_and_only_then(tmp_path):
    folder = small_book(tmp_path, r"A [citation](https://arxiv.org/abs/1706.03762v5), and $x^2$. $$y = x$$ (eq-y)")
    page = folder / "_build" / "html" / "chapters" / "07-small.html"
    build(folder, BOOK_REPOSITORY_URL="https://github.com/someone/a-book", BOOK_SITE_URL="https://a.book/x")
    known = page.read_text()
    assert "https://colab.research.google.com/github/someone/a-book/blob/main/chapters/07-small.ipynb" in known
    assert "git+https://github.com/someone/a-book" in known
    assert 'rel="canonical" href="https://a.book/x/chapters/07-small.html"' in known
    assert "https://a.book/x/bibliography.html" in (folder / "_build/html/sitemap.xml").read_text()
    assert 'class="citation-link' in known
    assert 'title="Attention Is All You Need"' in known
    assert "../bibliography.html#" in known
    assert "Chapter 7" in known
    shutil.rmtree(folder / "_build")
    build(folder)
    unknown = page.read_text()
    assert "colab.research.google.com" not in unknown
    assert "OWNER/REPOSITORY" in unknown
    assert not (folder / "_build/html/sitemap.xml").exists()


@pytest.mark.slow
def test_a_paper_that_is_not_in_the_bibliography_fails_the_build(tmp_path):
    done = build(small_book(tmp_path, "An [unknown paper](https://arxiv.org/abs/9912.99999)."))
    assert done.returncode != 0
    assert "arXiv:9912.99999 is cited but not in references.bib" in done.stderr + done.stdout
