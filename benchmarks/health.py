"""False alarms of two rules, and the delay of one: the tables of docs/health.md.

python benchmarks/health.py [RUNS]
"""

import sys
from collections.abc import Callable

import numpy as np

from scsdpo.health import Agreement, EntropyRise, Series

GROUP = 8
NEVER = 10_000
RULE = Agreement()
Path = Callable[[int], float]


def first_alarm(
    rng: np.random.Generator, batches: int, questions: int, rate: Path, divergence: Path
) -> int:
    """The batch at which the rule speaks in one simulated run."""
    past = Series()
    for t in range(batches):
        p = rng.beta(2 * rate(t), 2 * (1 - rate(t)), questions)
        scatter = np.exp(0.15 * rng.normal())
        right = rng.binomial(GROUP, p).mean() / GROUP
        past.add({"pass_rate": float(right), "divergence": float(divergence(t) * scatter)})
        if RULE.look(past):
            return t + 1
    return NEVER


def first_rise(rng: np.random.Generator, batches: int, scatter: float) -> int:
    """The batch at which `EntropyRise` speaks where nothing changes."""
    past, rule = Series(), EntropyRise()
    for t in range(batches):
        past.add({"pass_rate": 0.4, "entropy": float(np.exp(scatter * rng.normal()))})
        if rule.look(past):
            return t + 1
    return NEVER


def falling(first: float, last: float) -> Path:
    """Fall by the same factor in each of 45 batches."""
    return lambda t: first * (last / first) ** (min(t, 45) / 45)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rng = np.random.default_rng(0)
    for questions in (8, 16, 64):

        def alarms(
            batches: int, rate: Path, divergence: Path, count: int = questions
        ) -> np.ndarray:
            return np.array(
                [first_alarm(rng, batches, count, rate, divergence) for _ in range(runs)]
            )

        flat = alarms(400, lambda t: 0.4, lambda t: 0.04)
        agree = alarms(400, lambda t: 0.4, lambda t: 0.04 * 0.3 ** (t / 45))
        worse = alarms(60, falling(0.359, 0.131), falling(0.041, 0.013))
        shares = [float((each < NEVER).mean()) for each in (flat, agree)]
        when = [float(np.quantile(worse, q, method="higher")) for q in (0.5, 0.9)]
        print("Agreement", questions, *(f"{share:.3f}" for share in shares), *when, flush=True)
    for scatter in (0.1, 0.2, 0.4):
        alarms = [first_rise(rng, 400, scatter) < NEVER for _ in range(runs)]
        print("EntropyRise", scatter, f"{np.mean(alarms):.3f}", flush=True)


if __name__ == "__main__":
    main()
