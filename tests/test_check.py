"""`scsdpo check`: what it measures, against plain loops, and what it says of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scsdpo.advantage import GroupRelative, LeaveOneOut, SelfDistillation, Unscaled
from scsdpo.analysis.directions import Directions, cosine, directions
from scsdpo.analysis.readiness import Answers, Readiness, Telling, area
from scsdpo.analysis.verdict import verdict
from scsdpo.reduction import TokenSum
from scsdpo.statistics import mean_interval, score_interval
from scsdpo.teacher import EMA, NoTeacher
from scsdpo.training import PolicyOptimizer
from scsdpo.types import Sampling
from table_policy import G, TablePolicy, judged, state
from test_configs import scsdpo  # noqa: F401

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
REINFORCE = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled())


def optimizer(advantage, teacher):
    reduction = TokenSum(constant=1.0)
    model = PolicyOptimizer(
        TablePolicy(), advantage, teacher, reduction=reduction, sampling=Sampling(n=G)
    )
    model.configure_model()
    return model


def way_up(model, rollouts, outcomes):
    """grad of sum_i (r_i - mean of the others) log S(y_i), term by term."""
    table = model.policy.table
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(outcomes.rewards.tolist()):
        for g, reward in enumerate(group):
            advantage = reward - (sum(group) - reward) / (G - 1)
            previous = -1
            for token in rollouts.ids[q, g][rollouts.mask[q, g]].tolist():
                row = table[state(rollouts.prompts[q].ids, previous)] / rollouts.temperature
                total = total + advantage * row.log_softmax(-1)[token]
                previous = token
    (gradient,) = torch.autograd.grad(total, table)
    return [gradient.flatten()]


def test_the_rewards_direction_is_that_of_reinforce_and_so_is_its_own_first_step():
    halves = [judged(seed=0), judged(seed=1)]
    model = optimizer(REINFORCE, NoTeacher())
    first, second = (way_up(model, *half) for half in halves)
    found = directions(model, halves)
    assert found.reward == pytest.approx(cosine(first, second), rel=1e-6)
    assert found.step == pytest.approx((found.reward, found.reward), rel=1e-6)
    assert all(p.grad is None for p in model.policy.parameters())


def test_a_step_is_compared_with_the_reward_on_the_other_half():
    halves = [judged(seed=0), judged(seed=1)]
    model = optimizer(SelfDistillation(), EMA())
    first, second = (way_up(model, *half) for half in halves)
    own = []
    for half in halves:
        batch = model.prepare(*half)
        update = model.steps.update
        for output, _ in update.losses(model.policy, batch, range(len(batch.mask)), 10**6):
            output.loss.backward()
        own.append([-model.policy.table.grad.flatten()])
        model.policy.table.grad = None
    expected = (cosine(own[0], second), cosine(own[1], first))
    found = directions(model, halves)
    assert found.step == pytest.approx(expected, rel=1e-6)
    assert min(map(abs, expected)) > 1e-3
    longer = [way_up(model, r, replace(o, rewards=r.lengths.double())) for r, o in halves]
    expected = (cosine(own[0], longer[1]), cosine(own[1], longer[0]))
    assert found.length == pytest.approx(expected, abs=1e-7)
    assert min(map(abs, expected)) > 1e-3


def test_cosine_of_nothing_is_none():
    zero, one = [torch.zeros(3)], [torch.ones(3)]
    assert math.isnan(cosine(zero, one))
    assert cosine(one, [-2 * one[0]]) == pytest.approx(-1)


def test_area_counts_pairs_and_half_of_the_ties():
    assert area([2.0, 1.0], [1.0, 0.0]) == 3.5 / 4
    assert math.isnan(area([], [1.0]))


def answers(**figures):
    found = {"questions": 8, "group": 4, "formed": 1.0, "truncated": 0.0, "length": 9.0}
    found |= {"pass_rate": score_interval([0.5] * 8), "mastered": 0.1, "hopeless": 0.2}
    return Answers(**(found | figures))


def telling(without, told):
    gains = [b - a for a, b in zip(without, told, strict=True)]
    return Telling(
        without=score_interval(without), told=score_interval(told), gain=mean_interval(gains)
    )


UP = Directions(step=(0.1, 0.2), reward=0.2, length=(0.0, 0.1))
HELPED = {"configured": telling([0.1, 0.2, 0.3], [0.8, 0.7, 0.9])}


def said(**figures):
    found = Readiness(**({"answers": answers(), "told": HELPED, "directions": UP} | figures))
    return [(remark.level, remark.text) for remark in verdict(found)]


def test_a_policy_that_is_ready_hears_good_things_alone():
    assert [level for level, _ in said()] == ["good", "good"]


@pytest.mark.parametrize(
    ("figures", "level", "text"),
    [
        ({"answers": answers(formed=0.1)}, "mind", "the format is not followed: 10%"),
        ({"answers": answers(formed=0.02)}, "stop", "the format is not followed: 2%"),
        ({"answers": answers(hopeless=0.9)}, "mind", "out of reach"),
        ({"answers": answers(hopeless=0.97)}, "stop", "out of reach"),
        ({"answers": answers(mastered=0.9)}, "stop", "mastered"),
        ({"answers": answers(truncated=0.5)}, "mind", "50% of the responses reach the cap"),
        (
            {"told": {"configured": telling([0.8, 0.7, 0.9], [0.1, 0.2, 0.3])}},
            "mind",
            "the teacher does not use what it is told",
        ),
        (
            {"told": {"configured": telling([0.1, 0.2], [0.1, 0.3])}},
            "mind",
            "the teacher does not use what it is told",
        ),
        (
            {"told": HELPED | {"another": telling([0.1, 0.2, 0.3], [0.9, 0.9, 0.9])}},
            "mind",
            "another question's demonstration helps as much (90%)",
        ),
        (
            {"directions": Directions(step=(-0.1, -0.2), reward=0.1, length=(0.0, 0.1))},
            "stop",
            "the first step points away from the reward: cosine -0.100 and -0.200",
        ),
        (
            {"directions": Directions(step=(-0.1, 0.2), reward=0.1, length=(0.0, 0.1))},
            "mind",
            "nowhere in particular",
        ),
        (
            {"directions": Directions(step=(math.nan, 0.2), reward=0.1, length=(0.0, 0.1))},
            "mind",
            "half of the questions give no gradient",
        ),
    ],
)
def test_each_thing_in_the_way_is_said_first_and_with_its_number(figures, level, text):
    first = said(**figures)[0]
    assert first[0] == level and text in first[1]


def test_every_remark_that_is_no_praise_has_a_remedy():
    worst = Readiness(
        answers=answers(formed=0.0, truncated=1.0, hopeless=1.0, mastered=1.0),
        told={"configured": telling([0.8, 0.7, 0.9], [0.1, 0.2, 0.3])},
        directions=Directions(step=(-0.1, -0.2), reward=0.1, length=(0.0, 0.1)),
    )
    assert all(remark.remedy for remark in verdict(worst))


def test_a_teacher_that_uses_nothing_is_offered_what_it_was_seen_to_use():
    useless = telling([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    others = {"gold": telling([0.1, 0.2, 0.3], [0.6, 0.7, 0.8]), "feedback": useless}
    found = Readiness(answers=answers(), told={"configured": useless, **others})
    (remark,) = verdict(found)
    assert "GoldSolution (+50 points)" in remark.remedy and "Feedback" not in remark.remedy


def test_the_shipped_policy_can_teach_itself(scsdpo, capsys):  # noqa: F811
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    asked = ["--questions=8", "--data.train.size=200", "--out=check.json", *quiet]
    assert scsdpo("check", "--config", TINY, *asked) in (0, None)
    told = capsys.readouterr().out
    assert "good: the first step points up" in told and "every figure: check.json" in told
    record = json.loads(Path("check.json").read_text())
    assert record["kind"] == "check" and record["answers"]["questions"] == 8
    assert record["told"]["configured"]["told"]["value"] > 0.8
    assert record["told"]["another"]["told"]["value"] < 0.5
    assert record["told"]["gold"]["gain"]["n"] == 8
    assert min(record["directions"]["step"]) > 0


def test_too_few_questions_are_refused(scsdpo, capsys):  # noqa: F811
    assert scsdpo("check", "--config", TINY, "--questions=1") == 2
    assert "--questions must be >= 2, got 1" in capsys.readouterr().err
