"""An episode of two turns: what somebody else wrote is read, and never learned from.

The policy draws a call, a tool answers, and the policy draws again. The expected loss is summed
token by token over the tree of the episode, in float64, from the table that is the policy.
"""

from dataclasses import replace

import pytest
import torch

import batches
from batches import METHODS, double_policy, exact_norm, parts
from batches import judged as judged_of
from scsdpo.advantage import (
    Batch,
    BatchStd,
    Divergence,
    Full,
    GroupRelative,
    LeaveOneOut,
    SelfDistillation,
    SequenceLevel,
    TurnRelative,
    Unscaled,
)
from scsdpo.loss import NoImportance, SequenceImportance, Signals
from scsdpo.policy.rows import Rows
from scsdpo.policy.runner import SeparateRows, SharedPrompts
from scsdpo.reduction import SequenceMean, TokenMean
from scsdpo.rollout import HFRollout
from scsdpo.teacher import EMA, NoTeacher, contexts_of
from scsdpo.training import Update
from scsdpo.types import Sampling
from scsdpo.weighting import Uniform, UniformTokens
from table_policy import G, Q, TablePolicy, judged, state, with_a_tool


def prepared(policy, advantage, teacher, batch):
    contexts = contexts_of(teacher, NoTeacher(), policy.chat, batch)
    return Batch.of(
        batch,
        advantage.planned(batch, teacher.available(contexts)),
        Uniform().weights(batch),
        contexts,
        (len(batch.rewards),),
    )


def update_of(advantage, teacher, reduction):
    return Update(
        teacher=teacher,
        reference=NoTeacher(),
        token_weighting=UniformTokens(),
        reduction=reduction,
        importance=NoImportance(),
        needs=advantage.needs,
    )


def losses(policy, batch, update, budget=10**6):
    total = torch.zeros((), dtype=torch.float64)
    for output, _ in update.losses(policy, batch, range(len(batch.ids)), budget):
        output.loss.backward()
        total += output.loss.detach()
    return total


def enumerated(table, batch, log_t=None, *, token_mean):
    """The loss by its definition: GRPO's -A S(y) / S_old(y), or KL(T || S) of the teacher's."""
    responses = batch.responses
    terms, lengths = [], []
    for q in range(Q):
        rewards = batch.rewards[q].double()
        for g in range(G):
            previous, of_row, drawn = -1, [], 0
            for t in range(int(responses.extents[q, g])):
                token = int(responses.ids[q, g, t])
                if responses.sampled[q, g, t]:
                    drawn += 1
                    row = table[state(batch.prompts[q].ids, previous)] / responses.temperature
                    log_s = row.log_softmax(-1)
                    if log_t is None:
                        ratio = (log_s[token] - log_s[token].detach()).exp()  # 1, with a gradient
                        of_row.append(-(rewards[g] - rewards.mean()) * ratio)
                    elif (teacher := log_t(q, g, previous)) is not None:
                        of_row.append((teacher.exp() * (teacher - log_s)).sum())
                previous = token  # the tool's tokens are read as well
            terms.append(of_row)
            lengths.append(drawn)
    if token_mean:
        return sum(sum(row) for row in terms if row) / sum(lengths)
    means = [sum(row) / n for row, n in zip(terms, lengths, strict=True) if row]
    return sum(means) / len(terms)


@pytest.mark.parametrize("token_mean", [False, True], ids=["mean of means", "mean over tokens"])
@pytest.mark.parametrize("taught", [False, True], ids=["rewards", "teacher"])
def test_an_episodes_loss_and_gradient_are_those_of_its_tree(taught, token_mean):
    policy = TablePolicy()
    batch = with_a_tool(judged())
    reduction = TokenMean(over="all") if token_mean else SequenceMean(over="all")
    if taught:
        advantage = SelfDistillation(divergence=Divergence(alpha=0.0), support=Full())
        teacher = EMA()
    else:
        advantage, teacher = GroupRelative(scale=Unscaled()), NoTeacher()
    teacher.configure(policy, "teacher")
    ready = prepared(policy, advantage, teacher, batch)
    with torch.no_grad():  # the student has moved, the teacher has not
        behind = policy.table.clone()
        policy.table += torch.linspace(-1, 1, policy.table.numel()).view_as(policy.table)

    def log_t(q, g, previous):
        ids = ready.teacher.ids[q][g]
        if not ids:
            return None
        return (behind[state(ids, previous)] / batch.responses.temperature).log_softmax(-1)

    loss = losses(policy, ready, update_of(advantage, teacher, reduction))
    table = policy.table.detach().clone().requires_grad_()
    expected = enumerated(table, batch, log_t if taught else None, token_mean=token_mean)
    expected.backward()
    assert batch.lengths.sum() < batch.responses.extents.sum()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(policy.table.grad, table.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("runner", [SeparateRows, SharedPrompts])
@pytest.mark.parametrize("budget", [20, 10**6])
def test_tokens_of_a_tool_are_attended_to_and_predict_nothing(qwen3, monkeypatch, runner, budget):
    """Hidden states are those of the whole sequence, at the sampled tokens alone."""
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    policy = double_policy(qwen3)
    responses = with_a_tool(judged_of(policy)).responses
    ids, present, sampled = (
        table.flatten(0, 1) for table in (responses.ids, responses.present, responses.sampled)
    )
    prompts = [p.ids for p in responses.prompts for _ in range(ids.shape[0] // 4)]
    rows = Rows(prompts=prompts, ids=ids, present=present, sampled=sampled, pad_id=0)
    chosen = sampled.any(-1).nonzero()[:, 0].tolist()
    made = runner(policy, rows, chosen, budget)
    for micro in made.micro_batches():
        hidden = made.run(micro, lambda hidden, head: hidden)
        parts = hidden.split(sampled[micro].sum(-1).tolist())
        for row, part in zip(micro, parts, strict=True):
            sequence = torch.tensor([[*prompts[row], *ids[row][present[row]].tolist()]])
            whole = policy.language_model.get_decoder()(sequence).last_hidden_state[0]
            predicts = len(prompts[row]) - 1 + sampled[row].nonzero()[:, 0]
            torch.testing.assert_close(part, whole[predicts], rtol=1e-9, atol=1e-11)
        made.done(micro)


@pytest.mark.parametrize("budget", [15, 40, 10**6])
def test_an_episodes_gradient_does_not_depend_on_micro_batches(qwen3, monkeypatch, budget):
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)

    def gradient(budget):
        policy = double_policy(qwen3)
        advantage, teacher = GroupRelative(scale=Unscaled()), NoTeacher()
        ready = prepared(policy, advantage, teacher, with_a_tool(judged_of(policy)))
        loss = losses(policy, ready, update_of(advantage, teacher, SequenceMean()), budget)
        return loss, {n: p.grad for n, p in policy.named_parameters()}

    alone, expected = gradient(1)  # each row by itself
    loss, grads = gradient(budget)
    torch.testing.assert_close(loss, alone, rtol=1e-10, atol=1e-13)
    scale = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (grads[name] - grad).abs().max() <= 1e-10 * scale, name


EPISODES = METHODS | {
    "turn-rloo": lambda: (TurnRelative(baseline=LeaveOneOut(), scale=Unscaled()), {}),
    "turn-grpo, by sequence": lambda: (
        TurnRelative(scale=BatchStd(), level=SequenceLevel(), discount=0.9),
        {"importance": SequenceImportance()},
    ),
}


@pytest.mark.parametrize("method", EPISODES)
def test_every_method_learns_from_episodes_whatever_the_split(qwen3, monkeypatch, method):
    """And with prefixes shared, or apart; log-probs of what a tool wrote are unknown."""
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    monkeypatch.setattr(batches, "judged", lambda policy: with_a_tool(judged_of(policy)))

    def gradient(budget, *, shared=True, order=range(batches.Q)):
        policy = double_policy(qwen3)
        if not shared:
            monkeypatch.setattr(type(policy), "share_prefixes", False)
        advantage, settings = EPISODES[method]()
        batch, update = parts(policy, advantage, chosen=order, **settings)
        loss, grads, _ = batches.gradient(policy, batch, update, budget=budget)
        return loss, grads

    loss, expected = gradient(1)
    scale = max(grad.abs().max() for grad in expected.values())
    assert 0 < scale < float("inf")
    for budget, settings in (
        (40, {}),
        (10**6, {}),
        (10**6, {"shared": False}),
        (10**6, {"order": (2, 0, 3, 1)}),
    ):
        other, grads = gradient(budget, **settings)
        assert other == pytest.approx(loss, rel=1e-10)
        for name, grad in expected.items():
            assert (grads[name] - grad).abs().max() <= 1e-10 * scale, (budget, settings, name)


def test_a_teacher_reads_what_a_tool_said_and_neither_learns_to_say_it(qwen3, monkeypatch):
    """Another answer changes what student and teacher say behind it, and nothing before it."""
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
    policy = double_policy(qwen3)
    plain = with_a_tool(judged_of(policy))
    by_tool = plain.responses.present & ~plain.responses.sampled
    other_ids = torch.where(by_tool, (plain.responses.ids + 7) % 250, plain.responses.ids)
    other = replace(plain, responses=replace(plain.responses, ids=other_ids))
    tables = []
    for batch in (plain, other):
        teacher = EMA()
        teacher.configure(policy, "teacher")
        ready = prepared(policy, SelfDistillation(), teacher, batch)
        forwards = update_of(SelfDistillation(), teacher, SequenceMean())._forwards(
            policy, ready, range(len(ready.ids)), 10**6
        )
        tables.append(forwards.tables({"student_logprob", "teacher_logprob"}))
    here = tables[0].teacher_logprob != 0
    assert not (here & by_tool.flatten(0, 1)).any() and here.any()
    behind = (plain.responses.turns > 0).flatten(0, 1) & here
    assert behind.sum() > 5 and (here & ~behind).sum() > 5
    for name in ("student_logprob", "teacher_logprob"):
        gap = (getattr(tables[0], name) - getattr(tables[1], name)).abs()
        assert (gap[behind] > 1e-6).all() and (gap[here & ~behind] < 1e-12).all(), name


def test_slices_and_joins_keep_every_table_and_number_versions_anew(policy):
    prompts = judged_of(policy).prompts[:2]
    drawn = HFRollout().sample(policy, prompts, Sampling(n=2, max_new_tokens=5))
    other = replace(drawn, labels=("older", drawn.version), versions=drawn.versions + 1)
    wide = judged_of(policy).responses[[0]][[0]]
    both = drawn.cat([other])
    assert both.labels == (drawn.version, "older") and both.prompts == (*drawn.prompts,) * 2
    assert torch.equal(both.versions, torch.zeros_like(both.versions))
    for name in ("ids", "present", "sampled", "policy_logprobs", "ended"):
        assert torch.equal(getattr(both[[0, 1]], name), getattr(drawn, name))
        assert torch.equal(getattr(both[[3, 2]], name), getattr(other[[1, 0]], name))
    assert wide[[]].cat([wide]).ids.shape == wide.ids.shape
    assert wide[[]].ids.shape[0] == 0


def test_signals_are_of_sampled_tokens():
    batch = with_a_tool(judged())
    mask = batch.responses.sampled.flatten(0, 1)
    zeros = torch.zeros(mask.shape)
    signals = Signals.unmeasured(mask, mask.any(-1), zeros, zeros)
    assert signals.mask.sum() == batch.lengths.sum()
