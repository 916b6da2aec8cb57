"""Small inputs to the credit loss, through its public classes."""

from typing import Any

import torch
from torch import Tensor, nn

from scsdpo.advantage import Advantage
from scsdpo.loss import (
    Head,
    HeadGradient,
    Importance,
    LossOutput,
    NoImportance,
    Objective,
    Signals,
    TeacherOutput,
    Tokens,
    credit_loss,
)
from scsdpo.teacher import NoTeacher
from scsdpo.types import Judged, Prompt, Responses, Verdict
from scsdpo.verifiers import ExactMatch


def of_rewards(rewards: Tensor, **responses: Any) -> Judged:
    """Responses of one token that got `rewards` [Q, G], to the questions "0", "1", ..."""
    shape = (*rewards.shape, 1)
    prompts = [
        Prompt(key=str(q), messages=(), verifier=ExactMatch(), answer="")
        for q in range(len(rewards))
    ]
    given = {
        "prompts": tuple(prompts),
        "ids": torch.zeros(shape, dtype=torch.int64),
        "sampled": torch.ones(shape, dtype=torch.bool),
        "sampling_logprobs": torch.zeros(shape),
        "policy_logprobs": torch.zeros(shape),
        "ended": torch.ones(rewards.shape, dtype=torch.bool),
        "texts": tuple(("",) * rewards.shape[1] for _ in prompts),
        "temperature": 1.0,
    }
    return Judged(
        responses=Responses.of_one_turn(**(given | responses)),
        verdicts=tuple(tuple(Verdict(reward=r) for r in row) for row in rewards.tolist()),
        rewards=rewards.float(),
        successes=rewards >= 0.5,
    )


def identity_head(vocabulary: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """Hidden states are logits."""
    head = nn.Linear(vocabulary, vocabulary, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.eye(vocabulary))
    return head


def tokens(ids: Tensor, **given: Tensor) -> Tokens:
    """One question, one rollout per token; a plain sum."""
    n = len(ids)
    nothing = torch.zeros(n, dtype=torch.float64)
    given = {
        "sampling_logprob": nothing,
        "old_logprob": torch.full_like(nothing, torch.nan),
    } | given
    ones = torch.ones(n, dtype=torch.float64)
    scale = given.pop("scale", ones)
    column = {name: table[:, None] for name, table in given.items()}
    every = torch.ones(n, 1, dtype=torch.bool)
    signals = Signals.unmeasured(every, every[:, 0], **column)
    return Tokens(
        ids=ids,
        places=torch.arange(n),
        rollouts=range(n),
        scale=scale,
        weight=ones,
        signals=signals,
    )


def teacher_output(hidden: Tensor, head: nn.Linear) -> TeacherOutput:
    return TeacherOutput(hidden=(hidden,), heads=(Head.of(head),), combine=NoTeacher().combine)


def run(
    advantage: Advantage,
    student: Tensor,
    teacher: Tensor,
    batch: Tokens,
    *,
    rewards: Tensor | None = None,
    head: nn.Linear | None = None,
    importance: Importance = NoImportance(),
    temperature: float = 1.0,
    gradient: HeadGradient | None = None,
) -> LossOutput:
    """The kernel on `student` and `teacher` hidden states [N, D], the reference = the teacher."""
    rewards = torch.zeros(1, max(len(batch.ids), 1)) if rewards is None else rewards
    head = identity_head(student.shape[-1], student.dtype) if head is None else head
    plan = advantage.plan(of_rewards(rewards), torch.ones_like(rewards, dtype=torch.bool))
    objective = Objective(
        credit=plan.credit,
        importance=importance.weigh,
        teacher=teacher_output(teacher, head),
        reference=teacher_output(teacher, head),
        temperature=temperature,
    )
    return credit_loss(
        student,
        head,
        Head.of(head),
        tokens=batch,
        objective=objective,
        gradient=gradient or HeadGradient(1),
    )
