"""Tables of `real.py`: what became of each policy under each method, from a file of rows.

    python benchmarks/real_report.py docs/real/runs.json

A file has one run a line, sorted by policy, method, seed and device. The tables show the runs that
were trained to their end and have a log; of several of the same policy, method and seed the one on
CPU. All others are listed in a table of their own.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from study_report import by_method, difference, differences_table, table, write_rows

from scsdpo.comparison import by_seed
from scsdpo.statistics import Estimate, mean_interval

CPU = "CPU"
ENDS = {"mean@8": "mean@8, %", "maj@8": "maj@8, %"}
WINDOW = 5
"""Batches at either end of training whose mean is shown."""
TRAINING = {
    "response_length": "length",
    "truncated": "truncated",
    "entropy": "entropy",
    "pass_rate": "pass rate",
}
BASELINES = ("grpo", "sdpo", "warm-grpo", "warm-only")
LEAST = 3
"""Seeds of an interval: of two that happen to be alike it would have no width."""
STARTS = {"warm": "after a warm-up", "plain": "after a warm-up without demonstrations"}
"""How a policy's name is said, where its folder's name alone says too little."""
Row = dict
"""A run, as `real.result` makes it."""


def key(row: Row) -> tuple:
    """What tells one run from another."""
    return (row["policy"], row["method"], row["seed"], row["device"])


def read(file: Path) -> list[dict]:
    """The rows of a file; none if there is no file."""
    return json.loads(file.read_text()) if file.exists() else []


def write(rows: Iterable[Row], file: Path) -> None:
    """One run a line, sorted."""
    write_rows(sorted(rows, key=key), file)


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All runs; a new one replaces an old one of its key, unless only the old one is done."""
    found = {key(row): row for row in old}
    for row in new:
        before = found.get(key(row))
        if before is None or row["done"] or not before["done"]:
            found[key(row)] = row
    return sorted(found.values(), key=key)


def merge(rows: Iterable[Row], file: Path) -> None:
    """Add rows to a file."""
    write(merged(read(file), rows), file)


def is_complete(row: Row) -> bool:
    """Whether the run went to its end and has a log."""
    return row["done"] and row["cpu_seconds"] is not None


def order(device: str) -> tuple[bool, str]:
    """The CPU before others."""
    return (device != CPU, device)


def chosen(rows: Iterable[Row]) -> list[Row]:
    """Of each policy, method and seed the complete run on CPU, or else on another device."""
    found: dict[tuple, Row] = {}
    for row in sorted(filter(is_complete, rows), key=lambda row: order(row["device"])):
        found.setdefault(key(row)[:3], row)
    return sorted(found.values(), key=key)


def best_first(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each method, the largest mean gain first."""
    groups = by_method(rows)
    names = sorted(groups, key=lambda name: -statistics.fmean(map(gain, groups[name])))
    return {name: groups[name] for name in names}


def gain(row: Row) -> float:
    """Points of held-out mean@8."""
    return 100 * (row["mean@8"] - row["mean@8 before"])


def where(row: Row) -> str:
    """The run's seed, and its device if it is another than the CPU."""
    return f"{row['seed']}" if row["device"] == CPU else f"{row['seed']} ({row['device']})"


def points(found: Estimate) -> str:
    """A mean of points, with its interval if there are seeds enough."""
    known = found.n >= LEAST and not math.isnan(found.low)
    between = f" ({found.low:+.1f} .. {found.high:+.1f})" if known else ""
    return f"{found.value:+.1f}{between}"


def ends_table(rows: Sequence[Row]) -> str:
    """Held-out accuracy after training, seed by seed, and what training looked like."""
    lines: list[list[object]] = []
    for method, runs in best_first(rows).items():
        cells: list[object] = [f"`{method}`", len(runs)]
        cells.append("; ".join(f"{where(run)}: {100 * run['mean@8']:.1f}" for run in runs))
        cells.append(f"{100 * statistics.fmean(run['maj@8'] for run in runs):.1f}")
        gains = [gain(run) for run in runs]
        cells += [points(mean_interval(gains)), f"{min(gains):+.1f}"]
        for name in TRAINING:
            if any(run[name] is None for run in runs):  # nothing was sampled
                cells.append("-")
                continue
            first, last = (statistics.fmean(run[name][i] for run in runs) for i in (0, 1))
            digits = 1 if name == "response_length" else 2
            cells.append(f"{first:.{digits}f} -> {last:.{digits}f}")
        minutes = [run["cpu_seconds"] / 60 for run in runs if run["device"] == CPU]
        lines.append([*cells, f"{statistics.fmean(minutes):.0f}" if minutes else "-"])
    names = ["method", "seeds", "mean@8 after, % (by seed)", ENDS["maj@8"]]
    names += ["gain, points (95 %)", "worst seed", *TRAINING.values(), "CPU min"]
    return table(names, lines)


def pairs(rows: Sequence[Row], baseline: str, method: str) -> list[tuple[Row, Row]]:
    """Runs of two methods of one policy, by seed: on one device where both have one there."""
    found = []
    own: dict[str, dict[int, dict[str, Row]]] = {baseline: {}, method: {}}
    for row in filter(is_complete, rows):
        if row["method"] in own:
            own[row["method"]].setdefault(row["seed"], {})[row["device"]] = row
    for seed in sorted(own[baseline].keys() & own[method].keys()):
        left, right = own[baseline][seed], own[method][seed]
        both = sorted(left.keys() & right.keys(), key=order)
        a, b = (both[0],) * 2 if both else (min(left, key=order), min(right, key=order))
        found.append((left[a], right[b]))
    return found


def differences(rows: Sequence[Row], baseline: str) -> list[dict]:
    """Each method with pairs enough minus `baseline`, as `study_report.differences` has it.

    `tells_all` is at the level at which all of these intervals hold. A method's name is followed
    by the seeds whose runs were on two devices.
    """
    others = [name for name in best_first(chosen(rows)) if name != baseline]
    found = {name: pairs(rows, baseline, name) for name in others}
    told = {name: own for name, own in found.items() if len(own) >= LEAST}
    lines = []
    for method, own in told.items():
        mixed = [str(a["seed"]) for a, b in own if a["device"] != b["device"]]
        label = f"`{method}`" + (f" (on two devices: {', '.join(mixed)})" if mixed else "")
        a, b = ({pair[i]["seed"]: pair[i] for pair in own} for i in (0, 1))
        count = len(told) * len(ENDS)
        lines += [
            difference(row, label, baseline) for row in by_seed(a, b, list(ENDS), comparisons=count)
        ]
    return lines


def warnings_table(rows: Iterable[Row]) -> str:
    """Of each run, the batch at which each rule of training spoke first."""
    lines = []
    for method, runs in by_method(sorted(filter(is_complete, rows), key=key)).items():
        said = [
            f"{where(run)}: "
            + (", ".join(f"{rule} at {batch}" for rule, batch in run["warnings"].items()) or "none")
            for run in runs
        ]
        lines.append([f"`{method}`", "; ".join(said)])
    return table(["method", "health rules, at batch (by seed)"], lines)


def others_table(rows: Sequence[Row]) -> str:
    """The runs with a validation after the first that are in no table above."""
    shown = {key(row) for row in chosen(rows)}
    lines = [
        [
            f"`{row['method']}`",
            row["seed"],
            row["device"],
            start(row["policy"]),
            why(row),
            ", ".join(f"{batch}: {100 * v:.1f}" for batch, v in row["validation"].items()),
        ]
        for row in sorted(rows, key=key)
        if key(row) not in shown and len(row["validation"]) > 1
    ]
    header = ["method", "seed", "device", "policy", "why it is here", "mean@8 by batch, %"]
    return table(header, lines) if lines else ""


def why(row: Row) -> str:
    """The reason for which a run is in no other table."""
    if not row["done"]:
        return f"cut off after {row['batches']} batches"
    return "another run of this seed" if is_complete(row) else "no log"


def start(policy: str) -> str:
    """A policy's name, in words."""
    return STARTS.get(policy, policy)


def count(runs: Sequence) -> str:
    """So many runs, in words."""
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"


def before(rows: Sequence[Row]) -> str:
    """A policy's accuracy before training, and its runs."""
    own = chosen(rows)
    mean, majority = (
        100 * statistics.fmean(run[f"{name} before"] for run in own) for name in ("mean@8", "maj@8")
    )
    words = start(own[0]["policy"])
    return (
        f"{words[0].upper()}{words[1:]}, {count(own)}: mean@8 {mean:.1f} %, maj@8 "
        f"{majority:.1f} % before training. Where there is an arrow: the means of the first and of "
        f"the last {WINDOW} batches.\n"
    )


def costs(rows: Sequence[Row]) -> str:
    """CPU hours of all runs that were trained to their end, by device."""
    spent: dict[str, list[float]] = {}
    for row in filter(is_complete, rows):
        spent.setdefault(row["device"], []).append(row["cpu_seconds"] / 3600)
    said = [
        f"{sum(spent[device]):.1f} for {count(spent[device])} "
        + ("on CPU" if device == CPU else f"on the host of an {device}")
        for device in sorted(spent, key=order)
    ]
    return f"CPU hours: {', '.join(said)}.\n"


def tables(rows: Sequence[Row], baselines: Sequence[str] = BASELINES) -> list[str]:
    """All tables and what is said beside them, policy by policy."""
    parts = []
    for policy in dict.fromkeys(row["policy"] for row in chosen(rows)):
        own = [row for row in rows if row["policy"] == policy]
        parts += [before(own), ends_table(chosen(own))]
        for baseline in baselines:
            if found := differences(own, baseline):
                parts.append(differences_table(found, baseline, ENDS))
        parts.append(warnings_table(own))
    return [*parts, *filter(None, [others_table(rows)]), costs(rows)]


if __name__ == "__main__":
    print("\n".join(tables(read(Path(sys.argv[1])))))
