"""Render the report: one HTML page that loads nothing from elsewhere."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scsdpo.io.files import write_whole
from scsdpo.report import palette, svg
from scsdpo.report.configs import differences, parts
from scsdpo.report.curves import one_step_a_batch
from scsdpo.report.figures import Section, sections
from scsdpo.report.pack import content_hash, pack, readable
from scsdpo.report.panels import Dots, Line, Panel
from scsdpo.report.reading import Run
from scsdpo.report.responses import Embedded, embed
from scsdpo.report.summary import Summary, summarize

MOST_BYTES = 9_500_000
"""Limit on the size of a page."""
STYLES = ("report.css", "credit.css")
SCRIPTS = ("base.js", "plots.js", "explorer.js", "credit.js")


@dataclass(frozen=True, kw_only=True)
class DrawnPanel:
    """A panel with its SVG and its data for the scripts."""

    panel: Panel
    svg: Markup
    data: dict[str, Any]

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Tone, label, and "dots" or dashes; empty if a single layer needs no name."""
        layers = [each for each in self.panel.layers if not (isinstance(each, Line) and each.weak)]
        alone = {each.tone: isinstance(each, Dots) and not each.joined for each in layers}
        entries = dict.fromkeys((each.tone, each.label) for each in layers)
        if len(entries) < 2:
            return []
        return [
            (tone, label, "dots" if alone[tone] else palette.dashes(tone))
            for tone, label in entries
        ]


def drawn(panel: Panel) -> DrawnPanel:
    """Draw a panel."""
    picture, data = svg.draw(panel)
    return DrawnPanel(panel=panel, svg=Markup(picture), data=data)


def render(runs: Sequence[Run], most_bytes: int = MOST_BYTES) -> str:
    """The page of these runs, of at most `most_bytes` bytes unless its curves alone are larger.

    Larger data are packed (`pack.py`). Texts of runs are escaped by Jinja or set as text by the
    scripts, never as markup.
    """
    shown = [_shown(section) for section in sections(runs)]
    page = _page(runs, shown, Embedded(index=[{} for _ in runs]))
    room = most_bytes - len(page.encode())
    while room > 0:
        whole = _page(runs, shown, embed(runs, room))
        if len(whole.encode()) <= most_bytes:
            return whole
        room = int(0.9 * room)  # the index grows with the embedded files
    return page


def _page(runs: Sequence[Run], shown: list[dict[str, Any]], embedded: Embedded) -> str:
    style, script = Markup(_style()), Markup("\n".join(_asset(name) for name in SCRIPTS))
    policy = (
        f"default-src 'none'; style-src {content_hash(style)}; script-src {content_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    panels = [each.data for section in shown for each in section["drawn"]]
    summary: Summary = summarize(runs)
    environment = Environment(
        loader=PackageLoader("scsdpo.report"),
        autoescape=True,
        finalize=_readable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        kicker=summary.kicker,
        tiles=summary.tiles,
        words=summary.words,
        table=summary.table,
        alarms=summary.alarms,
        policy=policy,
        style=style,
        script=script,
        sections=shown,
        runs=[_described(i, run) for i, run in enumerate(runs)],
        differences=_differences(runs),
        embedded=embedded,
        room=embedded.room,
        unit="step" if one_step_a_batch(runs) else "batch",
        panels=pack(panels),
        index=pack(embedded.index),
        version=version("scsdpo"),
        date=time.strftime("%Y-%m-%d"),
    )


def _readable(value: Any) -> Any:
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _shown(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "title": section.title,
        "short": section.short,
        "lead": section.lead,
        "drawn": [drawn(panel) for panel in section.panels],
    }


def _described(i: int, run: Run) -> dict[str, Any]:
    tone = palette.run_tone(i)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "tone": tone,
        "dash": palette.dashes(tone),
        "parts": parts(run),
        "config_text": run.config_text,
        "environment": run.environment,
    }


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Differences of configurations as table rows; empty if there are none."""
    rows = [[key, *(value or "-" for value in values)] for key, values in differences(runs)]
    return [["key", *(run.name for run in runs)], *rows] if rows else []


def _style() -> str:
    """The style sheet: colors as variables, light and dark, then the styles."""
    light, dark = _variables(palette.LIGHT), _variables(palette.DARK)
    tones = [f".{tone} {{ --tone: var(--{tone}); }}" for tone in palette.LIGHT]
    hidden = [
        f".off-run-{n} .plot .run-{n}, .off-run-{n} .legend .run-{n} {{ display: none; }}"
        for n in range(palette.RUNS)
    ]
    return "\n".join(
        [
            f":root {{ color-scheme: light; {light} }}",
            "@media (prefers-color-scheme: dark) {"
            f':root:not([data-theme="light"]) {{ color-scheme: dark; {dark} }} }}',
            f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}',
            *tones,
            *hidden,
            *_credit_classes(),
            *(_asset(name) for name in STYLES),
        ]
    )


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def _credit_classes() -> Iterable[str]:
    """A background class for each tenth of the credit scale, with at most 60 % of the color."""
    for side, sign in (("right", ""), ("wrong", "-")):
        for n in range(1, 11):
            mixed = f"color-mix(in oklab, var(--{side}) {6 * n}%, transparent)"
            yield f".t{sign}{n} {{ background: {mixed}; }}"


def _asset(name: str) -> str:
    return (files("scsdpo.report") / "assets" / name).read_text(encoding="utf-8")


def write(runs: Sequence[Run], out: Path) -> None:
    """Render the page into a file."""
    write_whole(out, render(runs))
