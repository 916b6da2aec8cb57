"""Coverage and width of 95 % intervals, for docs/evaluation.md.

    python benchmarks/coverage.py [--samples 2000]

A question has a chance p of a right response, drawn from a distribution; each of its 16 responses
is right by itself with chance p, and else one of three wrong answers. The truth is the expectation
over questions and responses. `k = 1` is one response a question. Seeds: differences of runs are
normal, or that rounded to half of their deviation, as a figure over few questions is.

Widths are over the best that is known for the cell: the narrowest that covers 93 % there, of
Student's interval and, where all scores are 0 or 1, Wilson's and Clopper and Pearson's mid-P, or of
differences Agresti and Min's; it must have a width in 97.5 % of the samples. Where none does it is
an oracle's, which knows the distribution and takes the central 95 % of the sample's means.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import factorial

import numpy as np

from scsdpo.statistics import (
    detectable,
    difference_bounds,
    majority,
    mean_interval,
    pass_at_k,
    score_bounds,
    t_quantile,
)

K = 16
LEAST = 93.0
"""Percent that an interval must cover to be compared with."""
Rng = np.random.Generator
Chances = Callable[[Rng, tuple[int, int]], np.ndarray]
Bounds = tuple[np.ndarray, np.ndarray]


def mass(zero: float, one: float) -> Chances:
    """P = 0 and p = 1 with these shares, else uniform."""

    def draw(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
        which = rng.uniform(size=shape)
        rest = np.where(which < zero + one, 1.0, rng.uniform(size=shape))
        return np.where(which < zero, 0.0, rest)

    return draw


QUESTIONS: dict[str, Chances] = {
    "uniform in [.2, .8]": lambda rng, shape: rng.uniform(0.2, 0.8, shape),
    "beta(.5, .5)": lambda rng, shape: rng.beta(0.5, 0.5, shape),
    "beta(8, 2)": lambda rng, shape: rng.beta(8, 2, shape),
    "beta(1, 19)": lambda rng, shape: rng.beta(1, 19, shape),
    "beta(19, 1)": lambda rng, shape: rng.beta(19, 1, shape),
    "beta(.1, .9)": lambda rng, shape: rng.beta(0.1, 0.9, shape),
    "p = .02": lambda rng, shape: np.full(shape, 0.02),
    "p = .98": lambda rng, shape: np.full(shape, 0.98),
    "40 % 0, 40 % 1": mass(0.4, 0.4),
    "90 % 0": mass(0.9, 0.0),
    "90 % 1": mass(0.0, 0.9),
    "2 % 0, 96 % 1": mass(0.02, 0.96),
}


@dataclass(frozen=True)
class Score:
    """One question: a table over (right responses, votes of the leading wrong answer)."""

    name: str
    table: np.ndarray


def scores() -> Iterator[Score]:
    right = np.arange(K + 1)
    flat = np.ones((1, K + 1))
    yield Score("mean@16", (right / K)[:, None] * flat)
    votes = np.zeros((K + 1, 3 * (K + 1)))
    for c, lead, ties in product(range(K + 1), range(K + 1), range(3)):
        rivals = [letter for letter in "xyz"[: ties + 1] for _ in range(lead)]
        answers = ["a"] * c + rivals
        rewards = [1.0] * c + [0.0] * len(rivals)
        votes[c, 3 * lead + ties] = majority(rewards, answers)
    yield Score("maj@16", votes)
    for k in (2, 4, 8, 16):
        passed = np.array([pass_at_k(c, K, k) for c in range(K + 1)])
        yield Score(f"pass@{k}", passed[:, None] * flat)


def responses(rng: np.random.Generator, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(right responses, 3 votes of the leading wrong answer + how many others have as many)."""
    right = rng.binomial(K, p)
    wrong = rng.multinomial(K - right, [1 / 3] * 3)
    lead = wrong.max(-1)
    return right, 3 * lead + (wrong == lead[..., None]).sum(-1) - 1


def scored(score: Score, right: np.ndarray, votes: np.ndarray) -> np.ndarray:
    columns = score.table.shape[1]
    return score.table[right, votes if columns > K + 1 else 0]


FINE = 50_000
"""Chances that stand for their distribution, in a truth."""


def counts_of(p: np.ndarray) -> np.ndarray:
    """[K + 1]: how likely each number of right responses is, over the chances `p`."""
    right = np.arange(K + 1)
    ways = np.array([factorial(K) / factorial(c) / factorial(K - c) for c in right])
    return (ways * p.reshape(-1, 1) ** right * (1 - p.reshape(-1, 1)) ** (K - right)).mean(0)


@cache
def expected_scores() -> dict[str, np.ndarray]:
    """Each score's expectation [K + 1], given the number of right responses; exact."""
    leads = np.zeros((K + 1, 3 * (K + 1)))
    """Given c right ones, how likely each vote of the wrong ones is."""
    for c in range(K + 1):
        rest = K - c
        for a, b in product(range(rest + 1), repeat=2):
            if a + b <= rest:
                three = (a, b, rest - a - b)
                chance = factorial(rest) / math.prod(map(factorial, three)) / 3.0**rest
                leads[c, 3 * max(three) + three.count(max(three)) - 1] += chance
    return {
        one.name: (leads * one.table).sum(1) if one.table.shape[1] > K + 1 else one.table[:, 0]
        for one in scores()
    }


def truth(score: Score, counts: np.ndarray) -> float:
    """The expectation of a score over questions and responses."""
    return float(counts @ expected_scores()[score.name])


@dataclass(frozen=True)
class Cell:
    """Coverage and width of one score's intervals over many samples."""

    ours: float
    """Percent that hold the truth."""
    student: float
    """Coverage of Student's interval."""
    wider: float
    """Mean width over that of the best known; inf: over an interval without width."""
    best: str
    """Name of the best interval."""


def cell(
    ours: Bounds, student: Bounds, textbook: Sequence[Bounds], means: np.ndarray, value: float
) -> Cell:
    """Compare intervals of many samples, of which `means` are the means and `value` the truth."""

    def covers(bounds: Bounds) -> float:
        low, high = bounds
        return 100 * float(np.mean((low <= value + 1e-7) & (value - 1e-7 <= high)))

    def width(bounds: Bounds) -> float:
        return float(np.mean(bounds[1] - bounds[0]))

    oracle = float(np.subtract(*np.quantile(means, [0.975, 0.025])))
    reference, best = oracle, "oracle"
    known = [("Student", student), *(("textbook", bounds) for bounds in textbook)]
    valid = [
        (width(bounds), name)
        for name, bounds in known
        # Without a width it can hold the truth by chance alone.
        if covers(bounds) >= LEAST and np.mean(bounds[1] - bounds[0] < 1e-12) < 0.025
    ]
    if valid:
        reference, best = min(valid)
    ratio = width(ours) / reference if reference > 1e-9 else math.inf
    return Cell(covers(ours), covers(student), ratio, best)


def students(values: np.ndarray) -> Bounds:
    """Intervals of the means of [S, n]."""
    n = values.shape[1]
    half = t_quantile(0.975, n - 1) * values.std(1, ddof=1) / math.sqrt(n)
    return values.mean(1) - half, values.mean(1) + half


def wilson(scores: np.ndarray) -> Bounds:
    """Intervals of scores of 0 and 1."""
    n, mean = scores.shape[1], scores.mean(1)
    z2 = t_quantile(0.975, 10**7) ** 2 / n
    half = np.sqrt(mean * (1 - mean) * z2 + z2**2 / 4) / (1 + z2)
    return (mean + z2 / 2) / (1 + z2) - half, (mean + z2 / 2) / (1 + z2) + half


def mid_p(scores: np.ndarray) -> Bounds:
    """Clopper and Pearson's with half of the observed count's probability, of scores of 0 and 1."""
    n = scores.shape[1]
    counts = np.arange(n + 1)
    log_ways = [math.lgamma(n + 1) - math.lgamma(c + 1) - math.lgamma(n - c + 1) for c in counts]
    low, high = np.zeros(n + 1), np.ones(n + 1)
    for _ in range(40):  # the p at which P(X < c) + P(X = c) / 2 falls to .025
        p = (low + high)[:, None] / 2
        chances = np.exp(np.array(log_ways) + counts * np.log(p) + (n - counts) * np.log1p(-p))
        below = np.tril(chances).sum(1) - chances.diagonal() / 2
        low = np.where(below > 0.025, p[:, 0], low)
        high = np.where(below > 0.025, high, p[:, 0])
    upper = np.where(counts == n, 1.0, high)
    right = scores.sum(1).astype(int)
    return 1 - upper[n - right], upper[right]


def agresti_min(gaps: np.ndarray) -> Bounds:
    """Intervals of differences of scores of 0 and 1: half a pair in each discordant cell."""
    n, mean = gaps.shape[1], gaps.mean(1)
    variance = (((gaps - mean[:, None]) ** 2).sum(1) + 1) / (n - 1)
    half = t_quantile(0.975, n - 1) * np.sqrt(variance / n)
    return mean - half, mean + half


def two_valued(scores: np.ndarray) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def over_questions(chances: Chances, questions: int, samples: int) -> dict[str, Cell]:
    """Coverage of a figure's intervals, by score."""
    rng = np.random.default_rng(questions)
    fine = chances(np.random.default_rng(1), (1, FINE))
    counts = counts_of(fine)
    p = chances(rng, (samples, questions))
    right, votes = responses(rng, p)
    tables = {"k = 1": ((rng.uniform(size=p.shape) < p).astype(float), float(fine.mean()))}
    for score in scores():
        tables[score.name] = scored(score, right, votes), truth(score, counts)
    return {
        name: cell(
            score_bounds(table),
            students(table),
            (wilson(table), mid_p(table)) if two_valued(table) else (),
            table.mean(1),
            expected,
        )
        for name, (table, expected) in tables.items()
    }


def over_pairs(
    chances: Chances, questions: int, samples: int, shift: float = 0.05, spread: float = 0.1
) -> dict[str, Cell]:
    """Coverage for differences between two policies.

    Args:
        chances: of the first policy.
        questions: of a sample.
        samples: how many.
        shift: how much higher the other's chances are, on average before they are cut to [0, 1].
        spread: deviation of that over questions.
    """

    def two(rng: Rng, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        p = chances(rng, shape)
        return p, np.clip(p + shift + rng.normal(0, spread, shape), 0, 1) if spread else p

    rng = np.random.default_rng(questions)
    fine = two(np.random.default_rng(1), (1, FINE))
    counts = [counts_of(p) for p in fine]
    pair = two(rng, (samples, questions))
    answered = [responses(rng, p) for p in pair]
    once = [(rng.uniform(size=p.shape) < p).astype(float) for p in pair]
    tables = {"k = 1": (*once, float(fine[1].mean() - fine[0].mean()))}
    for score in scores():
        expected = truth(score, counts[1]) - truth(score, counts[0])
        tables[score.name] = (*(scored(score, *each) for each in answered), expected)
    return {
        name: cell(
            difference_bounds(a, b),
            students(b - a),
            (agresti_min(b - a),) if two_valued(a) and two_valued(b) else (),
            (b - a).mean(1),
            expected,
        )
        for name, (a, b, expected) in tables.items()
    }


def over_seeds(seeds: int, samples: int, grid: float = 0.0) -> tuple[float, float, float]:
    """Percentages: how many intervals of t(n - 1) hold the truth, of those there are; how often
    `detectable` differences are found; how often seeds coincide, so that there is no interval.

    Args:
        seeds: differences of a study, normal with deviation 1.
        samples: studies.
        grid: differences are rounded to multiples of it; 0: they are not.
    """
    rng = np.random.default_rng(seeds)
    mean = rng.uniform(0, grid, (samples, 1)) if grid else 0.0  # anywhere between two steps
    draws = rng.normal(mean, 1, (samples, seeds))
    draws = np.round(draws / grid) * grid if grid else draws
    intervals = [mean_interval(row) for row in draws - mean]
    there = [one for one in intervals if not math.isnan(one.low)]
    covers = 100 * float(np.mean([one.low <= 0 <= one.high for one in there]))
    found = [mean_interval(row + detectable(seeds)).tells for row in draws - mean]
    return covers, 100 * float(np.mean(found)), 100 * (1 - len(there) / samples)


def shown(one: Cell) -> str:
    mark = "" if one.wider <= 1.3 else " *"
    return f"{one.ours:.1f}, {one.student:.1f}, {min(one.wider, 99):.2f}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=2_000)
    samples = parser.parse_args().samples
    kinds = {
        "a figure": over_questions,
        "a difference, the other's p .05 higher +- .1": over_pairs,
        "a difference of two policies of the same p": lambda *a: over_pairs(*a, 0.0, 0.0),
    }
    cells: list[tuple[str, Cell]] = []
    for kind, simulated in kinds.items():
        for questions in (20, 50, 512):
            found = {n: simulated(chances, questions, samples) for n, chances in QUESTIONS.items()}
            print(f"\n{kind}, Q = {questions}: covered %, Student's, width over the best known\n")
            names = list(next(iter(found.values())))
            print("| | " + " | ".join(names) + " |\n" + "| --- " * (len(names) + 1) + "|")
            for chance, row in found.items():
                print(f"| {chance} | " + " | ".join(map(shown, row.values())) + " |", flush=True)
                cells += [(f"{kind}, Q = {questions}, {chance}, {n}", c) for n, c in row.items()]
    least = min(cells, key=lambda one: one[1].ours)
    print(f"\n{len(cells)} cells; the least covers {least[1].ours:.1f} ({least[0]})")
    for best in ("Student", "textbook", "oracle"):
        ratios = [c.wider for _, c in cells if c.best == best]
        wide = sum(ratio > 1.3 for ratio in ratios)
        print(f"best known {best}: {len(ratios)} cells, in {wide} of them ours is over 1.3 as wide")
    for seeds, grid in product((2, 3, 5, 10), (0.0, 0.5)):
        covers, finds, none = over_seeds(seeds, samples, grid)
        print(
            f"{seeds} seeds, grid {grid}: t covers {covers:.1f} %, what is detectable is found in "
            f"{finds:.1f} %, seeds coincide in {none:.1f} %"
        )


if __name__ == "__main__":
    main()
