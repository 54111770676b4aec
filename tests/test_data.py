"""The corpus is the same on every run, batches are windows of it, and a bad source says what to do."""

import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlib import data
from llmlib.data import IGNORED, CorpusError, batch, batches, evaluation_batches, load_corpus


def lay_out(*texts: str) -> data.Split:
    return data._lay_out("texts", "train", {str(i): t.encode() for i, t in enumerate(texts)})


# --- the standard library ---------------------------------------------------------------------------------------------


def test_standard_library_is_library_source_only():
    corpus = load_corpus()
    titles = corpus.train.titles + corpus.validation.titles
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py"} <= set(titles)
    assert not any(part in ("test", "tests", "site-packages") for t in titles for part in t.split("/"))
    assert not any("_sysconfigdata" in t for t in titles)
    assert len(corpus.train) > 3_000_000
    here = Path(data.sysconfig.get_path("stdlib"))
    index = corpus.train.titles.index("ast.py")
    assert corpus.train.document(index) == (here / "ast.py").read_text(encoding="utf-8")


def test_what_counts_as_library_source():
    kept = ("ast.py", "json/decoder.py", "unittest/case.py", "testing.py")
    left_out = (
        "test/regrtest.py", "ctypes/test/x.py", "json/tests/x.py", "site-packages/torch/x.py", "dist-packages/x.py",
        "idlelib/run.py", "config-3.11-x86_64-linux-gnu/python-config.py", "_sysconfigdata_x.py", "sitecustomize.py",
    )  # fmt: skip
    assert [data._is_library_source(Path(p)) for p in kept] == [True] * len(kept)
    assert [data._is_library_source(Path(p)) for p in left_out] == [False] * len(left_out)


def test_standard_library_is_split_by_file():
    corpus = load_corpus()
    train, validation = set(corpus.train.titles), set(corpus.validation.titles)
    assert not train & validation
    assert len(validation) == round(0.1 * len(train | validation))
    assert list(corpus.train.titles) == sorted(train)


def test_digest_is_the_same_in_another_process_and_knows_every_byte(tmp_path):
    code = "from llmlib.data import corpus_digest; print(corpus_digest())"
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == data.corpus_digest()
    digests = set()
    a_boundary_moves = {"a": "xy", "b": "z", "c": "."}, {"a": "x", "b": "yz", "c": "."}
    for texts in (*a_boundary_moves, {"a": "xy", "d": "z", "c": "."}, {"a": "xy", "b": "w", "c": "."}):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text)
        digests.add(load_corpus(folder).digest())
    assert len(digests) == 4


def test_recorded_digest_decides_whether_numbers_are_comparable(monkeypatch):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setattr(data, "RECORDED_DIGESTS", {version: data.corpus_digest()})
    assert data.corpus_is_recorded()
    monkeypatch.setattr(data, "RECORDED_DIGESTS", {version: "another"})
    assert not data.corpus_is_recorded()
    monkeypatch.setattr(data, "RECORDED_DIGESTS", {})
    assert not data.corpus_is_recorded()


def test_python_without_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(CorpusError, match=rf"no Python source in {tmp_path}.*load_corpus"):
        data.standard_library.__wrapped__()


# --- the reader's own text --------------------------------------------------------------------------------------------


def test_one_file_holds_out_its_end(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(b"line one\r\nline two\r\n" * 10)
    corpus = load_corpus(file, validation=0.25)
    assert corpus.train.document(0) + corpus.validation.document(0) == "line one\nline two\n" * 10
    assert len(corpus.validation) == 45


def test_folder_is_read_without_hidden_binary_and_empty_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    texts = {"a.txt": b"alpha", "sub/b.md": b"beta", "c.txt": b"gamma"}
    others = {".hidden": b"no", ".git/x": b"no", "p.png": b"\0no", "empty": b""}
    for name, raw in (texts | others).items():
        (tmp_path / name).write_bytes(raw)
    corpus = load_corpus(str(tmp_path))
    assert sorted(corpus.train.titles + corpus.validation.titles) == ["a.txt", "c.txt", "sub/b.md"]
    assert len(corpus.validation.titles) == 1
    assert corpus.digest() == load_corpus(str(tmp_path)).digest()


def test_bad_sources_are_named(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="no file or folder at .*nowhere.txt: check the path"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(CorpusError, match=f"no text in {tmp_path}.*Give a file"):
        load_corpus(tmp_path)
    (tmp_path / "binary").write_bytes(b"\0\1")
    with pytest.raises(CorpusError, match="only binary files"):
        load_corpus(tmp_path)
    with pytest.raises(CorpusError, match="validation=1.5 must lie between 0 and 1"):
        load_corpus(_file(tmp_path, "text"), validation=1.5)

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CorpusError, match="binary can't be read: Permission denied. Check its permissions"):
        load_corpus(tmp_path / "binary")


def _file(folder: Path, text: str) -> Path:
    file = folder / "file.txt"
    file.write_text(text)
    return file


def test_too_short_for_a_window(tmp_path):
    corpus = load_corpus(_file(tmp_path, "short"))
    with pytest.raises(CorpusError, match=r"train split of .*file.txt has 5 bytes, but one window of time=8 needs 9"):
        batch(corpus.train, 1, 8)
    with pytest.raises(CorpusError, match="validation split of .* has 0 bytes"):
        next(evaluation_batches(corpus.validation, 1, 1))
    with pytest.raises(CorpusError, match="time=0 must be at least 1"):
        batch(corpus.train, 1, 0)


@given(st.text())
def test_bytes_round_trip(text):
    tokens = data.encode(text)
    assert tokens.dtype == torch.int64
    assert data.decode(tokens) == text
    assert tokens.tolist() == list(text.encode())


# --- a dataset by name ------------------------------------------------------------------------------------------------


def fake_datasets(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_dataset_by_name(monkeypatch):
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": ""}, {"text": "three"}, {"text": "five"}])

    fake_datasets(monkeypatch, load)
    corpus = load_corpus("someone/texts", config="en")
    assert asked == [("someone/texts", "en", "train", True)]
    assert sorted(_texts(corpus)) == ["five", "one", "three"]
    assert sorted(_texts(load_corpus("someone/texts", limit=6))) == ["one", "thr"]


def _texts(corpus):
    return [s.document(i) for s in (corpus.train, corpus.validation) for i in range(len(s.titles))]


def test_dataset_that_cannot_be_had(monkeypatch):
    fake_datasets(monkeypatch, lambda *_, **__: iter([{"body": "x"}]))
    with pytest.raises(CorpusError, match="'a/b' has no column 'text'; it has 'body'"):
        load_corpus("a/b")
    assert _texts(load_corpus("a/b", column="body")) == ["x", ""]  # one document is split by position

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, offline)
    with pytest.raises(CorpusError, match="'a/b' .*can't be read: no route to host.*use load_corpus"):
        load_corpus("a/b")
    fake_datasets(monkeypatch, lambda *_, **__: iter([]))
    with pytest.raises(CorpusError, match="'a/b', split 'train', has no text in its column 'text'"):
        load_corpus("a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="'a/b' needs the package `datasets`: pip install datasets"):
        load_corpus("a/b")


def test_dataset_in_a_local_folder(tmp_path):
    """The same call through the real `datasets`, which reads a local folder as it does a name."""
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "first row"}\n{"text": "second row"}\n')
    assert sorted(_texts(data.huggingface(str(tmp_path)))) == ["first row", "second row"]


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 99))
def test_batch_is_windows_of_the_text(texts, time, seed):
    split = lay_out(*texts)
    if len(split) <= time:
        return
    text = "".join(texts)
    whose = [i for i, t in enumerate(texts) for _ in t]
    one = batch(split, 4, time, seed=seed, packed=True)
    for inputs, targets, documents in zip(*(part.tolist() for part in one), strict=True):
        starts = [
            s
            for s in range(len(text) - time)
            if list(text[s : s + time].encode()) == inputs and whose[s : s + time] == documents
        ]
        expected = [
            [ord(text[s + i + 1]) if whose[s + i + 1] == whose[s + i] else IGNORED for i in range(time)] for s in starts
        ]
        assert targets in expected
    plain = batch(split, 4, time, seed=seed)
    assert plain.documents is None
    assert torch.equal(plain.inputs, one.inputs)
    assert torch.equal(plain.inputs[:, 1:], plain.targets[:, :-1])


def test_every_window_is_drawn_the_last_one_too():
    split = lay_out("abcdefgh")
    drawn = {data.decode(row) for step in range(60) for row in batch(split, 4, 3, step=step).inputs}
    assert drawn == {"abc", "bcd", "cde", "def", "efg"}


def test_batches_depend_on_seed_and_step_alone():
    split = load_corpus().train
    run = [b.inputs for b, _ in zip(batches(split, 3, 17, seed=5), range(4), strict=False)]
    resumed = next(batches(split, 3, 17, seed=5, start=2))
    assert torch.equal(resumed.inputs, run[2])
    assert not torch.equal(run[0], run[1])
    assert not torch.equal(run[0], batch(split, 3, 17, seed=6).inputs)
    assert run[0].shape == (3, 17)
    assert run[0].dtype == torch.int64


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 4))
def test_evaluation_reads_everything_once(length, time, batch_size):
    text = "".join(chr(97 + i % 26) for i in range(length))
    if length <= time:
        return
    parts = list(evaluation_batches(lay_out(text), batch_size, time))
    read = "".join(data.decode(row) for one in parts for row in one.inputs)
    assert read == text[: (length - 1) // time * time]
    assert len(parts) == math.ceil((length - 1) // time / batch_size)


def test_evaluation_on_fewer_windows_spreads_them():
    split = lay_out("".join(f"{i:03d}" for i in range(100)))
    rows = [data.decode(r) for one in evaluation_batches(split, 2, 3, windows=4) for r in one.inputs]
    assert rows[0] == "000"
    assert rows[-1] == "098"
    assert len(rows) == 4
