"""Create .venv, install the pinned tree of requirements.txt and llmlib into it; do nothing when that is done already.

Runs on the system's Python with the standard library alone, so it must stay free of other imports.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
STAMP = VENV / ".installed"
PYTHON = VENV / "bin" / "python"
PINNED_FOR = ((3, 11), (3, 12), (3, 13))


def fingerprint() -> str:
    """What the environment depends on: the pins, the package's own metadata, and where this checkout lies."""
    parts = [(ROOT / name).read_bytes() for name in ("requirements.txt", "pyproject.toml")]
    return hashlib.sha256(b"\0".join([*parts, str(ROOT).encode()])).hexdigest()


def missing_venv() -> str | None:
    """The reason why this Python can't make an environment, with the remedy; None when it can."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            return (
                f"{sys.executable} has no module {module!r}, which makes the environment. On Debian and Ubuntu it is a "
                f"package of its own: sudo apt install {version}-venv. Then run the command again."
            )
    return None


def works() -> bool:
    """Whether .venv holds a Python ≥ 3.11 that starts, with pip."""
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", probe], capture_output=True).returncode == 0


def create() -> None:
    reason = missing_venv()
    if reason:
        sys.exit(reason)
    print(f"Creating the environment .venv with Python {sys.version.split()[0]} …", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)


def pip(*arguments: str) -> None:
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(
            "The installation failed; pip's message above says why. It needs the package index (or a mirror set in "
            "pip's configuration) and about 5 GB of disk on Linux, where PyTorch brings its CUDA libraries. What was "
            "downloaded is kept, so running the command again goes on from there."
        )


def install() -> None:
    print("Installing the packages of requirements.txt (several minutes the first time) …", flush=True)
    pip("--requirement", "requirements.txt")
    pip("--no-deps", "--no-build-isolation", "--quiet", "--editable", ".")


def main() -> None:
    if STAMP.exists() and STAMP.read_text() == fingerprint() and works():
        return
    if not works():
        create()
    if sys.version_info[:2] not in PINNED_FOR:
        print(f"Python {sys.version_info.major}.{sys.version_info.minor} is newer than the pins were tried on.")
    install()
    STAMP.write_text(fingerprint())


if __name__ == "__main__":
    main()
