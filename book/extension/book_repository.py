"""Buttons that need a public address appear when one is known, and only then.

`BOOK_REPOSITORY_URL` (or, in GitHub's CI, `GITHUB_REPOSITORY`) names the repository: "Open in Colab" and "Repository".
`BOOK_SITE_URL` names the published site: canonical links, previews, sitemap.xml. Without them the site is complete and
points nowhere.
"""

import os
from pathlib import Path
from xml.sax.saxutils import escape


def repository() -> str | None:
    name = os.environ.get("GITHUB_REPOSITORY")
    return os.environ.get("BOOK_REPOSITORY_URL") or (f"https://github.com/{name}" if name else None)


def site() -> str | None:
    address = os.environ.get("BOOK_SITE_URL")
    return address.rstrip("/") + "/" if address else None


def configure(app, config) -> None:
    options = config.html_theme_options
    for key in ("repository_url", "repository_branch", "launch_buttons", "path_to_docs"):
        options.pop(key, None)
    url = repository()
    if url:
        branch = os.environ.get("BOOK_BRANCH", "main")
        launch = {"colab_url": "https://colab.research.google.com"} if "github.com/" in url else {}
        options |= {
            "repository_url": url,
            "repository_branch": branch,
            "launch_buttons": launch,
            "use_repository_button": True,
        }
    if site():
        config.html_baseurl = config.ogp_site_url = site()


def colab(docname: str) -> str | None:
    """Where Colab opens a notebook of the repository; it reads GitHub's alone."""
    url = repository()
    if not url or "github.com/" not in url:
        return None
    branch = os.environ.get("BOOK_BRANCH", "main")
    return url.replace("github.com/", "colab.research.google.com/github/") + f"/blob/{branch}/{docname}.ipynb"


def name_repository(app, docname, source) -> None:
    """The set-up cells show the address from which Colab installs llmlib."""
    url = repository()
    if url:
        source[0] = source[0].replace("https://github.com/OWNER/REPOSITORY", url)


def sitemap(app, exception) -> None:
    if exception or not site():
        return
    pages = sorted(app.builder.get_target_uri(name) for name in app.env.found_docs)
    urls = "".join(f"<url><loc>{escape(site() + page)}</loc></url>" for page in pages)
    head = '<?xml version="1.0" encoding="utf-8"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
    Path(app.outdir, "sitemap.xml").write_text(f"{head}{urls}</urlset>\n")


def setup(app):
    app.add_config_value("comments_config", {}, "html")  # Jupyter Book always sets it, for an extension that isn't used
    app.connect("config-inited", configure)
    app.connect("source-read", name_repository)
    app.connect("build-finished", sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
