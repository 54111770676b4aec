"""Measurements that take longer than a cell may: made by a script, stored as JSON, read by the chapter.

Where they live: `book/recorded/<name>.json` in the repository, once. pyproject.toml installs the same files to
`<prefix>/share/llmlib/recorded/`, so `recorded(name)` works on Colab and wherever the package is installed.

How they are made: `book/recorded/<chapter>.py`, run by `make record CHAPTER=<chapter>` from the repository's root:

    from llmlib.notebook import recording

    with recording("attention-induction", command="make record CHAPTER=attention") as record:
        for seed in range(8):
            record(f"seed {seed}", lambda: train(seed))    # a JSON value; skipped when stored, saved at once
"""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llmlib.errors import require
from llmlib.notebook.tables import table

_REPOSITORY = Path(__file__).parents[2] / "book" / "recorded"


def _folder() -> Path:
    installed = Path(sysconfig.get_path("data")) / "share" / "llmlib" / "recorded"
    return _REPOSITORY if _REPOSITORY.is_dir() else installed


def recorded(name: str) -> dict:
    """The results recorded under `name`, by key; `recorded(name)["provenance"]` says how they were made."""
    path = _folder() / f"{name}.json"
    require(path.exists(), f"nothing is recorded as {name!r} in {_folder().name}/; run `make record` to measure it")
    content = json.loads(path.read_text())
    return content["results"] | {"provenance": content["provenance"]}


@contextlib.contextmanager
def recording(name: str, command: str) -> Iterator[Callable]:
    """Yield `record(key, measure)`, which runs `measure()` unless `key` is stored already, and stores what it returns.

    The file is written after each key under another name and renamed, so an interrupted run loses one measurement at
    most and the next run goes on from there. Delete the file to measure everything again.
    """
    path = _REPOSITORY / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {"provenance": provenance(command), "results": {}}

    def record(key: str, measure: Callable):
        if key not in content["results"]:
            content["results"][key] = measure()
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, path)
        return content["results"][key]

    path.parent.mkdir(parents=True, exist_ok=True)
    yield record


def provenance(command: str) -> dict[str, str]:
    """Command, machine, versions, commit and date of a measurement made now."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=_REPOSITORY.parents[1])
    return {
        "command": command,
        "machine": _machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if (
        info.exists()) else []  # fmt: skip
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def full_size(chapter: str, measure: Callable[[], list[dict]]) -> None:
    """Show `measure()` where there is a CUDA GPU, the recorded measurement where there is none, or that none exists.

    chapter  the notebook's name, such as "01-attention"; the record is `book/recorded/full-size-<chapter>.json`
    measure  returns table rows (dicts); it isn't called without a GPU
    """
    name, command = f"full-size-{chapter}", f"LLMLIB_RECORD=1 jupyter execute chapters/{chapter}.ipynb"
    if torch.cuda.is_available() and not os.environ.get("LLMLIB_RECORD"):
        table(measure(), caption=f"Measured just now on {_machine()}, torch {torch.__version__}")
        return
    if torch.cuda.is_available():
        with recording(name, command) as record:
            record("rows", measure)
    if not (_folder() / f"{name}.json").exists():
        print(f"Not yet measured. With a CUDA GPU this cell measures it; to record it for the book:\n{command}")
        return
    found = recorded(name)
    made = found["provenance"]
    caption = f"Recorded on {made['machine']}, torch {made['torch']}, {made['date']}, by {made['command']}"
    table(found["rows"], caption=caption)


def time_on_gpu(call: Callable[[], object], repeats: int = 20) -> dict[str, float]:
    """Milliseconds of `call()`, median of `repeats` runs after three to warm up, and the most memory one adds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": round(sorted(times)[repeats // 2], 3), "peak MB": round(peak / 1e6, 1)}
