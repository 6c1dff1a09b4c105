"""Check the links of the built site, and its pages in a browser.

    python docs/check_site.py build/site

Without a browser: every link and anchor within the site resolves, and no page makes a browser fetch a file
from another host. In headless Chromium, if it is installed: no error or warning in the console, no request to
another host, no failed request, and nothing wider than a phone of 390 pixels.
"""

import argparse
import functools
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
"""Tags whose files a browser fetches by itself, and the attribute with the address."""

# Elements beyond the right edge of the window, except inside elements that scroll.
TOO_WIDE = """() => {
  const scrolls = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (/auto|scroll|hidden/.test(getComputedStyle(p).overflowX)) return true; return false; };
  const edge = e => e.getBoundingClientRect().right;
  const wide = [...document.querySelectorAll('.md-content *, .md-header *')]
    .filter(e => e.checkVisibility() && edge(e) > innerWidth + 1 && !scrolls(e));
  const page = document.documentElement.scrollWidth > innerWidth ? ['the page'] : [];
  return page.concat(wide.slice(0, 3).map(e => e.tagName.toLowerCase() + '.' + e.className + ': '
    + e.textContent.trim().slice(0, 50)));
}"""


class Anatomy(HTMLParser):
    """Links, anchors and fetched addresses of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the anchors, links and fetched addresses of a tag."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in FETCHED and FETCHED[tag] in values and values.get("rel") != "canonical":
            self.fetched.append(values[FETCHED[tag]])


def broken_links(site: Path) -> list[str]:
    """Links, anchors and files within the site that do not exist, and files fetched from another host."""
    pages = {page: Anatomy(page) for page in sorted(site.rglob("*.html"))}
    problems = []
    for page, anatomy in pages.items():
        address = f"/{page.relative_to(site).as_posix()}"
        for link in {*anatomy.links, *anatomy.fetched}:
            target = urlparse(urljoin(address, link))
            if target.scheme or target.netloc:
                if link in anatomy.fetched:
                    problems.append(f"{address} fetches {link} from another host")
                continue
            path = site / unquote(target.path).lstrip("/")
            path = path / "index.html" if path.is_dir() else path
            if not path.is_file():
                problems.append(f"{address} links to {link}, which does not exist")
            elif target.fragment and path in pages and unquote(target.fragment) not in pages[path].anchors:
                problems.append(f"{address} links to {link}, a page without that anchor")
    return problems


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site while it is served from this machine."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def seen_by_a_browser(site: Path, browser: str, pictures: Path | None = None) -> list[str]:
    """Problems of the pages in a browser, at the widths of a desktop and a phone.

    Args:
        site: The built site.
        browser: Path of Chromium.
        pictures: A folder for a picture of every page at both widths; none are taken when omitted.
    """
    from playwright.sync_api import sync_playwright

    problems: list[str] = []
    with served(site) as address, tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=browser, headless=True, args=list(FLAGS), viewport=DESKTOP
        )
        tab, where = context.pages[0], [""]

        def check_request(request: object) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                problems.append(f"{where[0]} requests {request.url} from another host")

        def check_message(message: object) -> None:
            if message.type in ("error", "warning"):
                problems.append(f"{where[0]} logs to the console: {message.text}")

        def check_response(response: object) -> None:
            if response.status >= 400:
                problems.append(f"{where[0]} gets {response.status} for {response.url}")

        tab.on("request", check_request)
        tab.on("console", check_message)
        tab.on("response", check_response)
        tab.on("pageerror", lambda error: problems.append(f"{where[0]} fails in a script: {error}"))
        for page in sorted(site.rglob("*.html")):
            where[0] = f"/{page.relative_to(site).as_posix()}"
            if page.name == "404.html":
                continue  # its links are right only for a site at the root of a host
            tab.set_viewport_size(DESKTOP)
            tab.goto(f"{address}{where[0].removesuffix('index.html')}", wait_until="load")
            _picture(tab, pictures, where[0], "desk")
            tab.set_viewport_size(PHONE)
            problems += [f"{where[0]} is wider than a phone: {wide}" for wide in tab.evaluate(TOO_WIDE)]
            _picture(tab, pictures, where[0], "phone")
        context.close()
    return problems


def _picture(tab: object, folder: Path | None, page: str, width: str) -> None:
    if folder is not None:
        name = page.strip("/").removesuffix("index.html").strip("/").replace("/", "-") or "index"
        tab.screenshot(path=folder / f"{name}-{width}.png")


def main() -> None:
    """Report every problem; exit with code 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("--pictures", type=Path, help="folder for a picture of every page at both widths")
    args = parser.parse_args()
    if not (args.site / "index.html").is_file():
        sys.exit(f"{args.site} contains no site; `make docs` builds it")
    count = len(list(args.site.rglob("*.html")))
    problems = broken_links(args.site)
    if args.browser:
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
        problems += seen_by_a_browser(args.site, args.browser, args.pictures)
        how = f"in {args.browser} at {DESKTOP['width']} and {PHONE['width']} pixels"
    else:
        how = "only links: SKIPPED the checks in a browser, because Chromium is not installed"
    print("\n".join([*problems, f"{count} pages, {how}: {len(problems)} problems"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
