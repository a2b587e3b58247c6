"""Look at the built site in a browser, by hand: CI needs no browser.

    pip install playwright            # and Chromium, from your system
    python docs/look.py [--out build/looks] [--browser /usr/bin/chromium]

It opens every page from its file, on a wide and on a phone-sized window. No page may be wider than
its window, and none may ask the network for anything. It searches without a server. It writes
screenshots of some pages, light and dark, for you to look at.
"""

import argparse
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

SITE = Path(__file__).parent.parent / "build" / "site"
SIZES = {"wide": (1400, 900), "phone": (390, 844)}
SHOWN = ("index", "get-started", "how-to/evaluation", "diagnostics/gaps", "api/training", "faq")
QUESTIONS = {"collapsed": "diagnostics/collapse", "resume": "how-to/runs", "LinearSchedule": "api/"}


def faults_of(page: Any, path: Path) -> list[str]:
    """Whether the page is too wide, or wants the network."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    name = path.relative_to(SITE)
    wide = [f"{name}: {width} pixels wider than the window"] if width > 0 else []
    outside = [url for url in asked if not url.startswith(("file:", "data:"))]
    return wide + [f"{name}: asks for {url}" for url in outside]


def found(page: Any, words: str) -> list[str]:
    """The pages that the search finds."""
    page.goto((SITE / "search.html").as_uri() + f"?q={words}")
    page.wait_for_selector("ul.search a", timeout=20_000)
    page.wait_for_timeout(1500)
    return [link.get_attribute("href") for link in page.query_selector_all("ul.search a")]


def main() -> None:
    """Open the pages, search, and write the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SITE.parent / "looks")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chosen.browser, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            size = {"width": width, "height": height}
            for path in sorted(SITE.rglob("*.html")):
                page = browser.new_page(viewport=size)
                faults += [f"{name}: {fault}" for fault in faults_of(page, path)]
                page.close()
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=size, color_scheme=scheme)
                for shown in SHOWN:
                    page.goto((SITE / f"{shown}.html").as_uri())
                    target = chosen.out / f"{shown.replace('/', '-')}-{name}-{scheme}.png"
                    page.screenshot(path=target)
                page.close()
        page = browser.new_page()
        for words, expected in QUESTIONS.items():
            hits = found(page, words)
            print(f"{words}: {len(hits)} pages, first {hits[:3]}")
            if not any(expected in hit for hit in hits[:10]):
                faults.append(f"a search for {words} does not find {expected}")
    print("\n".join(faults) or f"no faults; look at {chosen.out}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
