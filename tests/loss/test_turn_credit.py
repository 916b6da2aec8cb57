"""Credit by episode, by turn and by a teacher: expectations over all episodes of a tiny world.

The policy is a table of logits. It says one token a turn; a low one ends the episode, after a high
one the world answers with a token, and the policy goes on. Each group of episodes is a question of
one batch that weighs its probability, so that one gradient of the package is an expectation.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from kernel_inputs import of_rewards
from scsdpo.advantage import (
    Baseline,
    Batch,
    BatchStd,
    Divergence,
    Full,
    GroupMean,
    GroupPassRate,
    GroupRelative,
    GroupStd,
    LeaveOneOut,
    Sampled,
    SelfDistillation,
    SiblingContrast,
    TurnRelative,
    Unscaled,
)
from scsdpo.errors import ConfigurationError
from scsdpo.loss import NoImportance
from scsdpo.reduction import TokenSum
from scsdpo.teacher import EMA, GoldSolution, NoTeacher, contexts_of
from scsdpo.training import Update
from scsdpo.types import Episode, Judged, Part, Responses, Verdict
from scsdpo.weighting import UniformTokens
from table_policy import TablePolicy, V, judged, state, with_a_tool

TAU, MOST_TURNS = 0.8, 3
ENDS = {0: (0, 1, 2, 5), 1: (0, 1, 2, 5), 2: range(V)}
"""Tokens that end the episode in a turn."""


@dataclass(frozen=True)
class Played:
    """An episode: the tokens of the policy, and what each turn earned."""

    said: tuple[int, ...]

    @property
    def answers(self):
        return tuple((2 * token + turn) % V for turn, token in enumerate(self.said[:-1]))

    @property
    def rewards(self):
        """By turn; that of the verdict is apart."""
        return tuple(0.25 * (token % 3) - 0.1 * turn for turn, token in enumerate(self.said[:-1]))

    @property
    def outcome(self):
        return float(sum(self.said) % 2)

    def before(self):
        """What each token of the policy stands behind: -1 is the question."""
        return (-1, *self.answers)


def episodes(said=()):
    turn = len(said)
    for token in range(V):
        if token in ENDS[turn]:
            yield Played((*said, token))
        else:
            yield from episodes((*said, token))


EPISODES = tuple(episodes())


def log_probs(table, prompt, episode):
    """[turns, V]."""
    rows = [state(prompt.ids, previous) for previous in episode.before()]
    return (table[rows] / TAU).log_softmax(-1)


def log_said(table, prompt, episode):
    """[turns]: log-probs of what the policy said."""
    found = log_probs(table, prompt, episode)
    return found[range(len(episode.said)), list(episode.said)]


def probability(table, prompt, episode):
    return log_said(table, prompt, episode).sum().exp()


def batch_of(groups, prompt):
    """Judged groups of episodes, each a question."""
    width = 2 * MOST_TURNS - 1
    ids, sampled, turns = ([] for _ in range(3))
    for episode in itertools.chain(*groups):
        row = [episode.said[0]]
        for answer, token in zip(episode.answers, episode.said[1:], strict=True):
            row += [answer, token]
        ids.append(row + [0] * (width - len(row)))
        sampled.append([t < len(row) and t % 2 == 0 for t in range(width)])
        turns.append([t // 2 for t in range(width)])
    shape = (len(groups), len(groups[0]), width)
    mask = torch.tensor(sampled).view(shape)
    last = mask.long().cumsum(-1).argmax(-1, keepdim=True)
    unknown = torch.where(mask, 0.0, torch.nan)
    responses = Responses.of_one_turn(
        prompts=(prompt,) * len(groups),
        ids=torch.tensor(ids).view(shape),
        sampled=mask,
        sampling_logprobs=unknown,
        policy_logprobs=unknown,
        ended=torch.ones(shape[:2], dtype=torch.bool),
        texts=tuple(("",) * len(group) for group in groups),
        temperature=TAU,
    )
    responses = replace(
        responses,
        present=torch.arange(width) <= last,
        turns=torch.tensor(turns, dtype=torch.int32).view(shape),
        episodes=tuple(tuple(map(record, group)) for group in groups),
    )
    verdicts = tuple(tuple(Verdict(reward=e.outcome) for e in group) for group in groups)
    rewards = torch.tensor([[v.reward for v in group] for group in verdicts])
    return Judged(responses=responses, verdicts=verdicts, rewards=rewards, successes=rewards > 0.5)


def record(episode):
    parts = [Part(role="assistant", text="")]
    for reward in episode.rewards:
        parts += [Part(role="user", text="", reward=reward), Part(role="assistant", text="")]
    return Episode(parts=tuple(parts))


def expected(policy, advantage, groups, prompt, teacher):
    """Minus the package's gradient of the table, expected over the groups."""
    batch = batch_of(groups, prompt)
    with torch.no_grad():
        chances = torch.stack([probability(policy.table, prompt, e) for e in EPISODES])
    number = {episode: n for n, episode in enumerate(EPISODES)}
    picked = torch.tensor([[number[e] for e in group] for group in groups])
    weights = chances[picked].prod(-1, keepdim=True).expand(batch.rewards.shape)
    contexts = contexts_of(teacher, NoTeacher(), policy.chat, batch)
    ready = Batch.of(
        batch,
        advantage.planned(batch, teacher.available(contexts)),
        weights,
        contexts,
        (len(groups),),
    )
    update = Update(
        teacher=teacher,
        reference=NoTeacher(),
        token_weighting=UniformTokens(),
        reduction=TokenSum(constant=1.0),
        importance=NoImportance(),
        needs=advantage.needs,
    )
    policy.zero_grad()
    for output, _ in update.losses(policy, ready, range(batch.rewards.numel()), 10**6):
        output.loss.backward()
    # The reduction divides by the number of rollouts; the mean over a group's stays.
    return -policy.table.grad * len(groups)


def policy_and_prompt():
    policy = TablePolicy()
    return policy, judged().responses.prompts[0]


def of_groups(size):
    return list(itertools.product(EPISODES, repeat=size))


def to_go(episode, discount):
    """Returns of the turns, the verdict's reward in the last one."""
    rewards = [*episode.rewards, episode.outcome]
    return [
        sum(discount ** (s - k) * r for s, r in enumerate(rewards) if s >= k)
        for k in range(len(rewards))
    ]


def gradients_of_turns(policy, prompt, returns):
    """[MOST_TURNS][STATES, V]: sum over episodes of P(e) R_k grad log S(turn k)."""
    table = policy.table.detach().clone().requires_grad_()
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(MOST_TURNS)]
    for episode in EPISODES:
        chance = probability(table, prompt, episode).detach()
        said = log_said(table, prompt, episode)
        for k, value in enumerate(returns(episode)):
            totals[k] = totals[k] + chance * value * said[k]
    return [torch.autograd.grad(total, table, retain_graph=True)[0] for total in totals]


def expectation(policy, prompt, value):
    """Of a number of the episode, with a gradient."""
    table = policy.table.detach().clone().requires_grad_()
    total = sum(probability(table, prompt, e) * value(e) for e in EPISODES)
    return torch.autograd.grad(total, table)[0]


def close(ours, theirs):
    assert theirs.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_all_episodes_have_a_chance_and_some_of_each_length():
    policy, prompt = policy_and_prompt()
    total = sum(probability(policy.table.detach(), prompt, e) for e in EPISODES)
    assert float(total) == pytest.approx(1.0, abs=1e-12)
    assert {len(e.said) for e in EPISODES} == {1, 2, 3} and len(EPISODES) == 36


def test_credit_by_episode_is_the_gradient_of_the_expected_reward():
    policy, prompt = policy_and_prompt()
    advantage = GroupRelative(baseline=LeaveOneOut(), scale=Unscaled())
    ours = expected(policy, advantage, of_groups(2), prompt, NoTeacher())
    close(ours, expectation(policy, prompt, lambda e: e.outcome))


def test_credit_by_turn_is_the_gradient_of_the_expected_sum_of_turn_rewards():
    policy, prompt = policy_and_prompt()
    advantage = TurnRelative(baseline=LeaveOneOut(), scale=Unscaled())
    ours = expected(policy, advantage, of_groups(2), prompt, NoTeacher())
    close(ours, expectation(policy, prompt, lambda e: sum(e.rewards) + e.outcome))


@pytest.mark.parametrize("discount", [0.0, 0.7])
def test_a_discount_counts_later_rewards_less(discount):
    policy, prompt = policy_and_prompt()
    advantage = TurnRelative(baseline=LeaveOneOut(), scale=Unscaled(), discount=discount)
    ours = expected(policy, advantage, of_groups(2), prompt, NoTeacher())
    by_turn = gradients_of_turns(policy, prompt, lambda e: to_go(e, discount))
    close(ours, sum(by_turn))


def test_a_groups_mean_by_turn_shrinks_each_turn_by_how_rarely_others_have_it():
    """E[m / (m + 1)], m ~ Binomial(G - 1, P(an episode has the turn)); with G = 2: P / 2."""
    policy, prompt = policy_and_prompt()
    advantage = TurnRelative(baseline=GroupMean(), scale=Unscaled())
    ours = expected(policy, advantage, of_groups(2), prompt, NoTeacher())
    chances = [
        (len(e.said), float(probability(policy.table.detach(), prompt, e))) for e in EPISODES
    ]
    has = [sum(p for turns, p in chances if turns > k) for k in range(MOST_TURNS)]
    by_turn = gradients_of_turns(policy, prompt, lambda e: to_go(e, 1.0))
    close(ours, sum(p / 2 * each for p, each in zip(has, by_turn, strict=True)))


def test_rewards_that_are_parts_of_the_verdicts_are_not_counted_twice():
    """The verdict says how much of it the turns have; the first turn's return is all of it."""
    _, prompt = policy_and_prompt()
    batch = batch_of([(e,) for e in EPISODES], prompt)
    earned = [sum(e.rewards) for e in EPISODES]
    verdicts = tuple(
        (Verdict(reward=e.outcome, earned=r),) for e, r in zip(EPISODES, earned, strict=True)
    )
    returns = TurnRelative().returns(replace(batch, verdicts=verdicts))
    torch.testing.assert_close(returns[:, 0, 0], batch.rewards[:, 0].double())
    plain = TurnRelative().returns(batch)
    torch.testing.assert_close(plain[:, 0, 0], returns[:, 0, 0] + torch.tensor(earned).double())


@pytest.mark.parametrize("support", [Full(), Sampled()], ids=["full", "sampled"])
def test_a_teachers_credit_is_its_divergence_at_every_prefix_that_the_policy_reaches(support):
    """The teacher reads what the world answered as well, behind a question that says more."""
    policy, prompt = policy_and_prompt()
    teacher = EMA(context=GoldSolution())
    teacher.configure(policy, "teacher")
    behind = policy.table.detach().clone()
    with torch.no_grad():
        policy.table += torch.linspace(-1, 1, policy.table.numel()).view_as(policy.table)
    advantage = SelfDistillation(divergence=Divergence(alpha=1.0), support=support)
    groups = of_groups(1)
    ours = expected(policy, advantage, groups, prompt, teacher)
    contexts = contexts_of(teacher, NoTeacher(), policy.chat, batch_of(groups, prompt))
    told = replace(prompt, ids=contexts["teacher"].ids[0][0])
    assert sum(told.ids) != sum(prompt.ids)
    table = policy.table.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for episode in EPISODES:
        log_s, log_t = log_probs(table, prompt, episode), log_probs(behind, told, episode)
        total = (
            total
            - probability(table, prompt, episode).detach() * (log_s.exp() * (log_s - log_t)).sum()
        )
    close(ours, torch.autograd.grad(total, table)[0])


# --- baselines and scales over ragged groups ------------------------------------------------------

NAN, HALF = float("nan"), 0.5**0.5
RLOO = TurnRelative(baseline=LeaveOneOut(), scale=Unscaled())


@pytest.mark.parametrize(
    ("advantage", "row", "by_hand"),
    [
        # means .5 and 2 / 3 of those that are there
        (TurnRelative(scale=Unscaled()), [1.0, NAN, 0.0], [0.5, NAN, -0.5]),
        (RLOO, [1, 0, NAN, 1], [0.5, -1, NAN, 0.5]),
        # alone: nobody to be compared with, or the baseline 0
        (TurnRelative(scale=Unscaled()), [NAN, 0.75, NAN], [NAN, 0.0, NAN]),
        (RLOO, [NAN, 0.75], [NAN, 0.75]),
        (TurnRelative(scale=GroupStd(ddof=1, eps=0)), [NAN, 0.75], [NAN, 0.0]),
        # std of (1, 0): population 1 / 2, sample sqrt(1 / 2)
        (TurnRelative(scale=GroupStd(ddof=0, eps=0)), [1.0, NAN, 0.0], [1.0, NAN, -1.0]),
        (TurnRelative(scale=GroupStd(ddof=1, eps=0)), [1.0, NAN, 0.0], [HALF, NAN, -HALF]),
        (TurnRelative(scale=GroupStd(eps=0)), [0.3, NAN, 0.3], [0.0, NAN, 0.0]),
        (TurnRelative(scale=BatchStd(eps=0)), [1.0, NAN, 0.0], [1.0, NAN, -1.0]),
        (TurnRelative(scale=GroupPassRate()), [1.0, NAN, 0.0], [1.0, NAN, -1.0]),
        (TurnRelative(scale=GroupPassRate()), [-1.0, NAN, 0.5], [0.0, NAN, 0.0]),
    ],
)  # fmt: skip
def test_a_turn_is_compared_with_the_rollouts_that_have_it(advantage, row, by_hand):
    ours = advantage.advantages(torch.tensor([row], dtype=torch.float64))
    theirs = torch.tensor([by_hand], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_of_one_turn_it_is_by_episode():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.25, 0.25, 1.0]])
    some, nobody = of_rewards(rewards), torch.zeros(2, 3, dtype=torch.bool)
    for settings in ({}, {"baseline": LeaveOneOut(), "scale": Unscaled()}, {"scale": BatchStd()}):
        ours, theirs = TurnRelative(**settings), GroupRelative(**settings)
        torch.testing.assert_close(ours.of_tokens(some), theirs.of_tokens(some))
        assert torch.equal(ours.plan(some, nobody).active, theirs.plan(some, nobody).active)


def test_a_rollout_is_run_where_one_of_its_turns_has_credit():
    batch = with_a_tool(judged(), (1, 2))
    plan = TurnRelative().planned(batch, torch.zeros_like(batch.successes))
    by_token = TurnRelative().of_tokens(batch)
    drawn = torch.where(batch.responses.sampled, by_token, 0.0) != 0
    assert torch.equal(plan.active, drawn.any(-1))
    # All of question 2 are right: by episode there is nothing to compare.
    by_episode = GroupRelative().planned(batch, torch.zeros_like(batch.successes)).active
    assert not by_episode[2].any() and plan.active[2].any()


class _Mean(Baseline):
    def centre(self, rewards):
        return rewards - rewards.mean(-1, keepdim=True)


def test_a_baseline_that_does_not_leave_out_missing_turns_is_named():
    batch = with_a_tool(judged(), (1, 2))
    with pytest.raises(ConfigurationError, match=r"_Mean and Unscaled give nan .*torch.nanmean"):
        TurnRelative(baseline=_Mean(), scale=Unscaled()).of_tokens(batch)
    with pytest.raises(ValueError, match=r"`TurnRelative\(discount=...\)` must be in \[0, 1\]"):
        TurnRelative(discount=1.5)


def test_a_factor_that_divides_by_the_advantage_leaves_turns_without_any_alone():
    """Of A = 0 RLCSD's 1 + r / A is infinite."""
    modulator = SiblingContrast()
    advantage = TurnRelative(modulator=modulator, scale=Unscaled())

    class Chunk:
        logprob = torch.zeros(2, dtype=torch.float64)
        log_ratio, rollout, rollouts = logprob, torch.tensor([0, 0]), frozenset({0})
        ids = torch.zeros(2, dtype=torch.int64)

        def at(self, table):
            return table

        def derived(self, make):
            return torch.tensor([0.5, 0.5], dtype=torch.float64)

    values = torch.tensor([0.0, 1.0], dtype=torch.float64)
    credit = advantage._credit(values, torch.tensor([True]), frozenset({0}), Chunk())
    assert credit.values.flatten().tolist() == [0.0, 1.5]
