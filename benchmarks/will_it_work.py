"""Puts the tables of docs/real into docs/will-it-work.md, between the marks of each.

python benchmarks/will_it_work.py
"""

import check
import real_report
from study import ROOT

REAL = ROOT / "docs" / "real"
PAGE = ROOT / "docs" / "will-it-work.md"


def tables() -> dict[str, str]:
    """Content of the page, by its mark."""
    pairs = check.read(REAL / "check.json")
    kept_back = {name: found for name, found in pairs.items() if name in check.KEPT_BACK}
    others = {name: found for name, found in pairs.items() if name not in check.KEPT_BACK}
    return {
        "checks": check.markdown(others),
        "kept back": check.markdown(kept_back),
        "runs": "\n".join(real_report.tables(real_report.read(REAL / "runs.json"))),
    }


def filled(page: str) -> str:
    """The page with the tables of today.

    Raises:
        ValueError: if a mark is missing.
    """
    for name, text in tables().items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, opened, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"{PAGE.name} lacks {start.strip()} or {end}")
        page = f"{before}{start}\n{text.strip()}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
