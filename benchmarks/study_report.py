"""Tables and plots of `study.py`: means over seeds, differences paired by seed with t(n - 1)."""

import json
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import permutations
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scsdpo.comparison import SeedRow, by_seed
from scsdpo.records.jsonl import with_nulls
from scsdpo.statistics import mean_interval

SMOOTH = 10
"""Batches of the running mean in the plots of training."""
ENDS = {"mean@16": "mean@16, %", "maj@16": "maj@16, %"}
COSTS = {
    "steps": "optimizer steps",
    "trained_rollouts": "rollouts trained on",
    "trained_tokens": "tokens trained on",
    "cpu_seconds": "CPU seconds",
    "response_length": "response length",
    "gradient_norm": "gradient norm",
}


def bounds(curves: Tensor) -> tuple[list[float], list[float]]:
    """Student's 95 % interval of the mean over seeds, point by point; curves [seeds, points]."""
    found = [mean_interval(column) for column in curves.double().T.numpy()]
    known = [not math.isnan(one.low) for one in found]  # a point at which all seeds are alike
    lows = [one.low if there else one.value for one, there in zip(found, known, strict=True)]
    return lows, [one.high if there else one.value for one, there in zip(found, known, strict=True)]


def differences(results: Sequence[dict], ends: Collection[str] = ENDS) -> list[dict]:
    """`method` minus `baseline`, seed by seed, on the seeds that both have; every ordered pair.

    `ahead` counts the seeds in which `method` has more; `tells`: 0 lies outside the interval;
    `tells_all`: outside the one at which all of a baseline's intervals hold (Bonferroni);
    `detectable`: the smallest true difference that is found in 4 of 5 such studies.
    """
    values = {
        method: {run["seed"]: {metric: run[metric] for metric in ends} for run in runs}
        for method, runs in by_method(results).items()
    }
    comparisons = (len(values) - 1) * len(ends)
    return [
        difference(row, method, baseline)
        for method, baseline in permutations(values, 2)
        for row in by_seed(values[baseline], values[method], list(ends), comparisons=comparisons)
    ]


def difference(row: SeedRow, method: str, baseline: str) -> dict:
    """One figure of `method` minus `baseline`."""
    return {
        "method": method,
        "baseline": baseline,
        "metric": row.name,
        "n": row.difference.n,
        "mean": row.difference.value,
        "low": row.difference.low,
        "high": row.difference.high,
        "ahead": row.ahead,
        "tells": row.difference.tells,
        "tells_all": row.joint.tells,
        "detectable": row.detectable,
    }


def by_method(results: Sequence[dict]) -> dict[str, list[dict]]:
    """The runs of each method, in the order of `results`."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def write_rows(rows: Iterable[dict], file: Path) -> None:
    """JSON, a row a line."""
    lines = [json.dumps(with_nulls(row), ensure_ascii=False, allow_nan=False) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def ends_table(results: Sequence[dict]) -> str:
    """Held-out accuracy at the end: mean and sample std over seeds, then the levels."""
    levels = sorted({k for r in results for k in r if k.endswith("/mean@16")})
    rows = []
    for method, runs in by_method(results).items():
        cells = [method, len(runs), f"{runs[0]['setting']['lr']:g}"]
        for name in ENDS:
            values = [100 * run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        cells += [f"{100 * statistics.fmean(run[name] for run in runs):.1f}" for name in levels]
        rows.append(cells)
    return table(["method", "seeds", "lr", *ENDS.values(), *(f"{k}, %" for k in levels)], rows)


def costs_table(results: Sequence[dict]) -> str:
    """A table of what a run takes and how it behaves, in means over seeds."""
    rows = []
    for method, runs in by_method(results).items():
        means = [statistics.fmean(run[name] for run in runs) for name in COSTS]
        rows.append([method, *(f"{m:,.0f}" if m >= 100 else f"{m:.3g}" for m in means)])
    return table(["method", *COSTS.values()], rows)


def windows_table(results: Sequence[dict]) -> str:
    """Share of questions with pass rate in [1/8, 7/8], window by window, means over seeds."""
    rows: list[list[object]] = []
    for method, runs in by_method(results).items():
        windows = torch.tensor([run["windows"]["medium"] for run in runs]).mean(0)
        rows.append([method, *(f"{100 * share:.1f}" for share in windows.tolist())])
    header = [f"window {i + 1}" for i in range(len(results[0]["windows"]["medium"]))]
    return table(["p in [1/8, 7/8], %", *header], rows)


def differences_table(rows: Sequence[dict], baseline: str, ends: Collection[str] = ENDS) -> str:
    """Every other method minus one, in points.

    `*`: 0 lies outside the interval; `**`: also outside the one at which all in the table hold.
    """
    own = [row for row in rows if row["baseline"] == baseline]
    lines: list[list[object]] = []
    for method in dict.fromkeys(row["method"] for row in own):
        cells: list[object] = [method]
        for metric in ends:
            (row,) = (r for r in own if r["method"] == method and r["metric"] == metric)
            names = ("mean", "low", "high", "detectable")
            mean, low, high, detectable = (100 * row[name] for name in names)
            stars = " **" if row["tells_all"] else " *" if row["tells"] else ""
            between = "not known" if math.isnan(low) else f"{low:+.1f} .. {high:+.1f}"
            cells.append(f"{mean:+.1f} ({between}){stars}")
            cells.append(f"{row['ahead']} of {row['n']}")
            cells.append("-" if math.isnan(detectable) else f"{detectable:.1f}")
        lines.append(cells)
    columns = ("points (95 %)", "seeds ahead", "could be found")
    header = [f"{metric}, {column}" for metric in ends for column in columns]
    return table([f"minus {baseline}", *header], lines)


def grid_table(grid: Sequence[dict]) -> str:
    """mean@16 at the end of the grid's runs."""
    lrs = sorted({row["lr"] for row in grid})
    found = {(row["method"], row["lr"]): row["mean@16"] for row in grid}
    rows: list[list[object]] = []
    for method in dict.fromkeys(row["method"] for row in grid):
        means = [statistics.fmean(found[method, lr]) for lr in lrs]
        rows.append([method, *(f"{100 * mean:.1f}" for mean in means)])
    return table(["mean@16, %", *(f"lr {lr:g}" for lr in lrs)], rows)


def markdown(record: dict, baselines: Sequence[str]) -> list[str]:
    """All tables of what `write` puts into study.json."""
    start, runs = record["start"], record["runs"]
    parts = [
        f"Before training, of {start['questions']:,} training questions: p = 0 "
        f"{100 * start['solve_none']:.1f} %, between {100 * start['informative']:.1f} %, p = 1 "
        f"{100 * start['solve_all']:.1f} %; mean p {100 * start['pass_rate']:.1f} %. Held-out "
        f"mean@16: {100 * runs[0]['before']:.1f} %.\n",
        ends_table(runs),
        *(differences_table(record["differences"], baseline) for baseline in baselines),
        costs_table(runs),
        windows_table(runs),
    ]
    return [*parts, grid_table(record["grid"])] if record["grid"] else parts


def smooth(values: Tensor) -> Tensor:
    """Mean of each value of the last dimension and up to `SMOOTH` - 1 before it."""
    total = torch.nn.functional.pad(values.double().cumsum(-1), (1, 0))
    end = torch.arange(1, values.shape[-1] + 1)
    begin = (end - SMOOTH).clamp(min=0)
    return (total[..., end] - total[..., begin]) / (end - begin)


def band(ax: Axes, x: Sequence[float], curves: Tensor, label: str) -> None:
    """Mean over seeds and its 95 % interval; curves [seeds, points]."""
    (line,) = ax.plot(x, curves.mean(0).tolist(), label=label, linewidth=1.4)
    low, high = bounds(curves)
    ax.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)


def panels(results: Sequence[dict], drawn: dict[str, Callable]) -> Figure:
    """A panel a title, three in a row; each takes (axes, method, runs) and draws one method."""
    rows = -(-len(drawn) // 3)
    figure = Figure(figsize=(12.6, 3.2 * rows), layout="constrained")
    for i, (title, draw) in enumerate(drawn.items()):
        ax = figure.add_subplot(rows, 3, i + 1)
        for method, runs in by_method(results).items():
            draw(ax, method, runs)
        ax.set(title=title, xlabel="batch")
        ax.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def validation_plot(results: Sequence[dict]) -> Figure:
    """mean@16 and maj@16 on held-out questions, and mean@16 of each level."""

    def draw(name: str) -> Callable:
        def one(ax: Axes, method: str, runs: Sequence[dict]) -> None:
            curves = 100 * torch.tensor([run["validation"][name] for run in runs])
            band(ax, runs[0]["validated_at"], curves, method)

        return one

    levels = sorted({k for r in results for k in r["validation"] if k.endswith("/mean@16")})
    names = [*ENDS, *levels]
    return panels(results, {f"{name}, %": draw(name) for name in names})


def training_plot(results: Sequence[dict]) -> Figure:
    """Plot the figures of training: running means over `SMOOTH` batches."""

    def draw(name: str, scale: float = 1.0) -> Callable:
        def one(ax: Axes, method: str, runs: Sequence[dict]) -> None:
            length = min(len(run["training"][name]) for run in runs)
            curves = torch.tensor([run["training"][name][:length] for run in runs])
            band(ax, range(1, length + 1), scale * smooth(curves), method)

        return one

    titles = {
        "pass rate in training, %": draw("pass_rate", 100),
        "questions with p in [1/8, 7/8], %": draw("medium", 100),
        "response length, tokens": draw("response_length"),
        "gradient norm before clipping": draw("gradient_norm"),
        "rollouts trained on, a step": draw("trained_rollouts"),
        "questions with p = 1, %": draw("solve_all", 100),
    }
    return panels(results, titles)


def pass_rates_plot(results: Sequence[dict]) -> Figure:
    """The batches' questions by pass rate: none, some or all of the rollouts right."""
    groups = by_method(results)
    figure = Figure(figsize=(2.6 * len(groups), 2.8), layout="constrained")
    for ax, (method, runs) in zip(
        figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups.items(), strict=True
    ):
        layers = [
            100 * smooth(torch.tensor([run["training"][name] for run in runs])).mean(0)
            for name in ("solve_none", "informative", "solve_all")
        ]
        batches = range(1, len(layers[0]) + 1)
        colors = ("#c0504d", "#f2c14e", "#5b8c5a")
        ax.stackplot(batches, *(layer.tolist() for layer in layers), colors=colors)
        ax.set(title=method, xlabel="batch", xlim=(1, len(batches)), ylim=(0, 100))
    figure.axes[0].set_ylabel("questions, %")
    handles = figure.axes[0].collections
    figure.legend(
        handles, ["p = 0", "0 < p < 1", "p = 1"], loc="outside lower center", ncols=3, frameon=False
    )
    return figure


def differences_plot(found: Sequence[dict], baseline: str) -> Figure:
    """Differences to one method with their intervals, a panel a metric."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, metric in zip(figure.subplots(1, len(ENDS), sharey=True), ENDS, strict=True):
        rows = [r for r in found if r["baseline"] == baseline and r["metric"] == metric]
        for y, row in enumerate(rows):
            mean, low, high = (100 * row[k] for k in ("mean", "low", "high"))
            ax.plot([low, high], [y, y], color="tab:blue", linewidth=2)
            ax.plot(mean, y, "o", color="tab:blue" if row["tells"] else "white", mec="tab:blue")
        ax.axvline(0, color="black", linewidth=0.8)
        ax.set(title=f"{metric} - {baseline}'s, points", yticks=range(len(rows)))
        ax.set_yticklabels([row["method"] for row in rows])
        ax.grid(alpha=0.3, axis="x")
    figure.axes[0].invert_yaxis()
    return figure


def write(
    results: Sequence[dict],
    found: dict[tuple[str, float], list[float]],
    rates: Sequence[float],
    baselines: Sequence[str],
    out: Path,
) -> None:
    """Write study.json, study.md and the plots; print the tables.

    Args:
        results: the runs, as study.py makes them.
        found: the grid's final mean@16 by method and learning rate.
        rates: pass rates of the training questions before training.
        baselines: methods to compare the others with; those without a run are left out.
        out: the folder.
    """
    gaps = differences(results)
    baselines = [b for b in baselines if b in by_method(results)]
    series = ("training", "validation")
    record = {
        "start": {
            "questions": len(rates),
            "pass_rate": statistics.fmean(rates),
            "solve_none": statistics.fmean(p == 0 for p in rates),
            "informative": statistics.fmean(0 < p < 1 for p in rates),
            "solve_all": statistics.fmean(p == 1 for p in rates),
        },
        "runs": [{k: v for k, v in r.items() if k not in series} for r in results],
        "differences": gaps,
        "grid": [{"method": m, "lr": lr, "mean@16": v} for (m, lr), v in found.items()],
    }
    (out / "study.json").write_text(json.dumps(record, indent=1) + "\n")
    text = "\n".join(markdown(record, baselines))
    (out / "study.md").write_text(text)
    figures = {
        "validation": validation_plot(results),
        "training": training_plot(results),
        "pass_rates": pass_rates_plot(results),
        **{f"against-{b}": differences_plot(gaps, b) for b in baselines},
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=90)
    print(text)
