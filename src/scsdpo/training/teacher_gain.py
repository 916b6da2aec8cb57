"""Told against alone: how much better a policy answers when it reads what its teacher would."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from scsdpo.distributed import all_gather, rank_and_size
from scsdpo.errors import TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.statistics import Estimate, paired_interval, score_interval
from scsdpo.teacher import (
    Context,
    Contexts,
    GoldSolution,
    RememberedDemonstration,
    SiblingDemonstration,
)
from scsdpo.types import Judged, Prompt, Responses, Sampling

Shown = SiblingDemonstration | GoldSolution
"""Contexts that show one demonstration, of which another can take the place."""


class Answering(Protocol):
    """A `PolicyOptimizer`: samples and judges."""

    policy: CausalLM
    sampling: Sampling
    """How responses are drawn in training."""
    batches: Tensor

    @property
    def device(self) -> torch.device:
        """Where tensors are."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        """Responses of the policy as it is now."""

    def judge(self, responses: Responses) -> Judged:
        """Their verdicts."""


@dataclass(frozen=True, kw_only=True)
class Telling:
    """One way of telling the teacher something: accuracy of responses drawn after its prompt."""

    without: Estimate
    """The policy's own accuracy on the same questions, in responses drawn anew: those that are
    shown were chosen for a success."""
    told: Estimate
    gain: Estimate
    """Paired by question."""
    beyond_another: Estimate | None = None
    """Of `configured`: told minus that told of another question, paired by question."""

    @classmethod
    def of(cls, told: Mapping[str, float], own: Mapping[str, float]) -> "Telling":
        """Of pass rates by question: of those that were told, and of all alone."""
        return cls(
            without=score_interval([own[key] for key in told]),
            told=score_interval([*told.values()]),
            gain=gain_over(own, told),
        )

    def figures(self) -> dict[str, float]:
        """For the log; those that are known."""
        gain = self.gain
        shown = {"told": self.told.value, "alone": self.without.value, "gain": gain.value}
        every = {**shown, "gain_low": gain.low, "gain_high": gain.high, "gain_questions": gain.n}
        return {name: value for name, value in every.items() if math.isfinite(value)}

    def __str__(self) -> str:
        gain = self.gain
        return (
            f"told {self.told.value:.0%} right, alone {self.without.value:.0%} (difference "
            f"{100 * gain.value:+.0f} points, {100 * gain.low:+.0f} to {100 * gain.high:+.0f}; "
            f"{gain.n} questions)"
        )


class Asked(NamedTuple):
    """A question, and what is read in its place; empty: there is nothing to tell."""

    prompt: Prompt
    ids: tuple[int, ...]


def gain_over(without: Mapping[str, float], told: Mapping[str, float]) -> Estimate:
    """Mean of told - without over the questions that have both, and its interval."""
    both = [key for key in told if key in without]
    return paired_interval([without[key] for key in both], [told[key] for key in both])


def shown_by(context: Context) -> Shown | None:
    """The context that puts a demonstration into words; None: this one shows none."""
    if isinstance(context, Contexts):
        return shown_by(next(iter(context.named.values())))
    if isinstance(context, RememberedDemonstration):
        return context.demonstration
    return context if isinstance(context, SiblingDemonstration | GoldSolution) else None


def demonstration(shown: Shown, question: int, judged: Judged) -> str:
    """What `shown` tells of a question's responses to somebody who is none of them."""
    if isinstance(shown, GoldSolution):
        return judged.prompts[question].answer
    return shown.demonstration(question, -1, judged)


def pass_rates(
    model: Answering, name: str, asked: Sequence[Asked], *, spare: Sequence[Prompt] = ()
) -> dict[str, float]:
    """Pass rate of each question, by its key, of the questions of all ranks.

    Args:
        model: answers and judges.
        name: of this asking: its draws are its own.
        asked: this rank's questions.
        spare: on several ranks, of which one is asked where `asked` is empty: all ranks sample.
    """
    some = asked or [Asked(prompt, prompt.ids) for prompt in spare[:1] if rank_and_size()[1] > 1]
    prompts = [replace(one.prompt, key=f"{name}/{one.prompt.key}", ids=one.ids) for one in some]
    if not prompts:
        return {}
    rates = model.judge(model.sample(prompts, model.sampling.at(0))).pass_rates.tolist()
    keys = [one.prompt.key for one in asked]
    return dict(all_gather(list(zip(keys, rates, strict=False))))


def told_against_alone(
    model: Answering, shown: Shown, prompts: Sequence[Prompt], name: str, room: float
) -> Telling:
    """Ask some questions alone, and told what `shown` puts into words.

    Args:
        model: answers and judges.
        shown: tells the data's answer, or a success among responses drawn for it.
        prompts: this rank's questions, with their ids.
        name: of this asking, such as the number of the step: its draws are its own.
        room: tokens that a prompt may have; longer ones are left out.
    """
    seen: Judged | None = None
    if not isinstance(shown, GoldSolution):
        drawn = [replace(prompt, key=f"{name}/shown/{prompt.key}") for prompt in prompts]
        seen = model.judge(model.sample(drawn, model.sampling.at(0)))
    texts = [
        p.answer if seen is None else demonstration(shown, q, seen) for q, p in enumerate(prompts)
    ]
    asked = [
        Asked(prompt, ids)
        for prompt, text in zip(prompts, texts, strict=True)
        if text.strip() and 0 < len(ids := shown.show(model.policy.chat, prompt, text)) <= room
    ]
    alone = [Asked(one.prompt, one.prompt.ids) for one in asked]
    own = pass_rates(model, f"{name}/alone", alone, spare=prompts)
    told = pass_rates(model, f"{name}/told", asked, spare=prompts)
    return Telling.of(told, own)


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """Before the first step: whether the policy answers worse when it is told what its teacher is.

    Asked where the credit is the teacher's alone (no policy gradient beside it), the teacher shows
    demonstrations, and the policy is not the shipped `tiny`. Some training questions are answered
    alone and told (`Telling`); where the 95 % interval of the difference lies below 0 the run stops
    before it trains. After a warm-up the stage's last measurement is what counts.

    Args:
        stop: whether such a run stops; if not, the line is a warning.
        questions: at most so many are asked, over all ranks.
        share: of the run's planned responses, at most so many are drawn for it. Where that is less
            than four questions' worth, nothing is asked.

    Raises:
        ValueError: if `share` is outside [0, 1].

    Source:
        docs/will-it-work.md; ours.
    """

    stop: bool = True
    questions: PositiveInt = 16
    share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"`TeacherCheck(share=...)` must be in [0, 1], got {self.share}")

    def affordable(self, planned: float, shown: Shown) -> int:
        """Questions to ask in a run of so many planned ones; 0: too few to tell."""
        draws = 2 if isinstance(shown, GoldSolution) else 3
        most = int(min(self.share * planned / draws, self.questions))
        return most if most >= _FEWEST else 0

    def judge(self, telling: Telling) -> None:
        """Stop, or warn, where the whole interval of the gain is below 0.

        Raises:
            TrainingStopped: then, before any step.
        """
        if not telling.gain.high < 0:
            return
        said = (
            f"the policy answers worse for what its teacher is told: {telling}, and the teacher is "
            "all that model.advantage learns from: set model.warmup.steps (docs/will-it-work.md), "
            "or put a policy gradient beside it (configs/methods/sdpo-hybrid.yaml)"
        )
        if self.stop:
            raise TrainingStopped(f"{said}; model.warmup.check.stop: false trains all the same")
        rank_zero_warn(said)


_FEWEST = 4
