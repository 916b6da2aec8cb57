"""A strategy that is made of others needs what they need: every slot, every need, any depth."""

import dataclasses
import typing
from abc import ABC

import pytest

import scsdpo.advantage
import scsdpo.loss
import scsdpo.reduction
import scsdpo.selection
import scsdpo.teacher
import scsdpo.weighting
from scsdpo.advantage import (
    Advantage,
    Blend,
    EntropyBonus,
    GroupRelative,
    LeaveOneOut,
    Modulator,
    RatioLevel,
    Route,
    Routed,
    SelfDistillation,
    Target,
    Trusted,
    TurnRelative,
    Unscaled,
    Weighted,
)
from scsdpo.errors import ConfigurationError
from scsdpo.teacher import EMA, NoTeacher
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Sampling
from scsdpo.weighting import PassRate, Product, Uniform, Weighting
from table_policy import TablePolicy

ROOMS = (
    scsdpo.advantage,
    scsdpo.loss,
    scsdpo.reduction,
    scsdpo.selection,
    scsdpo.teacher,
    scsdpo.weighting,
)
NEEDS = ("needs_group", "needs_teacher", "needs_reference", "needs", "derivations", "weightings")
FULL = {
    "needs": frozenset({"student_entropy"}),
    "derivations": (print,),
    "weightings": (PassRate(),),
}
"""A need that is not a flag, at a value that is not the default."""

COMPOSITES = {
    (Weighted, "advantage"): lambda child: Blend(
        parts=(Weighted(advantage=EntropyBonus()), Weighted(advantage=child))
    ),
    (Weighted, "weighting"): lambda child: Blend(
        parts=(
            Weighted(advantage=EntropyBonus()),
            Weighted(advantage=EntropyBonus(), weighting=child),
        )
    ),
    (Route, "advantage"): lambda child: Routed(
        routes=(Route(advantage=EntropyBonus()), Route(advantage=child))
    ),
    (Route, "weighting"): lambda child: Routed(
        routes=(Route(advantage=EntropyBonus(), weighting=child), Route(advantage=EntropyBonus()))
    ),
    (SelfDistillation, "target"): lambda child: SelfDistillation(target=child),
    (GroupRelative, "modulator"): lambda child: GroupRelative(modulator=child),
    (GroupRelative, "level"): lambda child: GroupRelative(level=child),
    (TurnRelative, "modulator"): lambda child: TurnRelative(modulator=child),
    (TurnRelative, "level"): lambda child: TurnRelative(level=child),
    (Trusted, "advantage"): lambda child: Trusted(advantage=child),
    (Product, "factors"): lambda child: Product(factors=(Uniform(), child)),
}


OF_THEIR_OWN = {
    (GroupRelative, "needs_group"),
    (TurnRelative, "needs_group"),
    (Trusted, "needs_group"),
    (Trusted, "needs_teacher"),
}
"""What a composite needs whatever its child does."""


def slots():
    """(class, field, its kind) of every field of a public strategy that holds strategies."""
    for room in ROOMS:
        for name in room.__all__:
            owner = getattr(room, name)
            if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
                continue
            hints = typing.get_type_hints(owner)
            for field in dataclasses.fields(owner):
                hint = hints[field.name]
                kinds = [hint, *typing.get_args(hint)]
                for kind in kinds:
                    if isinstance(kind, type) and issubclass(kind, ABC) and needs_of(kind):
                        yield owner, field.name, kind


def needs_of(kind):
    return [need for need in NEEDS if isinstance(getattr(kind, need, None), property)]


def spy(kind, **values):
    """A strategy of a kind that needs what `values` say, and nothing else."""
    nothing = {name: lambda self, *_, **__: None for name in kind.__abstractmethods__}
    stated = {name: property(lambda self, value=value: value) for name, value in values.items()}
    return type("Spy", (kind,), nothing | stated)()


def quiet(kind):
    """The needs of a kind at their least: a `Modulator` needs a teacher unless it says no."""
    return {need: False for need in needs_of(kind) if need.startswith("needs_")}


def test_every_slot_of_a_strategy_that_holds_others_is_tested_here():
    found = {(owner, field): kind for owner, field, kind in slots()}
    assert set(found) == set(COMPOSITES)
    assert {Advantage, Weighting, Modulator, RatioLevel, Target} == set(found.values())


@pytest.mark.parametrize(
    ("owner", "field", "kind"), sorted(slots(), key=str), ids=lambda x: getattr(x, "__name__", x)
)
def test_a_composite_needs_what_its_child_needs(owner, field, kind):
    build, told = COMPOSITES[owner, field], 0
    for need in needs_of(kind):
        value = FULL.get(need, True)
        with_it = build(spy(kind, **(quiet(kind) | {need: value})))
        without = build(spy(kind, **quiet(kind)))
        if not hasattr(with_it, need):
            continue
        told += 1
        have, had = getattr(with_it, need), getattr(without, need)
        if need in FULL:
            assert set(value) <= set(have) and not set(value) & set(had), need
        else:
            assert have is True, need
            assert had is ((owner, need) in OF_THEIR_OWN), need
    assert told


@pytest.mark.parametrize("need", NEEDS)
def test_a_need_is_passed_on_from_any_depth(need):
    child = spy(Advantage, **(quiet(Advantage) | {need: FULL.get(need, True)}))
    for build in (*[make for (o, f), make in COMPOSITES.items() if f == "advantage"],) * 2:
        child = build(child)
    assert getattr(child, need)


def test_what_a_weighting_is_asked_reaches_it_from_any_composite():
    class Asked(Weighting):
        def __init__(self):
            self.heard = []

        def configure(self, policy):
            self.heard.append("configure")

        def check_questions(self, keys):
            self.heard.append(tuple(keys))

        def weigh(self, judged):
            raise NotImplementedError

    mine = Asked()
    nested = COMPOSITES[Route, "advantage"](COMPOSITES[Weighted, "weighting"](mine))
    model = PolicyOptimizer(TablePolicy(), advantage=nested, weighting=Product(factors=(mine,)),
                            teacher=NoTeacher())  # fmt: skip
    model.weightings.configure(model.policy)
    model.weightings.check_questions(iter("ab"))
    assert sorted(map(str, mine.heard)) == ["('a', 'b')"] * 2 + ["configure"] * 2


RLOO = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"advantage": COMPOSITES[Weighted, "advantage"](RLOO)}, "advantage: GroupRelative"),
        ({"advantage": COMPOSITES[Route, "advantage"](RLOO)}, "advantage: GroupRelative"),
        (
            {"advantage": COMPOSITES[Route, "advantage"](COMPOSITES[Weighted, "advantage"](RLOO))},
            "advantage: GroupRelative",
        ),
        ({"advantage": COMPOSITES[Weighted, "weighting"](PassRate())}, "advantage: PassRate"),
        ({"weighting": Product(factors=(Uniform(), PassRate()))}, "weighting: PassRate"),
        (
            {"weighting": Product(factors=(Product(factors=(PassRate(),)),))},
            "weighting: PassRate",
        ),
    ],
)
def test_one_rollout_a_question_is_refused_wherever_a_group_is_compared(settings, named):
    plain = {"advantage": EntropyBonus(), "teacher": NoTeacher()}
    with pytest.raises(ConfigurationError, match=rf"model.{named} compares .* model.sampling.n"):
        PolicyOptimizer(TablePolicy(), sampling=Sampling(n=1), **(plain | settings))


def test_one_rollout_a_question_is_fine_where_none_is_compared():
    blend = COMPOSITES[Weighted, "advantage"](SelfDistillation())
    PolicyOptimizer(TablePolicy(), advantage=blend, teacher=EMA(), sampling=Sampling(n=1))
