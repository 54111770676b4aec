"""The built site in a real browser that reaches only this machine: `make site`, or their collection builds it."""

import gzip
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
TOOLS = ROOT / "book" / "tools"
sys.path.insert(0, str(TOOLS))
pytestmark = pytest.mark.site

# A page is a test, so the site must stand before tests are collected; pytest's workers all collect them, one builds.
subprocess.run([sys.executable, TOOLS / "site.py", "complete"], check=True)

PAGES = sorted(str(path.relative_to(HTML)) for path in HTML.rglob("*.html") if "_static" not in path.parts)
CHAPTERS = [page for page in PAGES if page.startswith("chapters/")]
SUBPATH = "a/sub/path"
RAW_TEX = re.compile(r"\\\(|\\\[|\$\$|\\begin\{|\\frac|\\mathrm|\\sum")
REPR = re.compile(r"<[\w.]+(?: object)? at 0x[0-9a-f]+|\b\w*(?:Widget|HBox|VBox|Slider|Output)\(|0x[0-9a-f]{8,}")
AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
SETTLED = """async () => {
  await document.fonts.ready;
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await new Promise(requestAnimationFrame);
}"""
PROSE = """() => {
  const copy = document.body.cloneNode(true);
  for (const node of copy.querySelectorAll('pre, code, script, style, mjx-container, noscript')) node.remove();
  return copy.textContent;
}"""
OUTPUTS = "() => [...document.querySelectorAll('.cell_output')].map(output => output.innerText).join('\\n')"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The site served under a path of its own, as a project's pages are."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("book_site", TOOLS / "site.py")  # `site` is a standard module
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    folder = tmp_path_factory.mktemp("served")
    (folder / SUBPATH).parent.mkdir(parents=True)
    (folder / SUBPATH).symlink_to(HTML)
    server = site.server(folder, port=8900)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{SUBPATH}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    from browser import launched

    with launched() as chromium:
        yield chromium


class Visit:
    """A page as it was loaded: what it asked for, what it complained about."""

    def __init__(self, browser, url: str, **options):
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(180_000)  # a busy machine is no fault of a page
        self.problems, self.asked, self.bodies = [], [], {}
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("response", self.keep)
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(f"{request.url}: {request.failure}"))
        self.page.goto(url)
        self.page.evaluate(SETTLED)

    def keep(self, response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.url}: {response.status}")
        self.bodies[response.url] = response

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()


@pytest.fixture(scope="module", params=PAGES)
def visit(request, browser, address):
    """Each page in turn, loaded once for all the tests that only look at it."""
    with Visit(browser, address + request.param) as visit:
        visit.path = request.param
        yield visit


def test_nothing_is_asked_elsewhere_and_nothing_fails(visit, address):
    outside = [url for url in visit.asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside, f"{visit.path} asks other hosts, or places outside its folder"
    assert not visit.problems


def test_formulas_are_typeset_and_no_repr_is_visible(visit):
    assert visit.page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert not RAW_TEX.findall(visit.page.evaluate(PROSE)), f"TeX that wasn't typeset in {visit.path}"
    seen = REPR.findall(visit.page.evaluate(OUTPUTS))
    assert not seen, f"an object's repr is visible in {visit.path}"


def test_images_have_alternative_text(visit):
    for alt in visit.page.evaluate("[...document.querySelectorAll('main img')].map(image => image.alt)"):
        assert len(alt) > 5, f"an image of {visit.path} has no alternative text"
        assert not re.search(r"\.(svg|png)$|_images/", alt), f"the alternative text {alt!r} is a file name"


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_no_accessibility_violation(visit, mode):
    from axe_playwright_python.sync_playwright import Axe

    visit.page.evaluate("mode => { document.documentElement.dataset.theme = mode; }", mode)
    visit.page.wait_for_timeout(250)
    found = Axe().run(visit.page, options=AXE).response["violations"]
    said = [f"{rule['id']}: {node['target']} {node['failureSummary']}" for rule in found for node in rule["nodes"][:3]]
    assert not said, f"{visit.path}, {mode}: " + "\n".join(said)


def test_fits_a_phone(visit):
    visit.page.set_viewport_size({"width": 360, "height": 740})
    width = visit.page.evaluate("document.documentElement.scrollWidth")
    visit.page.set_viewport_size({"width": 1280, "height": 900})
    assert width <= 360, f"{visit.path} is {width} pixels wide on a screen of 360"


@pytest.mark.parametrize("path", PAGES)
def test_opens_from_the_file_system(path, browser):
    with Visit(browser, (HTML / path).as_uri()) as visit:
        assert not visit.problems
        assert all(url.startswith(("file:", "data:", "blob:")) for url in visit.asked)
        assert visit.page.locator("mjx-merror").count() == 0
        assert not RAW_TEX.findall(visit.page.evaluate(PROSE))


def links(path: str) -> list[str]:
    return re.findall(r'<a\b[^>]*?href="([^"]*)"', (HTML / path).read_text())


IDS = {}


def ids(file: Path) -> set[str]:
    if file not in IDS:
        IDS[file] = set(re.findall(r'\bid="([^"]+)"', file.read_text()))
    return IDS[file]


@pytest.mark.parametrize("path", PAGES)
def test_internal_links_resolve(path):
    for href in links(path):
        if urlparse(href).scheme:
            continue
        target, fragment = urldefrag(urljoin(f"/{path}", href))
        file = HTML / unquote(target).lstrip("/")
        assert file.is_file(), f"{path} links to {href}, which is no file"
        if fragment and file.suffix == ".html":
            assert unquote(fragment) in ids(file), f"{path} links to {href}, which is no place on that page"


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_is_light(path, browser, address):
    """≤ 3 MB raw and ≤ 1 MB compressed on first load, and figures below the fold wait."""
    with Visit(browser, address + path) as visit:
        visit.page.wait_for_timeout(300)
        bodies = {url: response.body() for url, response in visit.bodies.items() if response.status == 200}
        raw = sum(map(len, bodies.values()))
        packed = sum(min(len(body), len(gzip.compress(body))) for body in bodies.values())
        assert raw <= 3_000_000, f"{path} loads {raw / 1e6:.2f} MB"
        assert packed <= 1_000_000, f"{path} loads {packed / 1e6:.2f} MB compressed"
        images = visit.page.locator("main img")
        eager = [i for i in range(images.count()) if images.nth(i).get_attribute("loading") != "lazy"]
        assert len(eager) <= 1, f"{path} loads {len(eager)} figures at once"
        assert not any("fontawesome.js" in url or "searchindex" in url for url in visit.asked)


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_has_what_readers_use(path, browser, address):
    with Visit(browser, address + path) as visit:
        page = visit.page
        assert page.locator("button.copybtn").count() > 5
        solutions = page.locator(".tag_solution details")
        assert solutions.count() >= 6, "six to eight exercises with a folded solution each"
        assert page.locator(".tag_solution details[open]").count() == 0
        assert page.locator("mjx-container").count() > 5
        assert page.locator(".box.predict").count() >= 1
        assert page.locator("a.citation-link").count() >= 3
        page.emulate_media(media="print")
        assert not page.locator(".bd-sidebar-primary").is_visible()
        assert page.locator("article h1").is_visible()


def test_citations_lead_to_entries_that_lead_to_papers(browser, address):
    with Visit(browser, address + "bibliography.html") as visit:
        entries = visit.page.locator("div.citation")
        assert entries.count() == (ROOT / "book" / "references.bib").read_text().count("\n@")
        for i in range(entries.count()):
            assert entries.nth(i).locator("a[href^='http']").count() >= 1, entries.nth(i).inner_text()


def test_search_finds_and_its_results_open(browser, address):
    with Visit(browser, address + "search.html?q=attention") as visit:
        first = visit.page.locator("#search-results li a").first
        first.wait_for(timeout=15_000)
        found = [a.get_attribute("href") for a in visit.page.locator("#search-results li a").all()]
        assert found
        for href in found:
            assert (HTML / urlparse(urljoin(f"/{SUBPATH}/", href)).path.removeprefix(f"/{SUBPATH}/")).is_file(), href
        # Sphinx looks for the anchor of a module without escaping its dots, and says so
        assert not [said for said in visit.problems if "Anchored content block" not in said]


def test_the_mode_switch_changes_the_page(browser, address):
    with Visit(browser, address) as visit:
        colours = set()
        for _ in range(3):
            visit.page.locator("button.theme-switch-button").first.click()
            visit.page.wait_for_timeout(100)
            colours.add(visit.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2


def test_no_address_is_known_so_no_button_points_to_one():
    for path in PAGES:
        assert "colab.research" not in (HTML / path).read_text() or path.startswith(("chapters", "scaling"))
        assert "executablebooks/jupyter-book" not in (HTML / path).read_text()
