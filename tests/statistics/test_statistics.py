"""Statistics: against scipy, by enumeration, and by what the intervals cover in simulations."""

import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from scsdpo.statistics import (
    detectable,
    detectable_difference,
    interval,
    majority,
    mean_interval,
    paired_interval,
    pass_at_k,
    pass_ks,
    score_difference,
    score_interval,
    t_cdf,
    t_quantile,
    t_test_p,
)
from scsdpo.statistics.distributions import beta_quantile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import coverage

SAMPLES = 500
"""Of a simulated experiment: a coverage of 95 has a standard error of 1."""


@pytest.mark.parametrize("df", [1, 2, 4, 49, 511, 10_000])
def test_students_distribution_is_scipys(df):
    for t in (-30, -3, -0.5, 0, 1, 2, 40):
        assert t_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-11)
    for p in (0.001, 0.2, 0.8, 0.975, 0.9999):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)
    assert t_test_p(-2, df) == pytest.approx(2 * stats.t.sf(2, df))


def test_a_mean_and_a_paired_difference_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9))
    found = stats.ttest_rel(b, a).confidence_interval()
    ours = mean_interval(b - a)
    assert (ours.low, ours.high) == pytest.approx((found.low, found.high))
    assert ours.value == pytest.approx((b - a).mean()) and ours.n == 9
    t = ours.value / (b - a).std(ddof=1) * 3
    assert t_test_p(t, 8) == pytest.approx(stats.ttest_rel(b, a).pvalue)


def test_a_beta_quantile_is_scipys():
    rng = np.random.default_rng(0)
    a, b = 10 ** rng.uniform(-1, 4, (2, 200))
    for p in (0.005, 0.025, 0.5, 0.975):
        expected = special.betaincinv(a, b, p)
        np.testing.assert_allclose(beta_quantile(p, a, b), expected, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("level", [0.95, 0.9])
def test_scores_of_0_and_1_have_clopper_and_pearsons_exact_interval(level):
    for right, n in ((0, 10), (3, 10), (1, 2), (49, 50), (50, 50), (300, 512)):
        found = stats.binomtest(right, n).proportion_ci(level, "exact")
        ours = score_interval([1] * right + [0] * (n - right), level=level)
        assert (ours.low, ours.high) == pytest.approx((found.low, found.high), abs=1e-9)


def test_an_interval_of_scores_tends_to_students_and_stays_within_0_and_1():
    scores = np.random.default_rng(0).uniform(0.3, 0.6, 20_000)
    ours, t = score_interval(scores), mean_interval(scores)
    assert (ours.low, ours.high) == pytest.approx((t.low, t.high), rel=5e-4)
    for edge in ([1.0] * 5, [0.0] * 5, [1.0, 1.0, 0.99], [0.5] * 5, [0.0, 1.0]):
        found = score_interval(edge)
        assert 0 <= found.low < found.high <= 1 and found.low <= found.value <= found.high
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        score_interval([0.5, 1.1])


def test_a_difference_of_scores_of_0_and_1_is_agresti_and_mins_where_some_differ():
    """v = (sum (d - mean)^2 + 1) / (n - 1), half a pair in each discordant cell."""
    a, b = np.array([0, 0, 0, 1, 1] * 8), np.array([1, 1, 0, 0, 1] * 8)
    d = b - a
    ours, n = score_difference(a, b), len(d)
    half = t_quantile(0.975, n - 1) * math.sqrt((((d - d.mean()) ** 2).sum() + 1) / (n - 1) / n)
    assert (ours.low, ours.high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_a_difference_that_was_never_met_is_left_open_by_what_n_questions_exclude():
    """20 questions without one: the rate q at which that has a chance of (1 - q)^20 = .025."""
    for same in ([1.0] * 20, [0.0] * 20, [0.0, 1.0] * 10):
        ours = score_difference(same, same)
        assert ours.high == -ours.low == pytest.approx(stats.binomtest(0, 20).proportion_ci().high)
        assert not ours.tells
    with pytest.raises(ValueError, match=r"needs scores in \[0, 1\]"):
        score_difference([0.5, 2], [1, 1])


def test_a_difference_of_fine_scores_tends_to_students():
    rng = np.random.default_rng(0)
    a = rng.uniform(0.3, 0.6, 400)
    b = a + rng.normal(0.02, 0.03, 400)
    ours, t = score_difference(a, b), mean_interval(b - a)
    assert (ours.low, ours.high) == pytest.approx((t.low, t.high), rel=5e-3)


def test_an_interval_is_chosen_by_the_values_alone():
    inside, outside = [0.0, 0.5, 1.0], [0.0, 0.5, 1.5]
    assert interval(inside) == score_interval(inside)
    assert interval(outside) == mean_interval(outside)
    assert paired_interval(inside, [1.0] * 3) == score_difference(inside, [1.0] * 3)
    assert paired_interval(inside, outside) == mean_interval([0, 0, 0.5])


@pytest.mark.parametrize("values", [[3.0, 3.0], [0.1 + 0.2, 0.3], [0.0] * 4, [7, 7, 7]])
def test_values_without_ends_that_are_all_alike_have_no_interval(values):
    found = mean_interval(values)
    assert math.isnan(found.low) and math.isnan(found.high) and not found.tells
    assert found.value == pytest.approx(values[0]) and found.n == len(values)


def _difference(values):
    return score_difference(np.zeros(len(values)), values)


@pytest.mark.parametrize("of", [mean_interval, score_interval, _difference])
def test_one_unit_tells_nothing_and_none_is_nan(of):
    one, none = of([0.5]), of([])
    assert one.value == 0.5 and math.isnan(one.low) and not one.tells
    assert math.isnan(none.value) and none.n == 0
    assert math.isnan(detectable_difference(one))


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_response():
    for n in (1, 5, 6):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(combinations(right, k))
                share = sum(map(any, subsets)) / len(subsets)
                assert pass_at_k(c, n, k) == pytest.approx(share)
    assert pass_at_k(1, 16, 16) == 1  # where resampling with replacement says .644


def test_pass_at_k_is_unbiased():
    """sum_c P(c of n) pass@k(c) = 1 - (1 - p)^k, exactly."""
    for p in (0.1, 0.5):
        for k in pass_ks(12):
            chances = stats.binom.pmf(range(13), 12, p)
            expected = sum(chances[c] * pass_at_k(c, 12, k) for c in range(13))
            assert expected == pytest.approx(1 - (1 - p) ** k)


def test_ks_are_powers_of_two_and_n():
    assert [pass_ks(n) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


@pytest.mark.parametrize(
    ("answers", "rewards", "expected"),
    [
        (["A", "A", "B", "C"], [1, 1, 0, 0], 1),
        (["A", "B", "B", "C"], [1, 0, 0, 0], 0),
        (["A", "A", "B", "B"], [1, 1, 0, 0], 0.5),  # a tie is a fair draw between the winners
        (["A", "B", "C", None], [1, 0, 0, 0], 1 / 3),
        ([None, None, None, "A"], [0, 0, 0, 1], 1),  # no answer, no vote
        ([None, None, None, None], [0, 0, 0, 0], 0),
        (["A", "A", "A", "A"], [1, 0, 1, 1], 0.75),  # equal answers of unequal reward: their mean
    ],
)
def test_a_majority_is_worth_the_reward_of_the_most_common_answer(answers, rewards, expected):
    assert majority(rewards, answers) == pytest.approx(expected)


UNATTAINED = "oracle"
"""Compared with what knows the distribution: where next to every sample scores alike, nothing that
does not know it can be as narrow."""
FEW = {name: coverage.QUESTIONS[name] for name in coverage.QUESTIONS if name != "beta(.5, .5)"}


@pytest.mark.parametrize("questions", [20, 50])
def test_95_percent_intervals_of_figures_cover_93_in_every_cell(questions):
    """93, less what 500 samples may be off by; of scores of 0 and 1 it is exact, hence 95.

    Where Student's or a textbook's interval covers, ours is at most 1.3 times as wide; but not
    where nearly all questions are alike, whose exceptions docs/evaluation.md lists.
    """
    wide = set()
    for name, chances in FEW.items():
        for score, cell in coverage.over_questions(chances, questions, SAMPLES).items():
            least = 95 if score in ("k = 1", "pass@16") else 93
            assert cell.ours >= least - 3 * 100 * (0.95 * 0.05 / SAMPLES) ** 0.5, (name, score)
            if cell.best != UNATTAINED and cell.wider > 1.3:
                wide.add((name, score))
    ends = ("beta(1, 19)", "beta(19, 1)", "p = .02", "p = .98", "beta(8, 2)", "uniform in [.2, .8]")
    assert all(name in ends for name, _ in wide), wide
    assert not any(score in ("k = 1", "pass@16") for _, score in wide), wide


@pytest.mark.parametrize(
    ("questions", "shift", "spread"), [(20, 0.05, 0.1), (50, 0.05, 0.1), (20, 0.0, 0.0)]
)
def test_95_percent_intervals_of_paired_differences_cover_93_in_every_cell(
    questions, shift, spread
):
    for name, chances in FEW.items():
        found = coverage.over_pairs(chances, questions, SAMPLES, shift, spread)
        for score, cell in found.items():
            assert cell.ours >= 93 - 3 * 100 * (0.93 * 0.07 / SAMPLES) ** 0.5, (name, score)
        if name == "uniform in [.2, .8]":
            for score in ("k = 1", "mean@16", "maj@16", "pass@2", "pass@4"):
                assert found[score].wider < 1.3, (name, score)


def test_students_interval_covers_next_to_nothing_where_nearly_all_questions_are_alike():
    """So the tests above can fail: with another interval they do."""
    few = coverage.over_questions(coverage.QUESTIONS["p = .02"], 20, SAMPLES)
    assert few["k = 1"].student < 45 and few["k = 1"].ours > 95


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("grid", [0.0, 0.5])
def test_t_over_seeds_covers_95_and_what_is_detectable_is_found_in_80(seeds, grid):
    """On a grid seeds may coincide; then there is no interval, and none that misses."""
    covers, finds, none = coverage.over_seeds(seeds, 4000, grid)
    assert covers >= 94
    if not grid:
        assert covers <= 96 and 78 <= finds <= 82 and none == 0
    assert (none > 10) == (seeds == 2 and grid > 0)


def test_a_detectable_difference_scales_with_the_spread():
    found = detectable_difference(mean_interval([0.0, 2.0, 4.0]))
    assert found == pytest.approx(2 * detectable(3))
    assert detectable(3) * math.sqrt(3) == pytest.approx(5.6535, abs=1e-3)
    assert detectable(10_000) * 100 == pytest.approx(1.95996 + 0.84162, abs=1e-3)
