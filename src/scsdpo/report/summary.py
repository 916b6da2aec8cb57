"""What happened, in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from scsdpo.report.configs import short
from scsdpo.report.reading import Run, json_lines


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number that is looked at first."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that looks wrong, and what to do."""

    title: str
    message: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The head of the page."""

    kicker: str
    words: list[str]
    tiles: list[Tile] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A validation figure at the start and at the end."""

    name: str
    before: float
    after: float

    @property
    def points(self) -> float:
        """In percentage points."""
        return 100 * (self.after - self.before)

    def __str__(self) -> str:
        verb = "rose" if self.points > 0 else "fell" if self.points < 0 else "stayed"
        return f"{verb} from {100 * self.before:.1f} to {100 * self.after:.1f} %"


def changes(run: Run) -> dict[str, Change]:
    """Of each validation figure, by name; empty without two validations."""
    if len(run.validations) < 2:
        return {}
    first, last = run.validations[0], run.validations[-1]
    names = [name for name in last if name.startswith("val/") and first.get(name) is not None]
    return {
        name.removeprefix("val/"): Change(
            name=name.removeprefix("val/"), before=first[name], after=last[name]
        )
        for name in names
        if last[name] is not None
    }


def overall(run: Run, kind: str = "mean") -> Change | None:
    """mean@k or maj@k of all validation questions."""
    found = changes(run)
    return next((found[name] for name in found if name.startswith(f"{kind}@")), None)


def summarize(runs: Sequence[Run]) -> Summary:
    """The head of a page."""
    alarms = [alarm for run in runs for alarm in _alarms(run, named=len(runs) > 1)]
    kicker = " · ".join(dict.fromkeys(_made_of(run) for run in runs))
    if len(runs) == 1:
        return Summary(kicker=kicker, words=_words(runs[0]), tiles=_tiles(runs[0]), alarms=alarms)
    return Summary(kicker=kicker, words=_ranking(runs), table=_table(runs), alarms=alarms)


def _made_of(run: Run) -> str:
    model = run.config.get("model") or {}
    policy = ((model.get("policy") or {}).get("init_args") or {}).get("name_or_path", "")
    axes = [
        short(str((model.get(a) or {}).get("class_path", ""))) for a in ("advantage", "weighting")
    ]
    return " · ".join(part for part in (str(policy), *axes) if part)


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for kind in ("mean", "maj"):
        if change := overall(run, kind):
            tiles.append(
                Tile(
                    label=f"{change.name}, held out",
                    value=f"{100 * change.after:.1f} %",
                    detail=f"{change.points:+.1f} points",
                )
            )
    rate = run.recent("pass_rate")
    if rate is not None:
        tiles.append(
            Tile(
                label="pass rate in training", value=f"{100 * rate:.0f} %", detail="last 10 batches"
            )
        )
    if run.training:
        tiles.append(Tile(label="optimizer steps", value=f"{run.lines[-1]['step']:,}"))
        tiles.append(Tile(label="time", value=duration(run)))
    return tiles


def duration(run: Run) -> str:
    """From the first line to the last, and the first batch as long as the others."""
    lines = run.lines
    seconds = lines[-1]["time"] - lines[0]["time"] if lines else 0.0
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _words(run: Run) -> list[str]:
    words = []
    if change := overall(run):
        words.append(f"{change.name} on held-out questions {change} ({change.points:+.1f} points).")
        words += _categories(run, change)
    elif run.validations:
        words.append("It was validated once, so that there is no before and after.")
    shares = [run.recent(name) for name in ("solve_all", "informative", "solve_none")]
    if all(share is not None for share in shares):
        mastered, between, beyond = (100 * (share or 0.0) for share in shares)
        words.append(
            f"Of its last training questions {mastered:.0f} % are mastered, {between:.0f} % are "
            f"solved now and then, {beyond:.0f} % are out of reach."
        )
    return words


def _categories(run: Run, whole: Change) -> list[str]:
    suffix = f"/{whole.name}"
    parts = {n.removesuffix(suffix): c for n, c in changes(run).items() if n.endswith(suffix)}
    if len(parts) < 2:
        return []
    most = max(parts, key=lambda name: parts[name].points)
    least = min(parts, key=lambda name: parts[name].points)
    return [
        f"Most in {most} ({parts[most].points:+.1f}), least in {least} "
        f"({parts[least].points:+.1f})."
    ]


def _ranking(runs: Sequence[Run]) -> list[str]:
    ends = {run.name: change for run in runs if (change := overall(run))}
    if not ends:
        return []
    best = max(ends, key=lambda name: ends[name].after)
    return [f"Highest {ends[best].name} at the end: {best}, {100 * ends[best].after:.1f} %."]


def _table(runs: Sequence[Run]) -> list[list[str]]:
    kinds = [c.name for kind in ("mean", "maj") for c in [overall(runs[0], kind)] if c]
    rows = [["run", *(f"{kind}, %" for kind in kinds), "steps", "time"]]
    for run in runs:
        found = changes(run)
        cells = [
            f"{100 * c.before:.1f} → {100 * c.after:.1f} ({c.points:+.1f})"
            if (c := found.get(kind))
            else "-"
            for kind in kinds
        ]
        steps = f"{run.lines[-1]['step']:,}" if run.lines else "-"
        rows.append([run.name, *cells, steps, duration(run)])
    return rows


def _alarms(run: Run, *, named: bool) -> list[Alarm]:
    return [
        Alarm(
            title=f"{run.name}, step {line['batch']}" if named else f"Step {line['batch']}",
            message=line["message"],
            remedy=line["remedy"],
        )
        for line in json_lines(run.folder / "health.jsonl")
    ]
