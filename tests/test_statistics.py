"""Statistics: against scipy, by enumeration, and by what the intervals cover in simulations."""

import math
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from scsdpo.statistics import (
    detectable,
    detectable_difference,
    majority,
    mean_interval,
    pass_at_k,
    pass_ks,
    score_difference,
    score_interval,
    t_cdf,
    t_quantile,
    t_test_p,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import coverage

UNIFORM = coverage.QUESTIONS["p uniform in [.2, .8]"]
SAMPLES = 1000
"""Of a simulated experiment: a coverage of 95 has a standard error of .7."""


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


def test_scores_of_0_and_1_have_wilsons_interval():
    """With t(n - 1) for the normal quantile: scipy is asked for the level that makes them equal."""
    for right, n in ((0, 10), (3, 10), (49, 50), (50, 50)):
        level = 2 * stats.norm.cdf(t_quantile(0.975, n - 1)) - 1
        found = stats.binomtest(right, n).proportion_ci(level, "wilson")
        ours = score_interval([1] * right + [0] * (n - right))
        assert (ours.low, ours.high) == pytest.approx((found.low, found.high), abs=1e-12)


def test_an_interval_of_scores_tends_to_students_and_stays_within_0_and_1():
    scores = np.random.default_rng(0).uniform(0.3, 0.6, 20_000)
    ours, t = score_interval(scores), mean_interval(scores)
    assert (ours.low, ours.high) == pytest.approx((t.low, t.high), rel=2e-4)
    for edge in ([1.0] * 5, [0.0] * 5, [1.0, 1.0, 0.99]):
        found = score_interval(edge)
        assert 0 <= found.low < found.high <= 1 and found.low <= found.value <= found.high


@pytest.mark.parametrize("interval", [mean_interval, score_interval, score_difference])
def test_one_unit_tells_nothing_and_none_is_nan(interval):
    one, none = interval([0.5]), interval([])
    assert one.value == 0.5 and math.isnan(one.low) and not one.tells
    assert math.isnan(none.value) and none.n == 0
    assert math.isnan(detectable_difference([0.5]))


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


@pytest.mark.parametrize("questions", [50, 512])
def test_95_percent_intervals_over_questions_cover_it_where_a_bootstrap_covers_10(questions):
    """Of means 93 to 97; of maj@k and pass@k at least 93, but 90 for pass@16 over 50 questions, of
    which all or all but one pass.
    """
    methods = {"ours": score_interval, "t": mean_interval}
    found = coverage.over_questions(UNIFORM, questions, SAMPLES, methods)
    assert all(93 <= value <= 97 for value in found["mean@16"].values()), found
    least = {name: 88 if name == "pass@16" and questions == 50 else 93 for name in found}
    assert all(found[name]["ours"] >= least[name] for name in found), found
    assert found["pass@16"]["t"] < (20 if questions == 50 else 75)


@pytest.mark.parametrize("questions", [50, 512])
def test_95_percent_intervals_of_paired_differences_cover_it(questions):
    methods = {"ours": score_difference, "t": mean_interval}
    found = coverage.over_pairs(UNIFORM, questions, SAMPLES, methods)
    assert 93 <= found["mean@16"]["t"] <= 97, found
    assert all(value["ours"] >= 93 for value in found.values()), found


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_t_over_seeds_covers_95_and_what_is_detectable_is_found_in_80(seeds):
    covers, finds = coverage.over_seeds(seeds, 5 * SAMPLES)
    assert 94 <= covers <= 96 and 78 <= finds <= 82


def test_a_detectable_difference_scales_with_the_spread():
    assert detectable_difference([0.0, 2.0, 4.0]) == pytest.approx(2 * detectable(3))
    assert detectable(3) * math.sqrt(3) == pytest.approx(5.6535, abs=1e-3)
    assert detectable(10_000) * 100 == pytest.approx(1.95996 + 0.84162, abs=1e-3)
