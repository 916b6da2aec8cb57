"""Bad arguments, and parts that do not fit together, end in words that name them."""

import math

import pytest

from scsdpo.advantage import (
    AllOf,
    Blend,
    Divergence,
    DivergenceMix,
    EntropyBonus,
    GatedGap,
    GroupRelative,
    LogitMix,
    PriorAtForks,
    RateWithin,
    ReferenceKL,
    Rhythm,
    Route,
    Routed,
    Sampled,
    SelfDistillation,
    SequenceLevel,
    SignAgreement,
    SquaredHellinger,
    Surprise,
    TeacherInfluence,
    TeacherRatio,
    Trusted,
    Warmup,
    Weighted,
)
from scsdpo.errors import ConfigurationError
from scsdpo.selection import InformativePool
from scsdpo.state import Constant, DecayedBeta, MovingAverage, Ramp
from scsdpo.teacher import (
    AttemptMemory,
    Frozen,
    NoTeacher,
    RememberedDemonstration,
    Restart,
    SiblingOfSeveral,
)
from scsdpo.training import Limits, PolicyOptimizer
from scsdpo.types import Sampling
from scsdpo.weighting import (
    FrozenPassRate,
    HardFilter,
    Horizon,
    PassRate,
    Position,
    Product,
    RatePower,
)
from table_policy import TablePolicy

JSD = SelfDistillation()


PG = {"advantage": GroupRelative(), "teacher": NoTeacher()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardFilter(low=0.9, high=0.1), r"`HardFilter\(low=..., high=...\)` must have"),
        (lambda: Product(factors=()), "at least one weighting"),
        (lambda: FrozenPassRate(path="no.json"), "cannot be read; write it with `scsdpo rates"),
        (lambda: FrozenPassRate(path="no.json", solved=-1), r"`FrozenPassRate\(solved=...\)`"),
        (lambda: Position(floor=2), r"`Position\(floor=...\)` must be in \[0, 1\], got 2"),
        (lambda: Horizon(sharpness=-1), r"`Horizon\(sharpness=...\)` must be >= 0, got -1"),
        (lambda: Position(width=0), r"`Position\(width=...\)` must be > 0, got 0"),
        (lambda: MovingAverage(follow=0), r"`MovingAverage\(follow=...\)`"),
        (lambda: DecayedBeta(prior=-1), r"`DecayedBeta\(prior=...\)` must be >= 0, got -1"),
        (lambda: DecayedBeta(decay=0), r"`DecayedBeta\(decay=...\)`"),
        (lambda: Ramp(start=0, end=1, steps=0), r"`Ramp\(steps=...\)` must be >= 1, got 0"),
        (lambda: Warmup(steps=-1), r"`Warmup\(steps=...\)` must be >= 0, got -1"),
        (lambda: LogitMix(share=Constant(2.0)), r"`LogitMix\(share=...\)` must stay in \[0, 1\]"),
        (lambda: LogitMix(share=Ramp(0.5, 1.5, 9)), "got 0.5 to 1.5"),
        (lambda: DivergenceMix(most=2), r"`DivergenceMix\(most=...\)`"),
        (lambda: DivergenceMix(sharpness=-1), r"`DivergenceMix\(sharpness=...\)`"),
        (
            lambda: PriorAtForks(fork_share=2),
            r"`PriorAtForks\(fork_share=...\)` must be in",
        ),
        (lambda: PriorAtForks(temperature=0), r"`PriorAtForks\(temperature=...\)` must be > 0"),
        (lambda: GatedGap(sharpness=-1), r"`GatedGap\(sharpness=...\)` must be >= 0, got -1"),
        (lambda: AttemptMemory(successes=0, failures=0), "and not both 0, got 0 and 0"),
        (lambda: AttemptMemory(max_tokens=0), r"`AttemptMemory\(max_tokens=...\)` must be >= 1"),
        (
            lambda: SelfDistillation(divergence=SquaredHellinger(), support=Sampled()),
            "reverse KL only, .* got SquaredHellinger",
        ),
        (lambda: TeacherInfluence(quantile=2), r"`TeacherInfluence\(quantile=...\)`"),
        (lambda: TeacherInfluence(floor=0), r"`TeacherInfluence\(floor=...\)`"),
        (
            lambda: SiblingOfSeveral(least_successes=0),
            r"`SiblingOfSeveral\(least_successes=...\)`",
        ),
        (lambda: SignAgreement(otherwise=2), r"`SignAgreement\(otherwise=...\)`"),
        (lambda: Trusted(advantage=GroupRelative(), unmeasured=-1), r"`Trusted\(unmeasured=...\)`"),
        (lambda: TeacherRatio(mix=2), r"`TeacherRatio\(mix=...\)`"),
        (lambda: TeacherRatio(band=-1), r"`TeacherRatio\(band=...\)`"),
        (lambda: Surprise(sharpness=-1), r"`Surprise\(sharpness=...\)`"),
        (lambda: Surprise(cap=0), r"`Surprise\(cap=...\)` must be >= 1, got 0"),
        (lambda: Rhythm(window=0), r"`Rhythm\(window=...\)` must be >= 1, got 0"),
        (lambda: Rhythm(gain=0), r"`Rhythm\(gain=...\)` must be > 0, got 0"),
        (lambda: Rhythm(highest=1), r"`Rhythm\(highest=...\)` must be > 1, got 1"),
        (lambda: Rhythm(cap=0), r"`Rhythm\(cap=...\)` must be >= 1, got 0"),
        (lambda: Routed(routes=()), "at least one route"),
        (lambda: Routed(routes=(Route(advantage=JSD, weight=math.inf),)), r"`Route\(weight=...\)`"),
        (lambda: RatePower(failed=-1), r"`RatePower\(failed=...\)` must be >= 0"),
        (lambda: RatePower(solved=math.inf), r"`RatePower\(solved=...\)` must be >= 0 and finite"),
        (lambda: AllOf(routers=()), "at least one router"),
        (lambda: RateWithin(low=0.5, high=0.1), r"`RateWithin\(low=..., high=...\)` must have"),
        (lambda: Divergence(summand_clip=0), r"`Divergence\(summand_clip=...\)`"),
        (
            lambda: SelfDistillation(
                divergence=Divergence(alpha=1, summand_clip=1.0), support=Sampled()
            ),
            "has no summands to clip",
        ),
        (lambda: Limits(max_grad_norm=0.0), r"`Limits\(max_grad_norm=...\)` must be > 0"),
        (lambda: Limits(max_bad_steps=0), r"`Limits\(max_bad_steps=...\)` must be >= 1, got 0"),
        (lambda: Restart(every=0), r"`Restart\(every=...\)` must be >= 1, got 0"),
        (lambda: Restart(rate=2), r"`Restart\(rate=...\)` must be in \[0, 1\], got 2"),
        (lambda: RememberedDemonstration(size=0), r"`RememberedDemonstration\(size=...\)`"),
        (lambda: InformativePool(questions=0), r"`InformativePool\(questions=...\)`"),
        (lambda: InformativePool(questions=1, max_batches=0), r"\(max_batches=...\)`"),
    ],
)
def test_bad_arguments_name_class_argument_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        (
            {**PG, "advantage": GroupRelative(modulator=TeacherRatio())},
            "GroupRelative needs a teacher, but model.teacher is NoTeacher",
        ),
        (
            {**PG, "selection": InformativePool(questions=2), "sampling": Sampling(n=1)},
            "model.selection: InformativePool compares the rollouts|model.advantage: GroupRelative",
        ),
        ({"advantage": ReferenceKL(), "teacher": NoTeacher()}, "ReferenceKL needs a reference"),
        (
            {"advantage": SelfDistillation(target=PriorAtForks()), "teacher": Frozen()},
            "SelfDistillation needs a reference, but model.reference is NoTeacher",
        ),
        (
            {**PG, "advantage": GroupRelative(level=SequenceLevel()), "token_weighting": Horizon()},
            "model.token_weighting: these token weights read the advantage's value at each token",
        ),
        (
            {
                "advantage": Blend(
                    parts=(
                        Weighted(advantage=EntropyBonus()),
                        Weighted(advantage=JSD, weighting=PassRate()),
                    )
                ),
                "teacher": Frozen(),
                "sampling": Sampling(n=1),
            },
            "model.advantage: PassRate compares the rollouts of a question: set model.sampling.n",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(strategies, message):
    with pytest.raises(ConfigurationError, match=message):
        PolicyOptimizer(TablePolicy(), **strategies)
