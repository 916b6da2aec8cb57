"""`scsdpo check`: what it measures, against plain loops, and what it says of it."""

import io
import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from scsdpo.advantage import GroupRelative, LeaveOneOut, SelfDistillation, Unscaled
from scsdpo.analysis.directions import Directions, cosine, directions
from scsdpo.analysis.readiness import Answers, Readiness, _formed, area
from scsdpo.analysis.teacher_gains import TeacherGain, teacher_gains
from scsdpo.analysis.verdict import verdict
from scsdpo.cli.check import show
from scsdpo.records.jsonl import with_nulls
from scsdpo.reduction import TokenSum
from scsdpo.statistics import Estimate, mean_interval, paired_interval, score_interval
from scsdpo.teacher import (
    EMA,
    AttemptMemory,
    Feedback,
    GoldSolution,
    NoTeacher,
    PlainPrompt,
    RememberedDemonstration,
    ShortestSuccess,
    SiblingDemonstration,
)
from scsdpo.training import PolicyOptimizer
from scsdpo.training.collector import Collector
from scsdpo.types import Sampling, Verdict
from table_policy import G, Q, TableChat, TablePolicy, judged, state
from test_configs import scsdpo  # noqa: F401

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
REINFORCE = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled())


def optimizer(advantage, teacher):
    reduction = TokenSum(constant=1.0)
    model = PolicyOptimizer(
        TablePolicy(), advantage, teacher, reduction=reduction, sampling=Sampling(n=G)
    )
    model.configure_model()
    return model


def way_up(model, half, questions=range(Q)):
    """grad of sum_i (r_i - mean of the others) log S(y_i), term by term."""
    table, responses = model.policy.table, half.responses
    total = torch.zeros((), dtype=torch.float64)
    for q in questions:
        group = half.rewards[q].tolist()
        for g, reward in enumerate(group):
            advantage = reward - (sum(group) - reward) / (G - 1)
            previous = -1
            for token in responses.ids[q, g][responses.sampled[q, g]].tolist():
                row = table[state(half.prompts[q].ids, previous)] / responses.temperature
                total = total + advantage * row.log_softmax(-1)[token]
                previous = token
    if not total.requires_grad:
        return [torch.zeros_like(table).flatten()]
    (gradient,) = torch.autograd.grad(total, table)
    return [gradient.flatten()]


def parts(model, step, half):
    """n <step, g_q> / (|step| |g|) of each question."""
    whole = way_up(model, half)[0]
    ways = [way_up(model, half, [q])[0] for q in range(Q)]
    return [float(Q * step[0].dot(way) / (step[0].norm() * whole.norm())) for way in ways]


def first_steps(model, halves):
    found = []
    for half in halves:
        batch = model.prepare(half)
        update = model.steps.update
        for output, _ in update.losses(model.policy, batch, range(len(batch.sampled)), 10**6):
            output.loss.backward()
        found.append([-model.policy.table.grad.flatten()])
        model.policy.table.grad = None
    return found


def same(found, values):
    expected = mean_interval(values)
    for name in ("value", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    assert found.n == expected.n and abs(found.value) > 1e-3


def test_the_rewards_direction_is_that_of_reinforce_and_so_is_its_own_first_step():
    halves = [judged(seed=0), judged(seed=1)]
    model = optimizer(REINFORCE, NoTeacher())
    first, second = (way_up(model, half) for half in halves)
    found = directions(model, halves)
    assert found.reward == pytest.approx(cosine(first, second), rel=1e-6)
    assert found.step.value == pytest.approx(found.reward, rel=1e-6)
    assert all(p.grad is None for p in model.policy.parameters())


def test_a_step_is_compared_with_the_reward_of_each_question_of_the_other_half():
    halves = [judged(seed=0), judged(seed=1)]
    model = optimizer(SelfDistillation(), EMA())
    first, second = first_steps(model, halves)
    found = directions(model, halves)
    same(found.step, parts(model, first, halves[1]) + parts(model, second, halves[0]))
    longer = [replace(half, rewards=half.lengths.double()) for half in halves]
    same(found.length, parts(model, first, longer[1]) + parts(model, second, longer[0]))


def test_a_half_without_a_gradient_is_left_out():
    """All are right: no reward's gradient there. SDPO still teaches, so the other half's counts."""
    other = judged(seed=1)
    ones = torch.ones_like(other.rewards)
    halves = [judged(seed=0), replace(other, rewards=ones, successes=ones > 0)]
    model = optimizer(SelfDistillation(), EMA())
    _, second = first_steps(model, halves)
    found = directions(model, halves)
    same(found.step, parts(model, second, halves[0]))
    assert math.isnan(found.reward)


def test_cosine_of_nothing_is_none():
    zero, one = [torch.zeros(3)], [torch.ones(3)]
    assert math.isnan(cosine(zero, one))
    assert cosine(one, [-2 * one[0]]) == pytest.approx(-1)


RATES = {"own": 0.25, "configured": 0.75, "another": 0.5, "gold": 0.875, "feedback": 0.0}


def told(context, monkeypatch):
    """`teacher_gains` of two halves, with pass rates by kind of prompt, and what was asked."""
    model = optimizer(SelfDistillation(), EMA(context=context))
    halves = [judged(seed=0), judged(seed=1)]
    asked = {}

    def sample(prompts, sampling):
        for prompt in prompts:
            way, _, key = prompt.key.partition("/")
            asked.setdefault(way, {})[key] = prompt.ids
        return prompts

    def judge(prompts):
        rates = [RATES[p.key.partition("/")[0]] + 0.1 * (p.key[-1] == "0") for p in prompts]
        return SimpleNamespace(pass_rates=torch.tensor(rates))

    halves[1] = replace(halves[1], responses=renamed(halves[1].responses))
    monkeypatch.setattr(model, "sample", sample)
    monkeypatch.setattr(model, "judge", judge)
    contexts = [context.render(TableChat(), half) for half in halves]
    return teacher_gains(model, halves, contexts), asked, halves


def renamed(rollouts):
    prompts = [replace(p, key=f"other/{p.key}") for p in rollouts.prompts]
    return replace(rollouts, prompts=tuple(prompts))


def test_each_question_is_asked_again_and_told_in_every_way(monkeypatch):
    context = SiblingDemonstration()
    found, asked, halves = told(context, monkeypatch)
    assert found["configured"].told.value == pytest.approx(0.75 + 2 / 60)  # 2 of 6 end in "0"
    assert found["configured"].without.value == pytest.approx(0.25 + 2 / 60)
    assert found["configured"].gain.value == pytest.approx(0.5)
    assert found["configured"].beyond_another.value == pytest.approx(0.25)
    assert found["another"].gain.value == pytest.approx(0.25)
    assert found["gold"].gain.n == 8 and found["gold"].gain.value == pytest.approx(0.625)
    assert found["feedback"].gain.value == pytest.approx(-0.25)
    first, later = halves
    # Without a success is question 1; each is shown the next one's first, the last the first's.
    shown = {
        "toy/0": context.show(TableChat(), first.prompts[0], "response 2 0"),
        "toy/3": context.show(TableChat(), first.prompts[3], "response 0 0"),
        "other/toy/3": context.show(TableChat(), later.prompts[3], "response 0 0"),
    }
    assert set(asked["another"]) == {f"{h}toy/{q}" for h in ("", "other/") for q in (0, 2, 3)}
    assert {key: asked["another"][key] for key in shown} == shown
    assert asked["own"]["toy/1"] == first.prompts[1].ids


@pytest.mark.parametrize(
    ("context", "ways"),
    [
        (GoldSolution(), {"configured", "another", "feedback"}),
        (Feedback(), {"configured", "gold"}),
        (ShortestSuccess(), {"configured", "gold", "feedback"}),
        (RememberedDemonstration(), {"configured", "another", "gold", "feedback"}),
        (AttemptMemory(), {"configured", "gold", "feedback"}),
        (PlainPrompt(), {"configured", "gold", "feedback"}),
    ],
)
def test_another_question_is_the_control_where_a_demonstration_is_shown(context, ways, monkeypatch):
    found, _, _ = told(context, monkeypatch)
    assert set(found) == ways


def test_a_verifier_that_names_no_answers_says_nothing_of_the_format():
    named, silent = Verdict(reward=0.0, answer="4"), Verdict(reward=1.0)
    assert _formed([named, silent, Verdict(reward=0.0)], [False, True, False]) == 2 / 3
    assert math.isnan(_formed([silent, Verdict(reward=0.0)], [True, False]))
    assert _formed([Verdict(reward=0.0)] * 2, [False, False]) == 0


def test_area_counts_pairs_and_half_of_the_ties():
    assert area([2.0, 1.0], [1.0, 0.0]) == 3.5 / 4
    assert math.isnan(area([], [1.0]))


def answers(**figures):
    found = {"questions": 8, "group": 4, "formed": 1.0, "truncated": 0.0, "length": 9.0}
    found |= {"pass_rate": score_interval([0.5] * 8), "mastered": 0.1, "hopeless": 0.2}
    return Answers(**(found | figures))


def telling(without, told):
    """Of four times as many questions: three that gain alike tell nothing of the next ones."""
    many = without * 4, told * 4
    rates = (score_interval(each) for each in many)
    return TeacherGain(without=next(rates), told=next(rates), gain=paired_interval(*many))


def pointing(low, high, n=8, shift=1e-3):
    step = Estimate(value=(low + high) / 2, low=low, high=high, n=n)
    return Directions(step=step, length=step, reward=0.2, shift=shift, lr=2e-5)


def also_told(beyond):
    """Another question's demonstration helps nearly as much as the right one."""
    another = telling([0.1, 0.2, 0.3], [0.8, 0.7, 0.9])
    return {
        "configured": replace(HELPED["configured"], beyond_another=mean_interval(beyond)),
        "another": another,
    }


UP = pointing(0.1, 0.2)
WORSE = {"configured": telling([0.8, 0.7, 0.9], [0.1, 0.2, 0.3])}
HELPED = {"configured": telling([0.1, 0.2, 0.3], [0.8, 0.7, 0.9])}


def said(**figures):
    whole = {"answers": answers(), "taught": 0.5, "told": HELPED, "directions": UP}
    found = Readiness(**(whole | figures))
    return [(remark.level, remark.text) for remark in verdict(found)]


def test_a_policy_that_is_ready_hears_good_things_alone():
    assert [level for level, _ in said()] == ["good", "good"]


@pytest.mark.parametrize(
    ("figures", "level", "text"),
    [
        ({"answers": answers(formed=0.1)}, "warning", "the format is not followed: 10%"),
        ({"answers": answers(formed=0.02)}, "stop", "the format is not followed: 2%"),
        ({"answers": answers(hopeless=0.9)}, "warning", "out of reach"),
        ({"answers": answers(hopeless=0.97)}, "stop", "out of reach"),
        ({"answers": answers(mastered=0.9)}, "stop", "mastered"),
        (
            {"answers": answers(truncated=0.5)},
            "warning",
            "cut off: 50% of the responses reach their length limit",
        ),
        (
            {"told": WORSE},
            "warning",
            "the teacher's prompt makes it worse",
        ),
        (
            {"told": WORSE, "directions": pointing(-0.1, 0.1)},
            "stop",
            "the teacher's prompt makes it worse",
        ),
        ({"told": WORSE, "directions": None}, "stop", "the teacher's prompt makes it worse"),
        (
            {"told": {"configured": telling([0.1, 0.2], [0.1, 0.3])}},
            "warning",
            "the teacher does not use its prompt",
        ),
        (
            {"told": also_told(beyond=[0.0, 0.2, -0.1])},
            "warning",
            "another question's demonstration helps, too (80%), and not clearly less (difference "
            "+3 points",
        ),
        ({"taught": 0.0, "told": {}}, "warning", "no response has a teacher"),
        ({"told": {}}, "warning", "only one question has a teacher"),
        (
            {"directions": pointing(0.1, 0.2, shift=0.18)},
            "stop",
            "the learning rate is large for this policy: one step at 2e-05 moves it by 0.18 nats a "
            "token (at most 0.02)",
        ),
        (
            {"directions": pointing(0.1, 0.2, shift=0.05)},
            "warning",
            "the learning rate is large for this policy: one step at 2e-05 moves it by 0.05 nats a "
            "token (at most 0.02)",
        ),
        (
            {"directions": pointing(-0.2, -0.1)},
            "stop",
            "the first step points away from the reward: cosine -0.150 (-0.200 to -0.100; 8 "
            "questions)",
        ),
        ({"directions": pointing(-0.2, 0.001)}, "warning", "the first step cannot be seen"),
        ({"directions": pointing(-0.001, 0.2)}, "warning", "the first step cannot be seen"),
        (
            {"directions": pointing(math.nan, math.nan, n=1)},
            "warning",
            "the first step cannot be seen",
        ),
        (
            {"directions": pointing(math.nan, math.nan, n=0)},
            "warning",
            "there is no first step to measure",
        ),
    ],
)
def test_each_thing_in_the_way_is_said_first_and_with_its_number(figures, level, text):
    first = said(**figures)[0]
    assert first[0] == level and text in first[1]


def test_every_remark_that_is_no_praise_has_a_remedy():
    worst = Readiness(
        answers=answers(formed=0.0, truncated=1.0, hopeless=1.0, mastered=1.0),
        told=WORSE,
        directions=pointing(-0.2, -0.1),
    )
    assert all(remark.remedy for remark in verdict(worst))


def test_a_teacher_that_uses_nothing_is_offered_what_it_was_seen_to_use():
    useless = telling([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    others = {"gold": telling([0.1, 0.2, 0.3], [0.6, 0.7, 0.8]), "feedback": useless}
    found = Readiness(answers=answers(), told={"configured": useless, **others})
    (remark,) = verdict(found)
    assert (
        "show the teacher gold solutions (GoldSolution: +50 points), warm the policy"
        in remark.remedy
    )
    assert "Feedback" not in remark.remedy


def test_a_demonstration_that_beats_another_questions_hears_nothing_of_it():
    assert [level for level, _ in said(told=also_told(beyond=[0.2, 0.3, 0.2]))] == ["good", "good"]


def test_gold_solutions_are_a_remedy_where_they_were_seen_to_help():
    gold = telling([0.1, 0.2, 0.3], [0.6, 0.7, 0.8])
    for told, offered in (({}, False), ({"gold": gold}, True)):
        remarks = verdict(Readiness(answers=answers(hopeless=1.0), taught=0.0, told=told))
        assert [("GoldSolution" in remark.remedy) for remark in remarks] == [offered] * 2


def test_a_verifier_without_answers_and_no_teacher_hear_nothing_of_either():
    assert verdict(Readiness(answers=answers(formed=math.nan))) == []


def test_the_shipped_policy_can_teach_itself(scsdpo, capsys, monkeypatch):  # noqa: F811
    closed = []
    monkeypatch.setattr(Collector, "close", lambda self: closed.append(self))
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    asked = ["--questions=16", "--data.train.size=200", "--out=check.json", *quiet]
    assert scsdpo("check", "--config", TINY, *asked) in (0, None)
    told = capsys.readouterr().out
    assert "good: the first step points up" in told and "every figure: check.json" in told
    record = json.loads(Path("check.json").read_text())
    assert record["kind"] == "check" and record["answers"]["questions"] == 16
    assert record["told"]["configured"]["told"]["value"] > 0.8
    assert record["told"]["another"]["told"]["value"] < 0.5
    assert record["told"]["gold"]["gain"]["n"] == 16
    assert record["directions"]["step"]["low"] > 0 and record["directions"]["step"]["n"] == 16
    assert closed  # engines and judges


def test_too_few_questions_are_refused(scsdpo, capsys):  # noqa: F811
    assert scsdpo("check", "--config", TINY, "--questions=1") == 2
    assert "--questions must be >= 2, got 1" in capsys.readouterr().err


def test_one_question_is_refused_wherever_it_comes_from(scsdpo, capsys):  # noqa: F811
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert scsdpo("check", "--config", TINY, "--data.train.size=1", *quiet) == 2
    assert "needs at least two questions that are not longer than" in capsys.readouterr().err


def test_what_is_not_known_is_null_in_the_file_and_a_dash_on_the_screen():
    step = pointing(math.nan, math.nan, n=0)
    found = Readiness(answers=answers(formed=math.nan), taught=0.0, directions=step)
    console = Console(file=io.StringIO(), width=120)
    show(found, verdict(found), console)
    text = console.file.getvalue()
    assert "responses with an answer" in text and "nan" not in text
    assert with_nulls(asdict(found))["answers"]["formed"] is None


def logprobs(table, half):
    """log S(y) of each drawn token, question by question."""
    found = []
    for prompt, ids, drawn in zip(
        (p for p in half.prompts for _ in range(G)),
        half.responses.ids.flatten(0, 1),
        half.responses.sampled.flatten(0, 1),
        strict=True,
    ):
        previous = -1
        for token in ids[drawn].tolist():
            row = table[state(prompt.ids, previous)] / half.responses.temperature
            found.append(row.log_softmax(-1)[token])
            previous = token
    return torch.stack(found)


@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_the_first_steps_shift_is_what_the_optimizer_does_to_the_other_halfs_tokens(rate):
    halves = [judged(seed=0), judged(seed=1)]
    model = optimizer(REINFORCE, NoTeacher())
    model.optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.1)
    start = model.policy.table.detach().clone()
    values = []
    for half, other in (halves, halves[::-1]):
        table = start.clone().requires_grad_()
        table.grad = -way_up(model, half)[0].view_as(table)
        torch.optim.AdamW([table], lr=rate, weight_decay=0.1).step()
        ratio = (logprobs(table, other) - logprobs(start, other)).exp().detach()
        values.append(ratio - 1 - ratio.log())
    found = directions(model, halves)
    assert found.shift == pytest.approx(float(torch.cat(values).mean()), rel=1e-3)
    assert found.lr == rate
    assert torch.equal(model.policy.table, start) and model.policy.table.grad is None


def test_without_a_gradient_there_is_no_shift():
    halves = [judged(seed=0), judged(seed=1)]
    model = optimizer(REINFORCE, NoTeacher())
    flat = [replace(half, rewards=torch.zeros_like(half.rewards)) for half in halves]
    found = directions(model, flat)
    assert math.isnan(found.shift) and math.isnan(found.lr)


def test_a_rate_that_is_too_large_is_translated_into_one_that_is_not():
    found = Readiness(answers=answers(), directions=pointing(0.1, 0.2, shift=0.12))
    (remark,) = [r for r in verdict(found) if "learning rate" in r.text]
    assert "model.optimizer.init_args.lr to about 3e-06" in remark.remedy  # 2e-5 sqrt(.003 / .12)
