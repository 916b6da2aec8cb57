"""Plots of `scsdpo analyze`; needs matplotlib, which the extra `report` installs."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

TITLES = {
    "reverse_kl": "reverse KL(S || T)",
    "jsd": "JSD(S, T)",
    "log_teacher_over_student": "log T(y) / S(y)",
    "half_log_student_over_mixture": "1/2 log S(y) / M(y)",
}


def plot_analysis(report: dict[str, Any], path: Path) -> None:
    """Plot the density of each measure by correctness (above), and mean and std by pass rate."""
    figure = Figure(figsize=(4 * len(TITLES), 6), layout="constrained")
    axes = figure.subplots(2, len(TITLES))
    for column, (name, title) in enumerate(TITLES.items()):
        measure = report["measures"][name]
        above, below = axes[0, column], axes[1, column]
        for label, density in measure["density"].items():
            if density:
                above.stairs(density, measure["edges"], label=label)
        above.set(title=title, xlabel="nats, mean over a response", ylabel="density")
        above.legend()
        rows = measure["by_pass_rate"]
        below.errorbar(
            [row["pass_rate"] for row in rows],
            [row["mean"] for row in rows],
            yerr=[row["std"] for row in rows],
            marker="o",
            capsize=3,
        )
        below.set(xlabel="pass rate of the question", ylabel="nats, mean +- std", xlim=(0, 1.05))
    figure.savefig(path, dpi=120)
