"""What the book itself costs:  python benchmarks/book.py [import] [fit] [site] [weight] [chapters] [tests]

    import    seconds of `import llmlib` beyond torch's own import, and of `import llmlib.scaling`    (≤ 0.5)
    fit       seconds of a parametric fit on 240 points                                               (≤ 1)
    site      seconds to build the site from a clean checkout, the environment being there             (≤ 30)
    weight    bytes of each page on first load, raw and compressed                                     (≤ 3 MB, ≤ 1 MB)
    chapters  seconds to execute each notebook, kernel start included                                  (≤ 60)
    tests     seconds of `make quick` and `make test`                                                  (≤ 180, ≤ 600)

Medians of several runs where a run is short. Run it on an idle machine; two cores are what the limits are meant for.
"""

import gzip
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def timed(*command: str | Path, cwd: Path = ROOT) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def report(what: str, value: float, unit: str, limit: float) -> None:
    print(f"{what:56} {value:8.2f} {unit:3} (limit {limit:g}){'' if value <= limit else '   OVER'}", flush=True)


def python(code: str) -> float:
    return timed(sys.executable, "-c", code)


def imports() -> None:
    """Interleaved pairs, so that a busy machine weighs on both alike."""
    pairs = [(python("import torch, llmlib, llmlib.model, llmlib.attention"), python("import torch")) for _ in range(7)]
    report("import llmlib, its model and attention, beyond torch", median(a - b for a, b in pairs), "s", 0.5)
    report("import llmlib.scaling, whole process", median(python("import llmlib.scaling") for _ in range(7)), "s", 0.5)


def fit() -> None:
    import numpy as np

    from llmlib.scaling import fit_parametric

    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7.5, 10.5, 240), 10 ** rng.uniform(9, 11.5, 240)
    loss = (1.82 + 482 / N**0.348 + 2085 / D**0.366) * np.exp(rng.normal(0, 0.005, 240))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fit_parametric(N, D, loss)
        seconds.append(time.perf_counter() - start)
    report("parametric fit on 240 points", median(seconds), "s", 1)


def site() -> None:
    """A clone of what is committed, so that nothing built before helps."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        timed("git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), checkout)
        seconds = timed(sys.executable, "book/tools/site.py", "build", cwd=checkout)
    report("site from a clean checkout", seconds, "s", 30)


def weight() -> None:
    """Everything that a page loads at first, without the figures that wait below the fold."""
    html = ROOT / "_build" / "html"
    sys.path.insert(0, str(ROOT / "book" / "tools"))
    from browser import launched

    with launched() as browser:
        for page in sorted(page for page in html.rglob("*.html") if "_static" not in page.parts):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            bodies = []
            tab.on("requestfinished", lambda request, bodies=bodies: bodies.append(request.url))
            tab.goto(page.as_uri(), wait_until="networkidle")
            files = {re.sub(r"^file://|[?#].*", "", url) for url in bodies}
            raw = [Path(file).read_bytes() for file in files if Path(file).is_file()]
            packed = sum(min(len(body), len(gzip.compress(body))) for body in raw)
            name = str(page.relative_to(html))
            report(f"{name}, raw", sum(map(len, raw)) / 1e6, "MB", 3)
            report(f"{name}, compressed", packed / 1e6, "MB", 1)
            tab.close()


def chapters() -> None:
    for notebook in sorted([*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("book/*.ipynb")]):
        jupyter = Path(sys.executable).with_name("jupyter")
        report(notebook.name, timed(jupyter, "execute", notebook), "s", 60)


def tests() -> None:
    report("make quick", timed("make", "quick"), "s", 180)
    report("make test", timed("make", "test"), "s", 600)


PARTS = {"import": imports, "fit": fit, "site": site, "weight": weight, "chapters": chapters, "tests": tests}


if __name__ == "__main__":
    import torch

    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {platform.platform()}"
    )
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
