"""Run the tests:  python book/tools/check.py all | quick | lint | gpu

all     pytest, every notebook against its stored outputs (nbval), every page of the site in a browser
quick   lints and the fast part of pytest, in about three minutes
lint    ruff, mypy, import floors
gpu     the tests that need an NVIDIA GPU
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
WORKERS = str(min(4, os.cpu_count() or 1))
WITHOUT_SITE = "--ignore=tests/test_site.py"  # to collect its tests, one for each page, the site must stand
LINTS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports", "--no-cache"])
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def run(title: str, *command: str | Path) -> bool:
    print(f"\n── {title} {'─' * (76 - len(title))}", flush=True)
    start = time.monotonic()
    passed = subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD).returncode == 0
    print(f"{title}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return passed


def notebooks() -> list[Path]:
    """Every notebook of the table of contents' folders."""
    return sorted([*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("book/*.ipynb")])


def differences() -> list[str]:
    """Why the stored outputs can't be expected here digit for digit; empty where they can."""
    from llmlib.data import RECORDED_DIGESTS, standard_library

    version = ".".join(platform.python_version_tuple()[:2])
    if version not in RECORDED_DIGESTS:
        return [f"the notebooks were executed on Python {', '.join(RECORDED_DIGESTS)}, and this is {version}"]
    reasons = []
    if others():
        reasons.append(f"these packages aren't what requirements.txt pins: {', '.join(others())}")
    if standard_library().digest() != RECORDED_DIGESTS[version]:
        reasons.append(
            f"the standard library of Python {platform.python_version()} is another text than they trained on"
        )
    return reasons


def others() -> list[str]:
    """Packages that are installed in another version than the pinned one, which executed the notebooks."""
    pins = re.findall(r"^([\w.-]+)==(\S+)(?! ;)$", (ROOT / "requirements.txt").read_text(), re.M)
    installed = {name: importlib.metadata.version(name).split("+")[0] for name, _ in pins}
    return [f"{name} {installed[name]} (pinned {version})" for name, version in pins if installed[name] != version]


def check_notebooks() -> bool:
    """Strict: each cell's output equals the stored one. Lax: each cell runs."""
    files = notebooks()
    if not files:
        return True
    reasons = differences()
    mode = "--nbval-lax" if reasons else "--nbval"
    for reason in reasons:
        print(f"\nNotebooks run lax (every cell must run, outputs aren't compared): {reason}.", flush=True)
    options = ["--nbval-sanitize-with=tests/nbval_sanitise.cfg", "--nbval-cell-timeout=120", "-p", "no:warnings"]
    parallel = ["-n", WORKERS, "--dist", "loadfile"] if len(files) > 1 else []
    return run(f"notebooks ({'lax' if reasons else 'strict'})", *PYTEST, mode, *options, *parallel, *files)


def lint() -> bool:
    return all([run(" ".join(c[:2]), Path(sys.executable).with_name(c[0]), *c[1:]) for c in LINTS])


def everything() -> bool:
    from browser import executable

    executable()
    parallel = ["-n", WORKERS, "--dist", "loadfile"]
    steps = [
        lint(),
        run("pytest", *PYTEST, *parallel, WITHOUT_SITE, "tests"),
        check_notebooks(),
        run("site", sys.executable, "book/tools/site.py", "build")
        and run("site in a browser", *PYTEST, "-m", "site", "tests"),
    ]
    return all(steps)


def quick() -> bool:
    return all([lint(), run("pytest", *PYTEST, "-n", WORKERS, WITHOUT_SITE, "-m", "not slow", "tests")])


def gpu() -> bool:
    import torch

    if not torch.cuda.is_available():
        print("PyTorch sees no NVIDIA GPU here: run this on a machine with one (`nvidia-smi` must list it).")
        return False
    return run("GPU tests", *PYTEST, WITHOUT_SITE, "-m", "gpu", "tests")


if __name__ == "__main__":
    passed = {"all": everything, "quick": quick, "lint": lint, "gpu": gpu}[sys.argv[1]]()
    print("\nAll passed." if passed else "\nSomething failed; the sections above say what.")
    sys.exit(not passed)
