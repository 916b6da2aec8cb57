"""The pictures of README and docs, from a run of `make train`: report.png and credit.png.

    python benchmarks/pictures.py RUN [--place "0/train/71/0/KEY"] [--out docs/images]

It needs the extra `browser` and Chromium, as `make test-browser` does. A place is what stands after
`#at/` in the page's address when a response is open; without one it is what the page opens first.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from scsdpo.report import read_runs, write

WIDTH, HEIGHT = 1240, 1130


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--place", default="")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder) / "report.html"
        write(read_runs([given.run]), report)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(f"file://{report}" + (f"#at/{given.place}" if given.place else ""))
        page.wait_for_selector('html[data-responses="ready"]')
        picture_of_response(page, given.out / "credit.png")
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=given.out / "report.png")
        browser.close()


def picture_of_response(page: Page, path: Path) -> None:
    """The credit map alone, with what stands beside it."""
    page.locator("#response").screenshot(path=path)


if __name__ == "__main__":
    main()
