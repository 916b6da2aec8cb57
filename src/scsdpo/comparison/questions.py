"""Compare two policies on the same questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scsdpo.errors import ConfigurationError
from scsdpo.evaluation import EvaluatedQuestion, Result, by_category
from scsdpo.evaluation.figures import LEVEL
from scsdpo.statistics import Estimate, detectable_difference, interval, paired_interval


@dataclass(frozen=True, kw_only=True)
class ComparedFigure:
    """One figure of both policies, and their difference."""

    category: str
    """Category of the questions; '': all."""
    name: str
    a: Estimate
    b: Estimate
    difference: Estimate
    """b - a, paired by question."""
    detectable: float
    """The smallest true difference that this many questions detect in 4 of 5 experiments."""


@dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """A comparison of two evaluations, paired by question."""

    rows: Sequence[ComparedFigure]
    won: Sequence[tuple[EvaluatedQuestion, EvaluatedQuestion]]
    """(a's, b's) questions in which b's mean reward is higher, the largest difference first."""
    lost: Sequence[tuple[EvaluatedQuestion, EvaluatedQuestion]]
    """(a's, b's) questions in which a's is higher, the largest difference first."""


def compare_questions(
    a: Result, b: Result, *, names: tuple[str, str], level: float = LEVEL
) -> PairedComparison:
    """Compare b with a.

    Args:
        a: the baseline.
        b: the other.
        names: names of both, for messages.
        level: level of the intervals.

    Raises:
        ConfigurationError: if questions or numbers of responses differ.
    """
    pairs = paired(a, b, names)
    partners = dict(zip(map(id, a.questions), (other for _, other in pairs), strict=True))
    rows = []
    for category, group in by_category(a.questions).items():
        rows += compared_figures(category, [(one, partners[id(one)]) for one in group], level=level)
    gains = [(_mean(right) - _mean(left), (left, right)) for left, right in pairs]
    gains.sort(key=lambda gain: -gain[0])
    return PairedComparison(
        rows=rows,
        won=[pair for gain, pair in gains if gain > 0],
        lost=[pair for gain, pair in reversed(gains) if gain < 0],
    )


def paired(
    a: Result, b: Result, names: tuple[str, str]
) -> list[tuple[EvaluatedQuestion, EvaluatedQuestion]]:
    """Pairs of the questions of both, in a's order; copies of a question are paired in order."""
    left, right = _keyed(a.questions), _keyed(b.questions)
    odd = [key for key, _ in left.keys() ^ right.keys()]
    if odd:
        missing = len(left.keys() - right.keys()), len(right.keys() - left.keys())
        raise ConfigurationError(
            f"{names[0]} and {names[1]} answer different questions ({missing[0]} only in the "
            f"first, {missing[1]} only in the second, e.g. {min(odd)!r}): evaluate both on the "
            "same data.val"
        )
    pairs = [(one, right[key]) for key, one in left.items()]
    for one, other in pairs:
        if len(one.rewards) != len(other.rewards):
            raise ConfigurationError(
                f"{names[0]} has {len(one.rewards)} responses to a question and {names[1]} "
                f"{len(other.rewards)}: evaluate both with the same model.val_sampling.n"
            )
    return pairs


def compared_figures(
    category: str, pairs: Sequence[tuple[EvaluatedQuestion, EvaluatedQuestion]], *, level: float
) -> list[ComparedFigure]:
    """A row for each score; for a category only mean@k and maj@k."""
    scores = [(one.scores(), other.scores()) for one, other in pairs]
    names = list(scores[0][0])
    rows = []
    for name in names[:2] if category else names:
        left, right = ([pair[side][name] for pair in scores] for side in (0, 1))
        difference = paired_interval(left, right, level=level)
        rows.append(
            ComparedFigure(
                category=category,
                name=name,
                a=interval(left, level=level),
                b=interval(right, level=level),
                difference=difference,
                detectable=detectable_difference(difference, level=level),
            )
        )
    return rows


def _keyed(questions: Sequence[EvaluatedQuestion]) -> dict[tuple[str, int], EvaluatedQuestion]:
    seen: Counter[str] = Counter()
    keyed = {}
    for question in questions:
        keyed[question.key, seen[question.key]] = question
        seen[question.key] += 1
    return keyed


def _mean(question: EvaluatedQuestion) -> float:
    return sum(question.rewards) / len(question.rewards)
