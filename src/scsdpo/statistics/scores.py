"""Scores of one question from its k responses; a figure is the mean of scores over questions."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np


def pass_ks(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({n, *(1 << power for power in range(n.bit_length()))} - {0})


def pass_at_k(successes: int, n: int, k: int) -> float:
    """Unbiased chance that one of k responses is right: 1 - C(n - c, k) / C(n, k).

    It is the share of the k-subsets of the n responses that contain a right one, so that its
    expectation is exactly 1 - (1 - p)^k for every p. (Drawing k of n with replacement is biased:
    with c = 1 and k = n = 16 it gives .644 instead of 1.)

    Args:
        successes: c, number of right responses.
        n: number of responses.
        k: number of responses that are drawn, <= n.

    Source:
        Chen et al. 2021, arXiv:2107.03374, eq. (1).
    """
    if not 0 <= successes <= n or not 1 <= k <= n:
        raise ValueError(f"`pass_at_k` needs 0 <= c <= n and 1 <= k <= n, got {successes, n, k}")
    # math.comb is exact, and 0 where fewer than k responses are wrong.
    return 1 - math.comb(n - successes, k) / math.comb(n, k)


def majority(rewards: Sequence[float], answers: Sequence[str | None]) -> float:
    """maj@k of a question: the reward of its most common answer.

    Responses without an answer do not vote. Among equally common answers the score is their mean,
    which is the expectation of drawing one at random. Without votes it is 0. If equal answers have
    different rewards, their mean reward counts.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    scores = []
    for winner in [answer for answer, n in votes.items() if n == most]:
        own = [r for r, answer in zip(rewards, answers, strict=True) if answer == winner]
        scores.append(sum(own) / len(own))
    return float(np.mean(scores))
