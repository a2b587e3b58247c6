"""Look at the page of `pyro-vae explore` in a browser, by hand: CI needs no browser.

    pip install playwright            # and Chromium, from your system
    python docs/look_explorer.py runs/digits [--out build/looks] [--browser /usr/bin/chromium]

It opens the page of a run, on a wide and on a phone-sized window, hovers over a point, clicks it,
moves a slider, and chooses each latent. The page must ask only its own server for anything, must
not be wider than its window, and must print no error. It writes screenshots for you to look at.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

SIZES = {"wide": (1400, 1100), "phone": (390, 844)}


def started(run: Path) -> tuple[subprocess.Popen[str], str]:
    """The server of a run, and its address."""
    words = [sys.executable, "-m", "pyro_vae", "explore", str(run), "--no-browser"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def used(page: Any) -> None:
    """Hover over a point in the middle of the plane, click it, and move the first slider."""
    plane = page.locator(".bk-Figure").first
    plane.scroll_into_view_if_needed()
    places = page.evaluate(
        """() => {
          const document_ = Bokeh.documents[0];
          const plane = document_.get_model_by_name('plane');
          const view = Bokeh.index.find_one_by_id(plane.id);
          const source = plane.renderers[0].data_source;
          const box = view.canvas_view.el.getBoundingClientRect();
          const at = i => [view.frame.x_scale.compute(source.get('across')[i]) + box.x,
                           view.frame.y_scale.compute(source.get('up')[i]) + box.y];
          const n = source.get("across").length;
          return [at(Math.min(3, n - 1)), at(Math.min(11, n - 2))];
        }"""
    )
    page.mouse.move(*places[0])
    page.mouse.click(*places[0])
    page.wait_for_timeout(6000)
    page.mouse.move(*places[1])
    page.wait_for_timeout(1500)


def faults_of(page: Any, address: str, out: Path, name: str) -> list[str]:
    """Open the page, use it, and write its screenshots."""
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".bk-Figure", timeout=20_000)
    page.wait_for_timeout(3000)
    page.screenshot(path=out / f"{name}.png", full_page=True)
    used(page)
    page.screenshot(path=out / f"{name}-clicked.png", full_page=True)
    width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    faults = [f"{width} pixels wider than the window"] if width > 0 else []
    own = address.rpartition("/")[0].replace("http", "")
    outside = [url for url in asked if own not in url and not url.startswith("data:")]
    return faults + [f"asks for {url}" for url in outside] + said


def main() -> None:
    """Look at the page of each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("build/looks"))
    parser.add_argument("--browser", default="/usr/bin/chromium")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chosen.browser, args=["--no-sandbox"])
        for run in chosen.runs:
            server, address = started(run)
            try:
                for size, (width, height) in SIZES.items():
                    name = f"explore-{run.name}-{size}"
                    page = browser.new_page(viewport={"width": width, "height": height})
                    found = faults_of(page, address, chosen.out, name)
                    faults += [f"{name}: {fault}" for fault in found]
                    page.close()
            finally:
                server.terminate()
                server.wait()
    print("\n".join(faults) or f"no faults; look at {chosen.out}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
