"""What share of 95 % intervals holds the truth? Simulated, for docs/evaluation.md.

    python benchmarks/coverage.py [--samples 2000]

A question has a chance p of a right response, drawn from a distribution; each of its 16 responses
is right by itself with chance p, and else one of three wrong answers. The truth is the expectation
over questions and responses. Seeds: differences of runs are normal.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import factorial

import numpy as np

from scsdpo.statistics import (
    Estimate,
    detectable,
    majority,
    mean_interval,
    pass_at_k,
    score_difference,
    score_interval,
)

K = 16
DRAWS = 1_000
Interval = Callable[[np.ndarray], Estimate]
Chances = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
QUESTIONS: dict[str, Chances] = {
    "p uniform in [.2, .8]": lambda rng, shape: rng.uniform(0.2, 0.8, shape),
    "p beta(.5, .5)": lambda rng, shape: rng.beta(0.5, 0.5, shape),
    "p beta(8, 2)": lambda rng, shape: rng.beta(8, 2, shape),
}


@dataclass(frozen=True)
class Score:
    """Of a question: a table over (right responses, votes of the leading wrong answer)."""

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


def truth(score: Score, p: np.ndarray) -> float:
    """Over the chances `p`, a fine sample of them; exact in the responses."""
    right = np.arange(K + 1)
    ways = np.array([factorial(K) / factorial(c) / factorial(K - c) for c in right])
    weight = (ways * p.reshape(-1, 1) ** right * (1 - p.reshape(-1, 1)) ** (K - right)).mean(0)
    if score.table.shape[1] == K + 1:
        return float(weight @ score.table[:, 0])
    values = np.zeros(K + 1)
    for c in right:
        rest = K - c
        for a, b in product(range(rest + 1), repeat=2):
            if a + b > rest:
                continue
            three = (a, b, rest - a - b)
            lead = max(three)
            chance = factorial(rest) / np.prod([factorial(n) for n in three]) / 3.0**rest
            values[c] += chance * score.table[c, 3 * lead + three.count(lead) - 1]
    return float(weight @ values)


@cache
def resamples(n: int) -> np.ndarray:
    """[DRAWS, n]: how often each of n questions is drawn, over n."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS) / n


def bootstrap(scores: np.ndarray) -> Estimate:
    """The percentile bootstrap over questions, for comparison."""
    low, high = np.quantile(resamples(len(scores)) @ scores, [0.025, 0.975])
    return Estimate(value=float(scores.mean()), low=float(low), high=float(high), n=len(scores))


def covered(intervals: list[Estimate], value: float) -> float:
    """In percent."""
    return 100 * float(np.mean([one.low <= value <= one.high for one in intervals]))


def over_questions(
    chances: Chances, questions: int, samples: int, methods: dict[str, Interval]
) -> dict[str, dict[str, float]]:
    """Coverage by score and method."""
    rng = np.random.default_rng(questions)
    fine = chances(np.random.default_rng(1), (1, 100_000))
    right, votes = responses(rng, chances(rng, (samples, questions)))
    found = {}
    for score in scores():
        expected, table = truth(score, fine), scored(score, right, votes)
        found[score.name] = {
            name: covered([method(row) for row in table], expected)
            for name, method in methods.items()
        }
    return found


def over_pairs(
    chances: Chances, questions: int, samples: int, methods: dict[str, Interval]
) -> dict[str, dict[str, float]]:
    """The same of differences between two policies: the other's chances are .05 higher +- .1."""

    def two(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        p = chances(rng, shape)
        return p, np.clip(p + 0.05 + rng.normal(0, 0.1, shape), 0, 1)

    rng = np.random.default_rng(questions)
    fine = two(np.random.default_rng(1), (1, 100_000))
    pair = [responses(rng, p) for p in two(rng, (samples, questions))]
    found = {}
    for score in scores():
        expected = truth(score, fine[1]) - truth(score, fine[0])
        table = scored(score, *pair[1]) - scored(score, *pair[0])
        found[score.name] = {
            name: covered([method(row) for row in table], expected)
            for name, method in methods.items()
        }
    return found


def over_seeds(seeds: int, samples: int) -> tuple[float, float]:
    """Coverage of t(n - 1), and in percent how often `detectable` differences are found."""
    draws = np.random.default_rng(seeds).normal(0, 1, (samples, seeds))
    found = [mean_interval(row + detectable(seeds)).tells for row in draws]
    return covered([mean_interval(row) for row in draws], 0.0), 100 * float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=2_000)
    samples = parser.parse_args().samples
    single = {"ours": score_interval, "t": mean_interval, "bootstrap": bootstrap}
    paired = {"ours": score_difference, "t": mean_interval, "bootstrap": bootstrap}
    for simulated, methods in ((over_questions, single), (over_pairs, paired)):
        print(f"\n{simulated.__name__}, %: {', '.join(methods)}\n")
        columns = [(n, questions) for n in QUESTIONS for questions in (50, 512)]
        print("| | " + " | ".join(f"{n}, Q = {questions}" for n, questions in columns) + " |")
        print("| --- " * (len(columns) + 1) + "|")
        found = [simulated(QUESTIONS[n], questions, samples, methods) for n, questions in columns]
        for name in found[0]:
            cells = [", ".join(f"{value:.1f}" for value in one[name].values()) for one in found]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for seeds in (3, 5, 10):
        covers, finds = over_seeds(seeds, samples)
        print(f"\n{seeds} seeds: t covers {covers:.1f}, what is detectable is found in {finds:.1f}")


if __name__ == "__main__":
    main()
