"""Look at the page of `pyro-vae explore` in a browser, by hand: CI needs no browser.

    pip install playwright            # and Chromium, from your system
    python docs/look_explorer.py runs/digits [--out build/looks] [--browser /usr/bin/chromium]

It opens the page of a run, on a wide and on a phone-sized window, clicks a point, moves a slider,
hovers over another point, and chooses each latent. The page must ask only its own server for
anything, must not be wider than its window, and must print no error. It writes screenshots for you
to look at.
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


def place(page: Any, row: int) -> tuple[float, float]:
    """Where a point of the plane is in the window, after scrolling to the plane."""
    page.locator(".bk-Figure").first.scroll_into_view_if_needed()
    x, y = page.evaluate(
        """row => {
          const plane = Bokeh.documents[0].get_model_by_name('plane');
          const view = Bokeh.index.find_one_by_id(plane.id);
          const source = plane.renderers[0].data_source;
          const at = Math.min(row, source.get('across').length - 1);
          const box = view.canvas_view.el.getBoundingClientRect();
          return [view.frame.x_scale.compute(source.get('across')[at]) + box.x,
                  view.frame.y_scale.compute(source.get('up')[at]) + box.y];
        }""",
        row,
    )
    return x, y


def used(page: Any) -> None:
    """Click a point, move the first slider, and hover over another point."""
    page.mouse.click(*place(page, 3))
    page.wait_for_timeout(6000)
    handle = page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(8):
        handle.press("ArrowRight")
    page.wait_for_timeout(2500)
    page.mouse.move(*place(page, 11))
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
    said += [] if page.get_by_text("from the code of the datum").count() else ["no slider moved"]
    said += [] if page.get_by_text("Refined posterior").count() else ["nothing was refined"]
    latents = page.locator("select").first.locator("option").all_inner_texts()
    for latent in latents[1:]:
        page.locator("select").first.select_option(label=latent)
        page.wait_for_timeout(2500)
        page.screenshot(path=out / f"{name}-{latent}.png", full_page=True)
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
