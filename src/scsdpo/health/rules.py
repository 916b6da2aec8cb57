"""The rules that ship; docs/health.md has their formulas and what they cost in false alarms."""

from dataclasses import dataclass

from scsdpo.health._base import Finding, Rule, Series


@dataclass(frozen=True, kw_only=True)
class _OverBatches(Rule):
    batches: int = 5

    def __post_init__(self) -> None:
        if self.batches < 2:
            raise ValueError(
                f"`{type(self).__name__}(batches=...)` must be >= 2, got {self.batches}"
            )

    def _window(self, past: Series, figure: str) -> int:
        """A third of the batches that have the figure, but between `batches` and 4 `batches`.

        Windows that grow do not cry in long runs in which nothing changes.
        """
        return min(max(self.batches, len(past[figure]) // 3), 4 * self.batches)


@dataclass(frozen=True, kw_only=True)
class NoSuccess(_OverBatches):
    """No response succeeded anywhere. pass_rate = 0 in each of the last `batches`

    Args:
        batches: >= 2.
    """

    batches: int = 10
    remedy = (
        "look at rollouts/ to see whether the verifier rejects the policy's format; take easier "
        "questions or a better policy, or set model.teacher.context to GoldSolution"
    )

    def look(self, past: Series) -> Finding | None:
        rates = past["pass_rate"][-self.batches :]
        if len(rates) < self.batches or any(rates):
            return None
        return Finding(
            message=f"not one response was right in {self.batches} batches in a row",
            values={"pass_rate": 0.0, "batches": self.batches},
        )


@dataclass(frozen=True, kw_only=True)
class Mastered(_OverBatches):
    """Nothing is left to learn. mean solve_all over the last `batches` > share

    Args:
        batches: >= 2.
        share: of questions whose responses are all right, in [0, 1).
    """

    share: float = 0.9
    remedy = "stop here, or take harder questions: what is always right teaches nothing"

    def look(self, past: Series) -> Finding | None:
        now = past.last("solve_all", self.batches)
        if not now > self.share:
            return None
        return Finding(
            message=f"{now:.0%} of the questions have only right responses",
            values={"solve_all": now, "share": self.share},
        )


@dataclass(frozen=True, kw_only=True)
class Truncation(_OverBatches):
    """Many responses are cut off. mean truncated over the last `batches` > share

    What is cut off is judged, taught and shown as a demonstration as if it had ended there.

    Args:
        batches: >= 2.
        share: of responses that reach `max_new_tokens`, in [0, 1).
    """

    share: float = 0.3
    remedy = (
        "raise model.sampling.max_new_tokens, or ask for shorter responses; look in rollouts/ "
        "whether those that were cut off (finish_reason: length) would have ended"
    )

    def look(self, past: Series) -> Finding | None:
        now = past.last("truncated", self.batches)
        if not now > self.share:
            return None
        return Finding(
            message=f"{now:.0%} of the responses reach the cap on their length",
            values={"truncated": now, "share": self.share},
        )


@dataclass(frozen=True, kw_only=True)
class _Collapse(_OverBatches):
    """A figure has fallen below `ratio` of its first mean, and the pass rate has not risen by more
    than `rise`.
    """

    batches: int = 10
    ratio: float = 0.5
    rise: float = 0.0

    def _look(self, past: Series, figure: str, what: str) -> Finding | None:
        before, now = past.first_and_last(figure, self.batches)
        rate, rate_now = past.first_and_last("pass_rate", self.batches)
        if not (now < self.ratio * before and rate_now <= rate + self.rise):
            return None
        hardly = "hardly rose" if rate_now > rate else "did not rise"
        return Finding(
            message=(
                f"{what} fell from {before:.3g} to {now:.3g} since the start, and the pass rate "
                f"{hardly} ({rate:.2f} to {rate_now:.2f})"
            ),
            values={
                **_ends(figure, before, now),
                **_ends("pass_rate", rate, rate_now),
                "ratio": self.ratio,
                "rise": self.rise,
            },
        )


@dataclass(frozen=True, kw_only=True)
class LengthCollapse(_Collapse):
    """Responses shorten, and are no better. last < ratio * first, means over `batches`

    Args:
        batches: >= 2, at either end.
        ratio: in (0, 1).
        rise: of the pass rate; up to it the pass rate is no better. >= 0.
    """

    remedy = (
        "read the responses in rollouts/; lower the learning rate, or set model.teacher to Frozen "
        "or to EMA with a lower rate"
    )

    def look(self, past: Series) -> Finding | None:
        return self._look(past, "response_length", "the length of responses")


@dataclass(frozen=True, kw_only=True)
class EntropyCollapse(_Collapse):
    """The policy becomes certain, and is hardly better. last < ratio * first, means over `batches`

    A policy that becomes certain is right more often at temperature 1 for that alone: a rise of the
    pass rate by less than `rise` counts as none.

    Args:
        batches: >= 2, at either end.
        ratio: in (0, 1).
        rise: of the pass rate; up to it the pass rate is no better. >= 0.
    """

    batches: int = 5
    ratio: float = 0.3
    rise: float = 0.1
    remedy = (
        "responses of a group become alike, and nothing is learned from equal ones: lower the "
        "learning rate, add an EntropyBonus to model.advantage (Blend), or resume from an older "
        "checkpoint"
    )

    def look(self, past: Series) -> Finding | None:
        return self._look(past, "entropy", "the entropy")


@dataclass(frozen=True, kw_only=True)
class Agreement(_OverBatches):
    """Student and teacher agree more and more, and are wrong more often.

    Of the first and the last third of the batches, but between `batches` and 4 `batches` of them:
    divergence has fallen below `ratio` of what it was, the pass rate has, too, and by more than
    `errors` standard errors (Welch's t).

    Args:
        batches: >= 2, at either end at least.
        ratio: in (0, 1).
        errors: > 0.
    """

    ratio: float = 0.9
    errors: float = 3.0
    remedy = (
        "stop: the student gets worse, and the teacher's weights follow it. See with `scsdpo "
        "validate --demonstrations` whether a demonstration helps this policy; set model.teacher "
        "to Frozen or to EMA with a lower rate, add a policy gradient "
        "(configs/methods/sdpo-hybrid.yaml, srpo.yaml), or lower the learning rate"
    )

    def look(self, past: Series) -> Finding | None:
        count = self._window(past, "divergence")
        divergence, divergence_now = past.first_and_last("divergence", count)
        rate, rate_now = past.first_and_last("pass_rate", count)
        fall = past.fall("pass_rate", count)
        fallen = divergence_now < self.ratio * divergence and rate_now < self.ratio * rate
        if not (fallen and fall > self.errors):
            return None
        return Finding(
            message=(
                f"student and teacher agree more (divergence {divergence:.3g} to "
                f"{divergence_now:.3g}) and are wrong more often (pass rate {rate:.2f} to "
                f"{rate_now:.2f})"
            ),
            values={
                **_ends("divergence", divergence, divergence_now),
                **_ends("pass_rate", rate, rate_now),
                "standard_errors": fall,
                "ratio": self.ratio,
                "errors": self.errors,
            },
        )


@dataclass(frozen=True, kw_only=True)
class EntropyRise(_OverBatches):
    """The policy becomes less certain, and is no better.

    Of the same batches as in `Agreement`: the entropy has risen above `ratio` of what it was and by
    more than `errors` standard errors (Welch's t), and the pass rate has not risen. The first sign
    of a teacher that knows no better than its student: what is learned is to doubt.

    Args:
        batches: >= 2, at either end at least.
        ratio: > 1.
        errors: > 0.
    """

    ratio: float = 1.2
    errors: float = 4.0
    remedy = (
        "stop: the policy only becomes less certain. See with `scsdpo validate --demonstrations` "
        "whether a demonstration helps this policy; add a policy gradient "
        "(configs/methods/sdpo-hybrid.yaml, srpo.yaml), lower model.sampling.temperature, or lower "
        "the learning rate"
    )

    def look(self, past: Series) -> Finding | None:
        count = self._window(past, "entropy")
        entropy, entropy_now = past.first_and_last("entropy", count)
        rate, rate_now = past.first_and_last("pass_rate", count)
        rise = -past.fall("entropy", count)
        if not (entropy_now > self.ratio * entropy and rise > self.errors and rate_now <= rate):
            return None
        return Finding(
            message=(
                f"the entropy rose from {entropy:.3g} to {entropy_now:.3g} nats a token, and the "
                f"pass rate did not ({rate:.2f} to {rate_now:.2f})"
            ),
            values={
                **_ends("entropy", entropy, entropy_now),
                **_ends("pass_rate", rate, rate_now),
                "standard_errors": rise,
                "ratio": self.ratio,
                "errors": self.errors,
            },
        )


@dataclass(frozen=True, kw_only=True)
class HeldOutFalls(Rule):
    """Held-out accuracy is below its first value: by `drop` in two validations in a row; or in one
    by `sudden`, or by `drop` and by more than `share` of that value. After a warm-up the first
    value is that of its last validation.

    Args:
        drop: of mean@k, > 0.
        sudden: of mean@k, > 0. With 56 questions .15 are three standard errors at least.
        share: of the first value, in (0, 1].
    """

    drop: float = 0.05
    sudden: float = 0.15
    share: float = 0.5
    remedy = (
        "stop, and resume from an earlier checkpoint with a lower learning rate, or compare with "
        "the same run under configs/methods/grpo.yaml"
    )

    def look(self, past: Series) -> Finding | None:
        values = past["val/mean"]
        if len(values) < 2:
            return None
        twice = len(values) > 2 and max(values[-2:]) < values[0] - self.drop
        once = max(self.drop, min(self.sudden, self.share * values[0]))
        if not (twice or values[-1] < values[0] - once):
            return None
        return Finding(
            message=f"held-out accuracy fell from {values[0]:.1%} to {values[-1]:.1%}",
            values={
                **_ends("val_mean", values[0], values[-1]),
                "drop": self.drop,
                "sudden": self.sudden,
                "share": self.share,
            },
        )


@dataclass(frozen=True, kw_only=True)
class SamplerDrift(_OverBatches):
    """Sampler and trainer come apart. mean logprob_gap over the last `batches` > gap

    Long before `model.gap` warns of single steps or stops the run.

    Args:
        batches: >= 2.
        gap: in nats a token, > 0.
    """

    gap: float = 0.02
    remedy = (
        "check that the sampler has the trainer's weights and computes in the same precision "
        "(docs/vllm.md); set model.importance to SamplerImportance to correct what remains"
    )

    def look(self, past: Series) -> Finding | None:
        now = past.last("logprob_gap", self.batches)
        if not now > self.gap:
            return None
        return Finding(
            message=f"sampler and trainer differ by {now:.3g} nats a token",
            values={"logprob_gap": now, "gap": self.gap},
        )


@dataclass(frozen=True, kw_only=True)
class ImportanceCapped(_OverBatches):
    """Importance weights are saturated. mean importance_capped over the last `batches` > share

    Args:
        batches: >= 2.
        share: of trained tokens whose weight is at the cap, in (0, 1).
    """

    share: float = 0.05
    remedy = (
        "importance weights at the cap do not correct fully: sample with the current weights "
        "(model.ahead.batches: 0) and without top_p, top_k and min_p of model.sampling, lower "
        "model.updates_per_rollout, or raise the cap of model.importance"
    )

    def look(self, past: Series) -> Finding | None:
        now = past.last("importance_capped", self.batches)
        if not now > self.share:
            return None
        return Finding(
            message=f"{now:.0%} of the importance weights are at their cap",
            values={"importance_capped": now, "share": self.share},
        )


def _ends(figure: str, first: float, last: float) -> dict[str, float]:
    return {f"{figure}_first": first, f"{figure}_last": last}


def shipped_rules() -> tuple[Rule, ...]:
    """All of them, with their defaults."""
    return (
        NoSuccess(),
        Mastered(),
        Truncation(),
        LengthCollapse(),
        EntropyCollapse(),
        Agreement(),
        EntropyRise(),
        HeldOutFalls(),
        SamplerDrift(),
        ImportanceCapped(),
    )
