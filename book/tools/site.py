"""Build the site, serve it, print its chapters:  python book/tools/site.py build | serve | pdf  (several in a row).

`complete` builds the site only where there is none yet.
"""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
PDF = ROOT / "_build" / "pdf"
PORT = 8000


def build(source: Path = ROOT, output: Path = ROOT, anew: bool = True) -> None:
    """Warnings are errors, in cross-references too. One process builds at a time; others wait for it."""
    folder = output / "_build"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if anew or not (folder / "html" / "index.html").exists():
            _build(source, output)


def _build(source: Path, output: Path) -> None:
    start = time.monotonic()
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", source, "--path-output", output, "-W", "--keep-going", "-n", "-q"]
    failed = subprocess.run(command, cwd=source).returncode
    if failed:
        sys.exit(f"The site has problems; the warnings above name the page and the line. (Exit code {failed})")
    pages = sum(1 for _ in (output / "_build" / "html").rglob("*.html"))
    index = os.path.relpath(output / "_build" / "html" / "index.html")
    print(f"{pages} pages in {time.monotonic() - start:.0f} s: {index}")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Static files, without a line for each."""

    def log_message(self, format, *args) -> None:
        """Quiet."""


def server(folder: Path = HTML, port: int = PORT, tries: int = 50) -> http.server.ThreadingHTTPServer:
    """A server of `folder` on the first free port from `port` on; 0 leaves the choice to the system."""
    handler = functools.partial(Handler, directory=folder)
    for candidate in range(port, port + tries):
        try:
            return http.server.ThreadingHTTPServer(("127.0.0.1", candidate), handler)
        except OSError:
            continue
    sys.exit(f"No free port between {port} and {port + tries - 1}; free one, or set PORT.")


def serve() -> None:
    if not (HTML / "index.html").exists():
        sys.exit("There is no site yet: run `make site` first.")
    httpd = server(port=int(os.environ.get("PORT", PORT)))
    print(f"\nThe book is at http://127.0.0.1:{httpd.server_port}/   (Ctrl-C stops it)", flush=True)
    try:
        httpd.serve_forever()
    except KeyboardInterrupt:
        print("\nStopped.")


def pdf() -> None:
    """Each chapter printed by the browser, with its print style, when its formulas and images are there."""
    from browser import launched

    shutil.rmtree(PDF, ignore_errors=True)
    PDF.mkdir(parents=True)
    httpd = server(port=8765)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with launched() as browser:
        for page in sorted((HTML / "chapters").glob("*.html")):
            tab = browser.new_page(color_scheme="light")
            tab.goto(f"http://127.0.0.1:{httpd.server_port}/chapters/{page.name}")
            tab.evaluate(READY)
            target = PDF / f"{page.stem}.pdf"
            tab.pdf(path=target, format="A4", print_background=True, prefer_css_page_size=True)
            tab.close()
            print(f"{target.relative_to(ROOT)}  {target.stat().st_size / 1e6:.1f} MB", flush=True)
    httpd.shutdown()


READY = """async () => {
  document.querySelectorAll('img[loading=lazy]').forEach(image => image.loading = 'eager');
  await Promise.all([...document.images].map(image => image.decode().catch(() => null)));
  if (window.MathJax?.startup) await MathJax.startup.promise;
}"""


if __name__ == "__main__":
    for step in sys.argv[1:]:
        {"build": build, "complete": functools.partial(build, anew=False), "serve": serve, "pdf": pdf}[step]()
