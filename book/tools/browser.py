"""Find a Chromium, or install one where that can be done.

In this order: $BOOK_BROWSER, chromium or chrome on the machine, Playwright's own; then Debian's package (as root),
then Playwright's download.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
REMEDY = (
    "No browser was found, and none could be installed. The site's tests and PDFs need Chromium or Chrome: "
    "on Debian and Ubuntu `sudo apt install chromium`, on macOS install Google Chrome, anywhere "
    "`.venv/bin/python -m playwright install chromium`; or name one: BOOK_BROWSER=/path/to/chrome."
)


def starts(path: str | None) -> bool:
    """Whether this is a browser that runs: some distributions ship a `chromium-browser` that only points at a store."""
    if not path or not Path(path).exists():
        return False
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def playwright_path() -> str:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return playwright.chromium.executable_path


def found() -> str | None:
    """The path of a browser that starts, or None."""
    candidates = [os.environ.get("BOOK_BROWSER"), *(shutil.which(name) for name in NAMES), *PLACES]
    return next((path for path in candidates if starts(path)), None) or next(filter(starts, [playwright_path()]), None)


def install() -> None:
    if shutil.which("apt-get") and os.geteuid() == 0:
        print("Installing Debian's chromium for the site's tests …", flush=True)
        subprocess.run(["apt-get", "update", "-qq"])
        if subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"]).returncode == 0 and found():
            return
    print("Downloading Playwright's Chromium for the site's tests …", flush=True)
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"])


def executable() -> str:
    """A browser that starts, installed if need be; the program ends with the remedy when there is none."""
    path = found()
    if path is None:
        install()
        path = found()
    return path or sys.exit(REMEDY)


@contextlib.contextmanager
def launched(**options) -> Iterator:
    """A headless browser that reaches nothing but this machine."""
    from playwright.sync_api import sync_playwright

    blocked = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost", "--no-sandbox"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=blocked, **options)
        yield browser
        browser.close()


if __name__ == "__main__":
    print(executable())
