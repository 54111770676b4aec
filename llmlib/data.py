"""Text as tensors: the corpus the book trains on, a reader's own files, and batches of either.

Text is read as UTF-8 bytes, so the vocabulary has 256 entries and needs no training. The book's corpus is the source of
Python's own standard library: several megabytes on every machine that can run the book, with no download.
"""

import functools
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer, UInt8
from torch import Tensor

from llmlib.errors import CorpusError, require

VOCAB_SIZE = 256
IGNORED = -100  # the target that cross-entropy skips

# Tests and installed packages are not the library's source; encodings and pydoc_data are generated tables; the others
# are parts that some distributions ship apart, so leaving them out makes more machines agree.
_LEFT_OUT = {
    "test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data",
    "distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo",
}  # fmt: skip
_MACHINE_DEPENDENT = ("_sysconfigdata", "sitecustomize", "usercustomize")

RECORDED_DIGESTS = {"3.11": "3cda4d0187cd85878dc2d25394a0756013b3653deb6bde35c31346fdefa09907"}
"""Digest of the corpus behind the book's printed numbers, for each minor version of Python it was executed on."""


def encode(text: str | bytes) -> Int64[Tensor, " t"]:
    """The bytes of `text` in UTF-8, as token ids 0…255."""
    raw = text.encode() if isinstance(text, str) else text
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if raw else torch.empty(0, dtype=torch.int64)


def decode(tokens: Integer[Tensor, " t"] | Iterable[int]) -> str:
    """The text that byte tokens stand for; a byte sequence that isn't UTF-8 shows as �."""
    ids = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    return bytes(ids).decode(errors="replace")


@dataclass(frozen=True, eq=False)
class Split:
    """Documents laid end to end: `tokens` (bytes), and where in them each document ends."""

    name: str
    tokens: UInt8[Tensor, " n"]
    ends: Int64[Tensor, " documents"]
    titles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> str:
        """The text of one document."""
        start = int(self.ends[index - 1]) if index else 0
        return decode(self.tokens[start : int(self.ends[index])])


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text source in two parts that share no document: one to train on, one to validate on."""

    name: str
    train: Split
    validation: Split
    vocab_size: int = VOCAB_SIZE

    def digest(self) -> str:
        """SHA-256 of the titles and bytes of all documents: equal digests mean equal corpora."""
        sha = hashlib.sha256()
        for split in (self.train, self.validation):
            sha.update("\n".join(split.titles).encode())
            sha.update(split.ends.numpy().astype("<i8").tobytes())
            sha.update(split.tokens.numpy().tobytes())
        return sha.hexdigest()

    def __repr__(self) -> str:
        sizes = (f"{s.name} {len(s):,} bytes in {len(s.titles):,} documents" for s in (self.train, self.validation))
        return f"Corpus({self.name}: {', '.join(sizes)})"


# --- sources ----------------------------------------------------------------------------------------------------------


def load_corpus(source: str | Path | None = None, **options) -> Corpus:
    """A corpus by what names it: nothing for the standard library, a file, a folder, or a Hugging Face dataset's name.

    options  of `huggingface` when the source is a dataset's name, else `validation`, the part held out (a fraction)
    """
    if source is None:
        return standard_library(**options)
    path = Path(source).expanduser()
    looks_like_path = isinstance(source, Path) or path.suffix or path.is_absolute() or str(source).startswith(".")
    if path.exists() or looks_like_path:
        return text_files(path, **options)
    return huggingface(str(source), **options)


@functools.cache
def standard_library(validation: float = 0.1) -> Corpus:
    """The `.py` source of this Python's standard library, split by file; the same on every run.

    Tests, installed packages, generated tables, machine-dependent files and the parts that some distributions ship
    apart are left out. Raises CorpusError where Python was installed without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if _is_library_source(f.relative_to(root))]
    documents = {f.relative_to(root).as_posix(): _read(f) for f in files}
    require(
        sum(map(len, documents.values())) > 0,
        f"no Python source in {root}: this Python comes without its standard library's .py files. "
        f'Use another Python, or your own text: llmlib.data.load_corpus("folder or file.txt")',
        CorpusError,
    )
    return _split(f"Python {_minor_version()} standard library", documents, validation)


def _is_library_source(path: Path) -> bool:
    in_machine_folder = any(part.startswith("config-") for part in path.parts)
    return not (set(path.parts) & _LEFT_OUT or in_machine_folder or path.name.startswith(_MACHINE_DEPENDENT))


def text_files(path: str | Path, validation: float = 0.1) -> Corpus:
    """A reader's own text: one file, or all files below a folder except hidden and binary ones.

    A folder is split by file, a single file by position (its end is held out).
    Raises CorpusError, naming the path, when it doesn't exist, can't be read or holds no text.
    """
    path = Path(path).expanduser()
    require(path.exists(), f"no file or folder at {path}: check the path, relative to {Path.cwd()}", CorpusError)
    if path.is_file():
        documents = {path.name: _read(path)}
    else:
        files = (f for f in path.rglob("*") if f.is_file())
        visible = (f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts))
        documents = {f.relative_to(path).as_posix(): _read(f) for f in visible}
    text = {title: raw for title, raw in documents.items() if raw and b"\0" not in raw}
    require(
        bool(text),
        f"no text in {path}: it is empty, or holds only binary files. Give a file or folder with text",
        CorpusError,
    )
    return _split(str(path), text, validation)


def huggingface(
    name: str, *, config: str | None = None, split: str = "train", column: str = "text",
    limit: int | None = 50_000_000, validation: float = 0.1,
) -> Corpus:  # fmt: skip
    """A text dataset of the Hugging Face hub by its name, through the `datasets` package; one row is one document.

    column  the one that holds the text
    limit   stop after this many bytes (None: read all)

    Rows are streamed, so a large dataset costs no more than the part that is read.
    Raises CorpusError when `datasets` isn't installed, when there is no network or no such dataset, or no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"the dataset {name!r} needs the package `datasets`: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        documents = _take_rows(name, rows, column, limit)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(
            f"the dataset {name!r} (config {config!r}, split {split!r}) can't be read: {error}. Check the name, the "
            f"config, the split and the network; without one, use load_corpus() or your own file"
        ) from error
    require(
        bool(documents), f"the dataset {name!r}, split {split!r}, has no text in its column {column!r}", CorpusError
    )
    return _split(name, documents, validation)


def _take_rows(name: str, rows: Iterable[dict], column: str, limit: int | None) -> dict[str, bytes]:
    documents, size = {}, 0
    for number, row in enumerate(rows):
        require(
            column in row,
            f"the dataset {name!r} has no column {column!r}; it has {', '.join(map(repr, row))}",
            CorpusError,
        )
        raw = row[column].encode()[: None if limit is None else limit - size]
        if raw:
            documents[f"{number:09d}"] = raw
        size += len(raw)
        if limit is not None and size >= limit:
            break
    return documents


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise CorpusError(f"{path} can't be read: {error.strerror}. Check its permissions, or leave it out") from error


def _split(name: str, documents: dict[str, bytes], fraction: float) -> Corpus:
    """Hold out whole documents, chosen by a hash of their titles; of a single document, its end."""
    require(0 < fraction < 1, f"validation={fraction} must lie between 0 and 1: it is the part held out", CorpusError)
    if len(documents) == 1:
        ((title, raw),) = documents.items()
        cut = len(raw) - int(len(raw) * fraction)
        return Corpus(
            name, _lay_out(name, "train", {title: raw[:cut]}), _lay_out(name, "validation", {title: raw[cut:]})
        )
    order = sorted(documents, key=lambda title: hashlib.sha256(title.encode()).digest())
    held_out = set(order[: max(1, round(len(order) * fraction))])
    parts = {"train": sorted(documents.keys() - held_out), "validation": sorted(held_out)}
    splits = (_lay_out(name, part, {t: documents[t] for t in titles}) for part, titles in parts.items())
    return Corpus(name, *splits)


def _lay_out(corpus: str, part: str, documents: dict[str, bytes]) -> Split:
    ends = torch.tensor([len(raw) for raw in documents.values()], dtype=torch.int64).cumsum(0)
    tokens = np.frombuffer(b"".join(documents.values()), dtype=np.uint8).copy()
    return Split(f"{part} split of {corpus}", torch.from_numpy(tokens), ends, tuple(documents))


# --- the same corpus? -------------------------------------------------------------------------------------------------


def _minor_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@functools.cache
def corpus_digest() -> str:
    """SHA-256 of the standard library corpus on this machine."""
    return standard_library().digest()


def corpus_is_recorded() -> bool:
    """Whether this machine's corpus is the one behind the book's printed numbers, for this minor version of Python."""
    return RECORDED_DIGESTS.get(_minor_version()) == corpus_digest()


# --- batches ----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Token ids, the ids that follow them, and (in packed text) which document each token belongs to."""

    inputs: Int64[Tensor, "b t"]
    targets: Int64[Tensor, "b t"]
    documents: Int64[Tensor, "b t"] | None = None

    @property
    def scored(self) -> Bool[Tensor, "b t"]:
        """Where there is a target: it isn't IGNORED."""
        return self.targets != IGNORED


def batch(split: Split, batch_size: int, time: int, *, seed: int = 0, step: int = 0, packed: bool = False) -> Batch:
    """Random windows of a split: `inputs` (b t) and `targets` (b t), the same text one byte further on.

    The windows depend on `seed` and `step` alone, so a run that resumes at step 500 sees what it would have seen.
    packed=True adds the document ids, and no target lies in another document than its input (it is IGNORED).
    Raises CorpusError when the split is shorter than one window.
    """
    _require_window(split, time)
    draw = np.random.Generator(np.random.PCG64([seed, step]))
    starts = torch.from_numpy(draw.integers(0, len(split) - time, size=batch_size))
    return _windows(split, starts, time, packed)


def batches(
    split: Split, batch_size: int, time: int, *, seed: int = 0, start: int = 0, packed: bool = False
) -> Iterator[Batch]:
    """`batch` for step start, start + 1, … without end."""
    return (batch(split, batch_size, time, seed=seed, step=step, packed=packed) for step in count(start))


def evaluation_batches(
    split: Split, batch_size: int, time: int, *, windows: int | None = None, packed: bool = False
) -> Iterator[Batch]:
    """Windows in the order of the text that don't overlap: all of them, or `windows` of them spread evenly."""
    _require_window(split, time)
    total = (len(split) - 1) // time
    chosen = torch.arange(total) if windows is None else torch.linspace(0, total - 1, min(windows, total)).long()
    for starts in (chosen * time).split(batch_size):
        yield _windows(split, starts, time, packed)


def _windows(split: Split, starts: Int64[Tensor, " b"], time: int, packed: bool) -> Batch:
    positions = starts[:, None] + torch.arange(time + 1)
    tokens = split.tokens[positions].long()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if not packed:
        return Batch(inputs, targets)
    documents = torch.searchsorted(split.ends, positions, right=True)
    crosses = documents[:, 1:] != documents[:, :-1]
    return Batch(inputs, targets.masked_fill(crosses, IGNORED), documents[:, :-1].contiguous())


def _require_window(split: Split, time: int) -> None:
    require(time > 0, f"time={time} must be at least 1", CorpusError)
    require(
        len(split) > time,
        f"the {split.name} has {len(split):,} bytes, but one window of time={time} needs {time + 1:,}: "
        f"give more text or a shorter time",
        CorpusError,
    )
