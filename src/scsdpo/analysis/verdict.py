"""Says in words what `Readiness` shows: what is in the way, and what to change."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from scsdpo.analysis.readiness import Readiness

Level = Literal["stop", "warning", "good"]
HYBRID = "configs/methods/sdpo-hybrid.yaml or srpo.yaml"


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits beyond which a figure gets a remark; docs/will-it-work.md shows what they predict."""

    formed: float = 0.5
    """Least share of responses with an answer."""
    unformed: float = 0.05
    """Least share of responses with an answer with which a run can begin at all."""
    hopeless: float = 0.8
    """Largest share of questions without a right response."""
    lost: float = 0.95
    """Largest share of questions without a right response with which a run can begin at all."""
    mastered: float = 0.8
    """Largest share of questions without a wrong response."""
    truncated: float = 0.3
    """Largest share of responses that reach the cap."""
    shift: float = 0.02
    """How far one step may move the policy, in nats a token."""
    ruinous_shift: float = 0.1
    """A step that moves the policy so far has ended every run that was tried below its start."""
    usual_shift: float = 0.003
    """How far one step moved the policy in runs that learned."""


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One line of the verdict."""

    level: Level
    """`stop`: do not train like this; `warning`: this may be a problem; `good`."""
    text: str
    remedy: str = ""


def verdict(found: Readiness, limits: Thresholds = Thresholds()) -> list[Remark]:
    """Remarks on the measurements, the worst first.

    Args:
        found: the measurements.
        limits: limits beyond which a figure gets a remark.
    """
    remarks = [
        *_answers(found, limits),
        *_taught(found),
        *_teacher(found),
        *_step(found),
        *_shift(found, limits),
    ]
    order: tuple[Level, ...] = ("stop", "warning", "good")
    return sorted(remarks, key=lambda remark: order.index(remark.level))


def _answers(found: Readiness, limits: Thresholds) -> Iterator[Remark]:
    own = found.answers
    if own.formed < limits.formed:
        yield Remark(
            level="stop" if own.formed < limits.unformed else "warning",
            text=f"the format is not followed: {own.formed:.0%} of the responses have an answer "
            f"(should be at least {limits.formed:.0%})",
            remedy="show the format in the prompt, warm the policy up on examples of it, or let "
            "the verifier accept what it writes",
        )
    if own.hopeless > limits.hopeless:
        yield Remark(
            level="stop" if own.hopeless > limits.lost else "warning",
            text=f"out of reach: {own.hopeless:.0%} of the questions have no right response "
            f"(should be at most {limits.hopeless:.0%})",
            remedy=f"take easier questions, more responses (model.sampling.n), a better policy"
            f"{_or(_used(found))}",
        )
    if own.mastered > limits.mastered:
        yield Remark(
            level="stop",
            text=f"mastered: {own.mastered:.0%} of the questions have only right responses "
            f"(should be at most {limits.mastered:.0%})",
            remedy="take harder questions: nothing is learned from these",
        )
    if own.truncated > limits.truncated:
        yield Remark(
            level="warning",
            text=f"cut off: {own.truncated:.0%} of the responses reach their length limit (should "
            f"be at most {limits.truncated:.0%}) and are judged and learned from as if they had "
            "ended",
            remedy="raise model.sampling.max_new_tokens, or lower model.sampling.temperature",
        )


def _taught(found: Readiness) -> Iterator[Remark]:
    if found.taught == 0:
        yield Remark(
            level="warning",
            text="no response has a teacher: model.teacher.context has nothing to show",
            remedy=f"ask more questions (--questions) or more often (model.sampling.n)"
            f"{_or(_used(found))}, or rely on rewards: {HYBRID}",
        )
    elif found.taught > 0 and "configured" not in found.told:
        yield Remark(
            level="warning",
            text="only one question has a teacher",
            remedy="ask more questions (--questions), to see whether it helps",
        )


def _teacher(found: Readiness) -> Iterator[Remark]:
    told = found.told.get("configured")
    if told is None:
        return
    gain = told.gain
    text = (
        f"with the teacher's prompt {told.told.value:.0%} of the responses are right, without it "
        f"{told.without.value:.0%} (difference {100 * gain.value:+.0f} points, "
        f"{100 * gain.low:+.0f} to {100 * gain.high:+.0f}; {gain.n} questions)"
    )
    better = " or ".join(_used(found)) or "more"
    remedy = (
        f"show the teacher {better}, warm the policy up first (model.warmup.steps), or rely on "
        f"rewards: {HYBRID}"
    )
    if gain.low > 0:
        yield Remark(level="good", text=text)
    elif gain.high < 0:
        up = found.directions is not None and found.directions.step.low > 0
        yield Remark(
            level="warning" if up else "stop",
            text=f"the teacher's prompt makes it worse: {text}",
            remedy=remedy,
        )
    else:
        yield Remark(
            level="warning",
            text=f"the teacher does not use its prompt: {text}",
            remedy=remedy,
        )
    another, beyond = found.told.get("another"), told.beyond_another
    if another and beyond and another.gain.low > 0 and not beyond.low > 0:
        yield Remark(
            level="warning",
            text=f"another question's demonstration helps, too ({another.told.value:.0%}), and not "
            f"clearly less (difference {100 * beyond.value:+.0f} points, "
            f"{100 * beyond.low:+.0f} to {100 * beyond.high:+.0f}): the gain may not come from the "
            "demonstration's content",
            remedy="compare a run with a few examples in every prompt",
        )


def _used(found: Readiness) -> list[str]:
    """Information that the policy gains from and the configured context does not show."""
    kinds = {"gold": "gold solutions (GoldSolution", "feedback": "feedback (Feedback"}
    return [
        f"{kind}: {100 * found.told[name].gain.value:+.0f} points)"
        for name, kind in kinds.items()
        if name in found.told and found.told[name].gain.low > 0
    ]


def _or(remedies: list[str]) -> str:
    return "".join(f", or show the teacher {remedy}" for remedy in remedies)


def _step(found: Readiness) -> Iterator[Remark]:
    if found.directions is None:
        return
    step, reward = found.directions.step, found.directions.reward
    text = (
        f"cosine {step.value:+.3f} ({step.low:+.3f} to {step.high:+.3f}; {step.n} questions) with "
        f"the reward's gradient on other questions ({reward:+.3f} with itself)"
    )
    if step.n == 0:
        yield Remark(
            level="warning",
            text="there is no first step to measure: the loss or the reward has no gradient",
            remedy="ask more questions (--questions)",
        )
    elif step.high < 0:
        yield Remark(
            level="stop",
            text=f"the first step points away from the reward: {text}",
            remedy=f"add a policy gradient ({HYBRID}), or lower model.sampling.temperature",
        )
    elif step.low > 0:
        yield Remark(level="good", text=f"the first step points up: {text}")
    else:
        yield Remark(
            level="warning",
            text=f"the direction of the first step cannot be seen: {text}",
            remedy="ask more questions (--questions), which narrows the interval",
        )


def _shift(found: Readiness, limits: Thresholds) -> Iterator[Remark]:
    if found.directions is None or not found.directions.shift > limits.shift:
        return
    shift, lr = found.directions.shift, found.directions.lr
    # The shift grows with the square of the rate.
    smaller = lr * (limits.usual_shift / shift) ** 0.5
    yield Remark(
        level="stop" if shift > limits.ruinous_shift else "warning",
        text=f"the learning rate is large for this policy: one step at {lr:.2g} moves it by "
        f"{shift:.2g} nats a token (at most {limits.shift:g})",
        remedy=f"set model.optimizer.init_args.lr to about {smaller:.1g}, which moves it by about "
        f"{limits.usual_shift:g}",
    )
