"""A question of an evaluation, with its scores."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scsdpo.statistics import majority, pass_at_k, pass_ks
from scsdpo.thinking import without_thinking
from scsdpo.types import Judged, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedQuestion:
    """One question with its k responses, judged."""

    key: str
    """`Prompt.key`."""
    category: str
    """`Prompt.category`; with several sources it begins with the source's name."""
    question: str
    """Text of the last message before the response."""
    gold: str
    """The gold answer."""
    rewards: tuple[float, ...]
    """[k] rewards."""
    successes: tuple[bool, ...]
    """[k], True: reward >= the success threshold."""
    answers: tuple[str | None, ...]
    """[k] extracted answers; None: the response holds none."""
    lengths: tuple[int, ...]
    """[k] lengths in tokens."""
    finished: tuple[bool, ...]
    """[k], True: not cut off at `max_new_tokens`."""
    errors: int
    """Number of verdicts whose verifier failed."""
    response: str
    """The first of the k responses."""
    right: str = ""
    """The first of the best successful responses that hold more than thinking; '': none
    succeeded."""

    def scores(self) -> dict[str, float]:
        """mean@k, maj@k, pass@1, 2, 4, ... k, and shares; each figure is their mean."""
        k = len(self.rewards)
        right = sum(self.successes)
        return {
            f"mean@{k}": sum(self.rewards) / k,
            f"maj@{k}": majority(self.rewards, self.answers),
            **{f"pass@{few}": pass_at_k(right, k, few) for few in pass_ks(k)},
            "well_formed": sum(answer is not None for answer in self.answers) / k,
            "truncated": sum(not whole for whole in self.finished) / k,
            "response_length": sum(self.lengths) / k,
        }


def questions(judged: Judged) -> Iterator[EvaluatedQuestion]:
    """The questions of a judged batch, in order."""
    for q, prompt in enumerate(judged.prompts):
        verdicts, texts = judged.verdicts[q], judged.texts[q]
        successes = tuple(judged.successes[q].tolist())
        yield EvaluatedQuestion(
            key=prompt.key,
            category=prompt.category,
            question=prompt.messages[-1]["content"] if prompt.messages else "",
            gold=prompt.answer,
            rewards=tuple(judged.rewards[q].tolist()),
            successes=successes,
            answers=tuple(verdict.answer for verdict in verdicts),
            lengths=tuple(judged.lengths[q].tolist()),
            finished=tuple(judged.ended[q].tolist()),
            errors=sum(bool(verdict.error) for verdict in verdicts),
            response=texts[0],
            right=_right(prompt, [texts[g] for g in judged.best_first(q)]),
        )


def _right(prompt: Prompt, best: Sequence[str]) -> str:
    said = (text for text in best if without_thinking(prompt.thinking + text).strip())
    return next(said, best[0] if best else "")


def predictions(judged: Judged) -> Iterator[dict[str, Any]]:
    """A record for each response of a judged batch, in order; see docs/evaluation.md."""
    lengths, ended = judged.lengths.tolist(), judged.ended.tolist()
    for q, prompt in enumerate(judged.prompts):
        texts = judged.texts[q]
        for sample, text in enumerate(texts):
            yield {
                "key": prompt.key,
                "sample": prompt.copy * len(texts) + sample,
                "category": prompt.category,
                "question": prompt.messages[-1]["content"] if prompt.messages else "",
                "gold": prompt.answer,
                "response": text,
                **asdict(judged.verdicts[q][sample]),
                "n_tokens": lengths[q][sample],
                "finished": ended[q][sample],
            }
