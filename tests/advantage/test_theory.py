"""The numbers of docs/methods.md: how much a question moves the policy, by its pass rate."""

import math
import re
from pathlib import Path

import pytest
import torch

from scsdpo.advantage import GroupMean, GroupPassRate, GroupRelative, GroupStd, Unscaled

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()


def table(title):
    """Rows of numbers of the table under a heading."""
    section = DOCS.split(f"### {title}\n")[1].split("\n#")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line[:1] == "|"][2:]
    return [[float(cell) for cell in row] for row in rows]


def test_total_advantages_in_the_docs_are_those_of_the_code():
    """Rows: k of G = 8, then sum_i |A_i| by GRPO, without scale and by MaxRL."""
    rows = table("How much credit a question hands out")
    assert [row[0] for row in rows] == list(range(9))
    for k, *totals in rows:
        rewards = (torch.arange(8) < k).double()[None]
        for total, scale in zip(
            totals, (GroupStd(ddof=0, eps=0), Unscaled(), GroupPassRate()), strict=True
        ):
            advantages = GroupRelative(baseline=GroupMean(), scale=scale).advantages(rewards)
            assert total == pytest.approx(advantages.abs().sum().item(), abs=5e-3)
        assert totals[0] == pytest.approx(2 * 8 * math.sqrt(k / 8 * (1 - k / 8)), abs=5e-3)


def divergence_to_tilted(p, b):
    """D_KL(pi || pi~*) for pi~* ~ pi exp(r~ / b), r~ = (r - p) / sqrt(p (1 - p)), r binary.

    Both r~ = up (with pi-mass p) and r~ = down (mass 1 - p) are constant on their sets, so that
    log(pi / pi~*) = log E_pi[exp(r~ / b)] - r~ / b, and E_pi[r~] = 0.
    """
    up, down = math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p))
    return math.log(p * math.exp(up / b) + (1 - p) * math.exp(down / b))


def test_proposition_1_in_the_docs_is_what_the_formula_gives():
    """Rows: p, then D_KL times 2 b^2 at b = 1, 10 and 100, which goes to 1 whatever p."""
    rows = table("Proposition 1 in numbers")
    for p, *scaled in rows:
        for value, b in zip(scaled, (1, 10, 100), strict=True):
            assert value == pytest.approx(2 * b**2 * divergence_to_tilted(p, b), abs=6e-4)


@pytest.mark.parametrize("p", [0.05, 0.125, 0.5, 0.9])
def test_the_remainder_of_proposition_1_is_of_third_order(p):
    """|D - 1/(2 b^2)| b^3 -> |1 - 2p| / (6 sqrt(p (1 - p))), the third cumulant over 3!."""
    skew = abs(1 - 2 * p) / math.sqrt(p * (1 - p))
    for b in (30, 100, 300):
        remainder = abs(divergence_to_tilted(p, b) - 1 / (2 * b**2)) * b**3
        assert remainder == pytest.approx(skew / 6, abs=2 / b)


def test_every_strategy_has_its_row_in_the_docs():
    import scsdpo.advantage
    import scsdpo.loss
    import scsdpo.reduction
    import scsdpo.selection
    import scsdpo.state
    import scsdpo.teacher
    import scsdpo.weighting
    from scsdpo.cli.config_types import choices

    bases = [
        *("Advantage", "Router", "Target", "Modulator", "Estimator", "Support", "Baseline"),
        *("Scale", "RatioLevel"),
    ]
    kinds = [getattr(scsdpo.advantage, name) for name in bases]
    kinds += [
        scsdpo.advantage.FDivergence,
        scsdpo.weighting.Weighting,
        scsdpo.weighting.TokenWeighting,
        scsdpo.teacher.Teacher,
        scsdpo.teacher.Context,
        scsdpo.reduction.Reduction,
        scsdpo.loss.Importance,
        scsdpo.selection.Selection,
        scsdpo.state.PassRates,
    ]
    shipped = {name for kind in kinds for name in choices([kind]) if _shipped(kind, name)}
    missing = {name for name in shipped if not re.search(rf"\b{name}\b", DOCS)}
    assert not missing


def _shipped(kind, name):
    pending = [kind]
    while pending:
        one = pending.pop()
        pending += one.__subclasses__()
        if one.__name__ == name:
            return one.__module__.startswith("scsdpo.")
    return False
