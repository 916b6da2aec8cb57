"""The sections of a report."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from scsdpo.report import attempts, validations
from scsdpo.report.curves import (
    line_panel,
    over_batches,
    several_panels,
    slug,
    stack_panels,
    window_panel,
)
from scsdpo.report.panels import Panel
from scsdpo.report.reading import PHASES, Run
from scsdpo.report.teacher import distances, too_few
from scsdpo.report.teacher import panels as distance_panels

PASS_RATES = {
    "solve_all": ("all", "mastered, p = 1"),
    "informative": ("some", "in between"),
    "solve_none": ("none", "out of reach, p = 0"),
}
SECONDS = {
    f"seconds/{name}": (f"phase-{i}", words.removeprefix("the "))
    for i, (name, words) in enumerate(PHASES.items())
}
NO_PANEL = {
    "reward", "solve_none", "solve_all", "informative", "central", "medium", "skipped",
    "logprob_gap_share", "trained_rollouts", "negative_entropy", "verifier_errors",
}  # fmt: skip
"""Training figures that other panels show already."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and panels under it."""

    name: str
    title: str
    short: str
    """Short title for the navigation."""
    lead: str
    panels: list[Panel] = field(default_factory=list)


def validation(runs: Sequence[Run]) -> Section:
    """Accuracy on held-out questions."""
    return Section(
        name="validation",
        title="Validation",
        short="Validation",
        lead="On the validation questions; bars are 95 % intervals over questions.",
        panels=validations.panels(runs),
    )


def attempts_section(runs: Sequence[Run]) -> Section:
    """Attempts of `scsdpo solve`."""
    return Section(
        name="attempts",
        title="Attempts at a question",
        short="Attempts",
        lead="Of scsdpo solve: how soon it was solved, and whether attempts still differ.",
        panels=attempts.panels(runs),
    )


def learning(runs: Sequence[Run]) -> Section:
    """Figures 2 and 3 of the paper."""
    medium = Panel(
        name="medium",
        title="Questions of medium difficulty, %",
        note="Share of questions with pass rate in [1/8, 7/8], window by window.",
        x_label=over_batches(runs),
        layers=[],
        paper="Figure 3",
    )
    panels = [
        line_panel(
            runs, "pass_rate", "Pass rate in training, %",
            "Mean pass rate of a batch's questions.", scale=100, paper="Figure 3",
        ),
        window_panel(runs, "medium", medium),
        line_panel(
            runs, "gradient_norm", "Gradient norm", "Before clipping.", log=True, paper="Figure 3",
        ),
        line_panel(
            runs, "response_length", "Response length, tokens",
            "Mean of a batch, end of sequence included.", paper="Figure 2",
        ),
        line_panel(
            runs, "truncated", "Truncated responses, %",
            "Those that reached the cap on tokens.", scale=100,
        ),
        line_panel(runs, "entropy", "Entropy of the policy, nats", "Mean over trained tokens."),
    ]  # fmt: skip
    return Section(
        name="learning",
        title="Learning",
        short="Learning",
        lead="Pass rate, difficulty, gradient and length as training goes on.",
        panels=[panel for panel in panels if panel],
    )


def difficulty(runs: Sequence[Run]) -> Section:
    """Figure 5 of the paper."""
    x_label = over_batches(runs)
    stack = Panel(
        name="pass-rates",
        title="Questions by pass rate, %",
        note="Mastered below, out of reach above; only what is in between teaches.",
        x_label=x_label,
        layers=[],
        ceiling=100,
        steps=True,
        paper="Figure 5",
    )
    bands = Panel(
        name="bands",
        title="Questions in the middle, %",
        note="Share with pass rate in [2/8, 6/8], window by window.",
        x_label=x_label,
        layers=[],
        paper="Figure 5",
    )
    panels = [
        *stack_panels(runs, PASS_RATES, stack, scale=100),
        window_panel(runs, "central", bands),
        line_panel(
            runs, "effective_questions", "Effective questions a batch",
            "(sum of weights)² / sum of squared weights.",
        ),
    ]  # fmt: skip
    return Section(
        name="difficulty",
        title="What there was to learn from",
        short="Questions",
        lead="Mastered, in between, out of reach: how the questions moved.",
        panels=[panel for panel in panels if panel],
    )


_TURN = re.compile(r"turn_(\d+)/(reward|length)")
"""Name of a figure of one turn."""


def episodes(runs: Sequence[Run]) -> Section:
    """Figures of runs with episodes of several turns."""
    shown = (
        ("turns", "Turns an episode", "Responses of the policy.", 1),
        ("calls", "Calls an episode", "Of tools.", 1),
        ("failed_calls", "Calls that failed, %", "Not read, not made, or raised.", 100),
        ("observation_tokens", "Tokens of the world an episode", "Read, and not learned from.", 1),
        ("out_of_turns", "Episodes out of turns, %", "The environment gave no further one.", 100),
        ("out_of_time", "Episodes out of time, %", "A deadline came first.", 100),
    )
    panels = [line_panel(runs, name, title, note, scale=k) for name, title, note, k in shown]
    names = {name for run in runs for name in run.names("train/")}
    turns = sorted({int(found[1]) for name in names if (found := _TURN.fullmatch(name))})
    for what, title, note in (
        ("reward", "Reward of each turn", "Mean over the episodes that have the turn."),
        ("length", "Tokens of each turn", "Drawn by the policy, of the episodes that have it."),
    ):
        labels = {f"turn_{k}/{what}": f"turn {k}" for k in turns}
        panels += several_panels(runs, labels, f"turn-{what}", title, note)
    return Section(
        name="episodes",
        title="Episodes",
        short="Episodes",
        lead="What the policy and its environments did in several turns.",
        panels=[panel for panel in panels if panel],
    )


def trust(runs: Sequence[Run]) -> Section:
    """Checks on whether the numbers can be trusted."""
    shown = (
        ("divergence", "Divergence of student and teacher, nats",
         "Mean over trained tokens; falling alone is no sign of learning."),
        ("objective", "Objective", "Mean over trained tokens."),
        ("loss", "Loss", "With weights and importance, as stepped on."),
        ("logprob_gap", "Gap of sampler and trainer, nats",
         "Mean |log S(trainer) - log S(sampler)|; zero but for rounding."),
        ("logprob_gap_max", "Largest gap of a token, nats", "Of each batch."),
        ("importance_capped", "Importance weights at their cap", "Share of trained tokens."),
        ("age_steps", "Age of what is learned from, optimizer steps",
         "Mean over trained tokens, of batches that are drawn ahead."),
        ("logprob_drift", "Drift since older weights drew a token, nats",
         "Mean |log S - log S(sampler)| of these tokens."),
        ("importance_ess", "Effective sample size of the importance weights",
         "As a share of the trained tokens, of batches that are drawn ahead."),
        ("experts_differ", "Sent to other experts than by the sampler", "Share of trained tokens."),
        ("verifier_errors", "Verifier errors", "Verdicts of a batch whose verifier failed."),
    )  # fmt: skip
    logs = ("divergence", "logprob_gap", "logprob_gap_max")
    panels = [
        line_panel(runs, name, title, note, log=name in logs)
        for name, title, note in shown
        if name != "verifier_errors" or any(any(run.curve(name)[1]) for run in runs)
    ]
    return Section(
        name="trust",
        title="Signals and trust",
        short="Signals",
        lead="What the step was made of, and whether sampler and trainer are the same policy.",
        panels=[panel for panel in panels if panel],
    )


def cost(runs: Sequence[Run]) -> Section:
    """Time, tokens, memory."""
    stack = Panel(
        name="seconds",
        title="Seconds a batch, by phase",
        note="Of the slowest rank.",
        x_label=over_batches(runs),
        layers=[],
        steps=True,
    )
    tokens = (
        ("tokens/rollout", "Tokens sampled a batch", "All ranks."),
        ("tokens/teacher", "Tokens through the teacher a batch", "A prompt counts once."),
        ("tokens/student", "Tokens through the student a batch", "A prompt counts once."),
        ("memory", "Memory, GiB", "Most so far, of the largest rank."),
        ("trained_tokens", "Tokens that got credit a batch", "The rest was not run."),
    )
    panels = [
        *stack_panels(runs, SECONDS, stack),
        *(line_panel(runs, name, title, note) for name, title, note in tokens),
    ]
    return Section(
        name="cost",
        title="Time, tokens, memory",
        short="Cost",
        lead="Where a batch's time goes.",
        panels=[panel for panel in panels if panel],
    )


def sections(runs: Sequence[Run]) -> list[Section]:
    """Sections in the order of the page, without empty ones."""
    makers = (
        *(validation, attempts_section, learning, difficulty),
        *(episodes, teacher, trust, cost),
    )
    made = [make(runs) for make in makers]
    made.append(others(runs, {panel.name for section in made for panel in section.panels}))
    taken: set[str] = set()
    for section in made:
        section.panels[:] = [_named_apart(panel, taken) for panel in section.panels]
    return [section for section in made if section.panels]


def _named_apart(panel: Panel, taken: set[str]) -> Panel:
    """Rename a panel whose name is taken: after `level_1`, `level-1` becomes `level-1-2`."""
    name, number = panel.name, 1
    while name in taken:
        number += 1
        name = f"{panel.name}-{number}"
    taken.add(name)
    return panel if name == panel.name else replace(panel, name=name)


def panels(runs: Sequence[Run]) -> list[Panel]:
    """All panels of a page."""
    return [panel for section in sections(runs) for panel in section.panels]


def others(runs: Sequence[Run], shown: Collection[str]) -> Section:
    """Unknown figures, such as those of a user's own callbacks."""
    names = dict.fromkeys(name for run in runs for name in run.names("train/"))
    left = [
        name
        for name in names
        if slug(name) not in shown
        and name not in NO_PANEL | SECONDS.keys()
        and not _TURN.fullmatch(name)
    ]
    found = [line_panel(runs, name, name, f"train/{name}") for name in left]
    return Section(
        name="others",
        title="Other figures",
        short="Others",
        lead="What else was logged.",
        panels=[panel for panel in found if panel],
    )


def teacher(runs: Sequence[Run]) -> Section:
    """Figure 4 of the paper."""
    found, source = distances(runs)
    words = ["By correctness, and by the question's pass rate.", source, *too_few(found)]
    return Section(
        name="teacher",
        title="How far the teacher is",
        short="Teacher",
        lead=" ".join(words),
        panels=distance_panels(found, runs),
    )
