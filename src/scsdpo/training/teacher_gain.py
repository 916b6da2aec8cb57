"""Measures how much better a policy answers after its teacher's prompt than without it."""

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

DemonstratingContext = SiblingDemonstration | GoldSolution
"""Contexts that show a demonstration, which can be replaced by another one."""


class SamplerAndJudge(Protocol):
    """The part of a `PolicyOptimizer` that samples and judges."""

    policy: CausalLM
    sampling: Sampling
    """How responses are drawn in training."""
    batches: Tensor

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        """Sample responses of the present policy."""

    def judge(self, responses: Responses) -> Judged:
        """Add the verifiers' verdicts."""


@dataclass(frozen=True, kw_only=True)
class TeacherGain:
    """Accuracy of responses that the policy draws after its teacher's prompt, and without it."""

    without: Estimate
    """Accuracy after the question alone. Responses are drawn anew, since those that are shown were
    chosen for a success."""
    told: Estimate
    """Accuracy after the teacher's prompt."""
    gain: Estimate
    """`told` - `without`, paired by question."""
    beyond_another: Estimate | None = None
    """`told` minus the accuracy after a prompt with another question's demonstration, paired by
    question; measured for the configured context."""

    @classmethod
    def of(cls, told: Mapping[str, float], own: Mapping[str, float]) -> "TeacherGain":
        """Estimates from pass rates by question's key: with the teacher's prompt, and without."""
        return cls(
            without=score_interval([own[key] for key in told]),
            told=score_interval([*told.values()]),
            gain=paired_gain(own, told),
        )

    def figures(self) -> dict[str, float]:
        """Figures for the log; those that are finite."""
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


class PromptAsRead(NamedTuple):
    """A question, and the token ids that the policy reads in its place."""

    prompt: Prompt
    ids: tuple[int, ...]


def paired_gain(without: Mapping[str, float], told: Mapping[str, float]) -> Estimate:
    """Mean of `told` - `without` over the questions that have both, with its interval."""
    both = [key for key in told if key in without]
    return paired_interval([without[key] for key in both], [told[key] for key in both])


def demonstrating_context(context: Context) -> DemonstratingContext | None:
    """The part of `context` that shows a demonstration; None: it shows none."""
    if isinstance(context, Contexts):
        return demonstrating_context(next(iter(context.named.values())))
    if isinstance(context, RememberedDemonstration):
        return context.demonstration
    return context if isinstance(context, SiblingDemonstration | GoldSolution) else None


def demonstration(context: DemonstratingContext, question: int, judged: Judged) -> str:
    """The demonstration that `context` shows to a reader who is none of the question's rollouts."""
    if isinstance(context, GoldSolution):
        return judged.prompts[question].answer
    return context.demonstration(question, -1, judged)


def pass_rates(
    model: SamplerAndJudge,
    name: str,
    asked: Sequence[PromptAsRead],
    *,
    spare: Sequence[Prompt] = (),
) -> dict[str, float]:
    """Pass rate by question's key, for the questions of all ranks.

    Args:
        model: samples and judges.
        name: name of this measurement. It enters the seeds, so that each one draws for itself.
        asked: this rank's questions.
        spare: on several ranks, a rank without questions asks one of these: sampling is a
            collective.
    """
    some = asked or [
        PromptAsRead(prompt, prompt.ids) for prompt in spare[:1] if rank_and_size()[1] > 1
    ]
    prompts = [replace(one.prompt, key=f"{name}/{one.prompt.key}", ids=one.ids) for one in some]
    if not prompts:
        return {}
    rates = model.judge(model.sample(prompts, model.sampling.at(0))).pass_rates.tolist()
    keys = [one.prompt.key for one in asked]
    return dict(all_gather(list(zip(keys, rates, strict=False))))


def measure_teacher_gain(
    model: SamplerAndJudge,
    context: DemonstratingContext,
    prompts: Sequence[Prompt],
    name: str,
    room: float,
) -> TeacherGain:
    """Measure accuracy on some questions, alone and with a demonstration.

    Args:
        model: samples and judges.
        context: shows the data's answer, or a success among responses that are drawn for this.
        prompts: this rank's questions, with their ids.
        name: name of this measurement, such as the number of the step. It enters the seeds.
        room: tokens that a prompt may have; longer ones are left out.
    """
    seen: Judged | None = None
    if not isinstance(context, GoldSolution):
        drawn = [replace(prompt, key=f"{name}/shown/{prompt.key}") for prompt in prompts]
        seen = model.judge(model.sample(drawn, model.sampling.at(0)))
    texts = [
        p.answer if seen is None else demonstration(context, q, seen) for q, p in enumerate(prompts)
    ]
    asked = [
        PromptAsRead(prompt, ids)
        for prompt, text in zip(prompts, texts, strict=True)
        if text.strip() and 0 < len(ids := context.show(model.policy.chat, prompt, text)) <= room
    ]
    alone = [PromptAsRead(one.prompt, one.prompt.ids) for one in asked]
    own = pass_rates(model, f"{name}/alone", alone, spare=prompts)
    told = pass_rates(model, f"{name}/told", asked, spare=prompts)
    return TeacherGain.of(told, own)


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """Check before the first step that the teacher's prompt does not make the policy answer worse.

    The check is made where all credit is the teacher's (no policy gradient beside it), the teacher
    shows demonstrations, and the policy is not the shipped `tiny`. The policy answers some training
    questions alone and after the teacher's prompt (`TeacherGain`). If the 95 % interval of the
    difference lies below 0, the run stops before it trains. After a warm-up its last measurement is
    used.

    Args:
        stop: stop such a run; false: print a warning.
        questions: number of questions that are asked, at most, over all ranks.
        share: of the run's planned responses, the share that may be drawn for this check. If that
            is less than four questions need, no check is made.

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

    def affordable(self, planned: float, context: DemonstratingContext) -> int:
        """Questions to ask in a run of so many planned questions; 0: too few to measure."""
        draws = 2 if isinstance(context, GoldSolution) else 3
        most = int(min(self.share * planned / draws, self.questions))
        return most if most >= _FEWEST else 0

    def judge(self, gain: TeacherGain) -> None:
        """Stop, or warn, if the whole interval of the gain is below 0.

        Raises:
            TrainingStopped: then, before any step.
        """
        if not gain.gain.high < 0:
            return
        said = (
            f"the teacher's prompt makes the policy answer worse: {gain}, and model.advantage "
            "learns from the teacher alone: set model.warmup.steps (docs/will-it-work.md), or add "
            "a policy gradient (configs/methods/sdpo-hybrid.yaml)"
        )
        if self.stop:
            raise TrainingStopped(
                f"{said}. To train all the same, set model.warmup.check.stop to false"
            )
        rank_zero_warn(said)


_FEWEST = 4
"""Fewer questions than these say nothing."""
