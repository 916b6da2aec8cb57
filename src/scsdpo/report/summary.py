"""The head of a report: what happened, in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scsdpo.io.files import whole_lines
from scsdpo.report.configs import short
from scsdpo.report.evaluations import difference, solved_difference
from scsdpo.report.reading import PHASES, Run
from scsdpo.statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class FigureChange:
    """A figure at the first validation and at the last."""

    name: str
    before: float
    after: float

    @property
    def points(self) -> float:
        """The change in percentage points."""
        return 100 * (self.after - self.before)

    def __str__(self) -> str:
        ends = f"from {100 * self.before:.1f} to {100 * self.after:.1f} %"
        return f"{'rose' if self.points > 0 else 'fell' if self.points < 0 else 'went'} {ends}"


def figure_changes(run: Run) -> dict[str, FigureChange]:
    """The change of each validation figure, by name; empty without two validations."""
    if len(run.validations) < 2:
        return {}
    first, last = run.validations[0], run.validations[-1]
    return {
        (name := key.removeprefix("val/")): FigureChange(
            name=name, before=first[key], after=last[key]
        )
        for key in last
        if key.startswith("val/") and first.get(key) is not None and last[key] is not None
    }


def overall(run: Run, kind: str = "mean") -> FigureChange | None:
    """The change of mean@k or maj@k of all validation questions; None: not known."""
    found = figure_changes(run)
    return next((found[name] for name in found if name.startswith(f"{kind}@")), None)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A key number at the top of the page."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A warning, with its remedy."""

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


def summarize(runs: Sequence[Run]) -> Summary:
    """The head of a page."""
    alarms = [alarm for run in runs for alarm in _alarms(run, named=len(runs) > 1)]
    kicker = " / ".join(dict.fromkeys(_made_of(run) for run in runs))
    if len(runs) == 1:
        return Summary(kicker=kicker, words=_words(runs[0]), tiles=_tiles(runs[0]), alarms=alarms)
    words = [*_ranking(runs), *_against_first(runs)]
    return Summary(kicker=kicker, words=words, table=_table(runs), alarms=alarms)


def _made_of(run: Run) -> str:
    model = run.config.get("model") or {}
    policy = ((model.get("policy") or {}).get("init_args") or {}).get("name_or_path", "")
    chosen = [model.get(axis) or {} for axis in ("teacher", "advantage", "weighting")]
    axes = [short(str(axis.get("class_path", ""))) for axis in chosen]
    return " · ".join(part for part in (str(policy), *axes) if part)


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for kind in ("mean", "maj"):
        if change := overall(run, kind):
            value, detail = f"{100 * change.after:.1f} %", f"{change.points:+.1f} points"
            tiles.append(Tile(label=f"{change.name}, validation", value=value, detail=detail))
    rate = run.recent("pass_rate")
    if rate is not None:
        value = f"{100 * rate:.0f} %"
        tiles.append(Tile(label="pass rate, training", value=value, detail="last 10 batches"))
    if run.training:
        batches, steps = run.lines[-1]["batch"], run.lines[-1]["step"]
        detail = "" if batches == steps else f"of {batches:,} batches"
        tiles.append(Tile(label="optimizer steps", value=f"{steps:,}", detail=detail))
        tiles.append(Tile(label="time", value=duration(run), detail=_speed(run)))
    return tiles


def _speed(run: Run) -> str:
    tokens, seconds = run.recent("tokens/rollout"), run.recent("seconds/rollout")
    return f"{tokens / seconds:,.0f} tokens/s sampled" if tokens and seconds else ""


def duration(run: Run) -> str:
    """Time from the first line to the last."""
    seconds = run.lines[-1]["time"] - run.lines[0]["time"] if run.lines else 0.0
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _words(run: Run) -> list[str]:
    words = []
    if change := overall(run):
        words.append(f"{_capital(change.name)} on {_questions(run)} {change}{_known(run, change)}.")
        words[-1] += _categories(run, change)
        words += _solved(run)
    elif run.validations:
        words.append("It was validated once, so that there is no before and after.")
    shares = [run.recent(name) for name in ("solve_all", "informative", "solve_none")]
    if all(share is not None for share in shares):
        mastered, between, beyond = (100 * (share or 0.0) for share in shares)
        words.append(
            f"Of the questions it was last trained on {mastered:.0f} % are mastered, {between:.0f} "
            f"% are solved now and then and can teach, {beyond:.0f} % are out of reach."
        )
    return [*words, *_time(run), *_health(run)]


def _fallen(run: Run) -> list[str]:
    """Validation figures that fell, among those that the summary names."""
    change, ends = overall(run), list(run.evaluations.values())
    estimate = solved_difference(ends[-1], ends[0]) if len(ends) > 1 else None
    fell = [change.name] if change is not None and change.points < 0 else []
    if estimate is not None and estimate.tells and estimate.value < 0:
        fell.append("the share of questions with any right response")
    return fell


def _questions(run: Run) -> str:
    known = list(run.evaluations.values())
    count = f"{len(known[-1].scores):,} " if known else ""
    data = run.config.get("data") or {}
    same = data.get("train") is not None and data.get("train") == data.get("val")
    return f"the {count}training questions themselves" if same else f"{count}held-out questions"


def _known(run: Run, change: FigureChange) -> str:
    """The interval of a change, if the evaluations were kept."""
    ends = list(run.evaluations.values())
    estimate = difference(ends[-1], ends[0]) if len(ends) > 1 else None
    if estimate is None:
        return f", {change.points:+.1f} points"
    return f", {change.points:+.1f} points ({_interval(estimate)}){_unclear(estimate)}"


def _interval(estimate: Estimate) -> str:
    return f"95 % interval {100 * estimate.low:+.1f} to {100 * estimate.high:+.1f}"


def _unclear(estimate: Estimate) -> str:
    return "" if estimate.tells else ", which these questions do not tell from zero"


def _categories(run: Run, whole: FigureChange) -> str:
    suffix = f"/{whole.name}"
    parts = {
        n.removesuffix(suffix): c for n, c in figure_changes(run).items() if n.endswith(suffix)
    }
    if len(parts) < 2:
        return ""
    most = max(parts, key=lambda name: parts[name].points)
    least = min(parts, key=lambda name: parts[name].points)
    return (
        f" The most in {most} ({parts[most].points:+.1f}), the least in {least} "
        f"({parts[least].points:+.1f})."
    )


def _solved(run: Run) -> list[str]:
    """The change of the share of questions with a right response, pass@k at the largest k."""
    ends = list(run.evaluations.values())
    estimate = solved_difference(ends[-1], ends[0]) if len(ends) > 1 else None
    if estimate is None or not estimate.tells:
        return []
    then, now = (100 * sum(e.solved.values()) / len(e.solved) for e in (ends[0], ends[-1]))
    meaning = (
        "the policy solves questions that it could not"
        if estimate.value > 0
        else "the policy has become surer, and tries less"
    )
    return [
        f"Questions with any right response went from {then:.1f} to {now:.1f} % "
        f"({_interval(estimate)}): {meaning}."
    ]


def _time(run: Run) -> list[str]:
    seconds = {words: run.recent(f"seconds/{name}") or 0.0 for name, words in PHASES.items()}
    if not (total := sum(seconds.values())):
        return []
    longest = sorted(seconds, key=lambda words: -seconds[words])[:2]
    shares = [f"{100 * seconds[words] / total:.0f} % in {words}" for words in longest]
    return [f"A batch takes {total:.3g} s, {' and '.join(shares)}."]


def _health(run: Run) -> list[str]:
    """A sentence if the health rules ran and found nothing; findings are shown elsewhere."""
    looked = (run.config.get("health") or {"rules": []}).get("rules") != []  # null: all that ship
    if not looked or _warnings(run):
        return []
    if fallen := _fallen(run):
        return [
            f"The health rules found nothing in the training figures; that {' and '.join(fallen)} "
            "fell is no figure of theirs."
        ]
    return ["None of the health rules found anything wrong."]


def _warnings(run: Run) -> list[dict[str, Any]]:
    return list(whole_lines(run.folder / "health.jsonl", "rule", "batch", "message", "remedy"))


def _ranking(runs: Sequence[Run]) -> list[str]:
    ends = {run.name: change for run in runs if (change := overall(run))}
    if not ends:
        return []
    best = max(ends, key=lambda name: ends[name].after)
    return [f"{best} ends highest, with {ends[best].name} of {100 * ends[best].after:.1f} %."]


def _against_first(runs: Sequence[Run]) -> list[str]:
    """Differences to the first run at the last validation, paired by question."""
    first, words = runs[0], []
    for run in runs[1:]:
        if not (run.evaluations and first.evaluations):
            continue
        own, other = list(run.evaluations.values())[-1], list(first.evaluations.values())[-1]
        if estimate := difference(own, other):
            words.append(
                f"{run.name} against {first.name}, paired by question: {100 * estimate.value:+.1f} "
                f"points ({_interval(estimate)}){_unclear(estimate)}."
            )
    if words:
        words.append(
            "These are single runs: what other seeds would give is not in the intervals "
            "(scsdpo compare)."
        )
    return words


def _table(runs: Sequence[Run]) -> list[list[str]]:
    kinds = [change.name for kind in ("mean", "maj") if (change := overall(runs[0], kind))]
    rows = [["run", *(f"{kind}, %" for kind in kinds), "pass rate, %", "steps", "time"]]
    for run in runs:
        found, rate = figure_changes(run), run.recent("pass_rate")
        cells = [
            f"{100 * c.before:.1f} → {100 * c.after:.1f} ({c.points:+.1f})"
            if (c := found.get(kind))
            else ""
            for kind in kinds
        ]
        steps = f"{run.lines[-1]['step']:,}" if run.lines else ""
        share = "" if rate is None else f"{100 * rate:.0f}"
        rows.append([run.name, *cells, share, steps, duration(run)])
    return rows


def _alarms(run: Run, *, named: bool) -> list[Alarm]:
    return [
        Alarm(
            title=f"{f'{run.name}, ' if named else ''}{line['rule']}, batch {line['batch']}",
            message=_capital(line["message"]),
            remedy=_capital(line["remedy"]),
        )
        for line in _warnings(run)
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
