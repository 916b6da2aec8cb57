"""A response, and its tokens, as lines of records."""

import math
from typing import Any, cast

from torch import Tensor

from scsdpo.policy.chat import Chat
from scsdpo.records.schema import SCHEMA_VERSION, Number, Place, RolloutRecord, TokenRecord
from scsdpo.types import JudgedBatch


def rollout_record(
    batch: JudgedBatch, q: int, g: int, *, where: dict[str, Any], chat: Chat, traced: bool
) -> RolloutRecord:
    """One response of a judged batch.

    Args:
        batch: what was judged.
        q: question.
        g: its response.
        where: the run's name, the batch and the step.
        chat: decodes what the teacher read.
        traced: whether its tokens are recorded too.
    """
    rollouts, outcomes, lesson = batch.rollouts, batch.outcomes, batch.lesson
    prompt, verdict = rollouts.prompts[q], outcomes.verdicts[q][g]
    told = lesson.teacher.ids[q][g] if lesson else ()
    return RolloutRecord(
        **_place(batch, q, g, where),
        category=prompt.category,
        messages=list(prompt.messages),
        target=prompt.answer,
        output=rollouts.texts[q][g],
        answer=verdict.answer,
        reward=verdict.reward,
        success=bool(outcomes.successes[q, g]),
        feedback=verdict.feedback,
        error=verdict.error,
        finish_reason="stop" if rollouts.finished[q, g] else "length",
        n_tokens=int(rollouts.lengths[q, g]),
        samples=outcomes.successes.shape[1],
        pass_rate=float(outcomes.pass_rates[q]),
        weight=float(batch.weights[q, g]),
        active=bool(lesson.active[q, g]) if lesson else False,
        teacher_prompt="".join(chat.pieces(told)) if told else None,
        version=rollouts.version,
        traced=traced,
    )


def token_record(
    batch: JudgedBatch,
    q: int,
    g: int,
    *,
    where: dict[str, Any],
    chat: Chat,
    columns: dict[str, Tensor],
) -> TokenRecord:
    """The tokens of one response; `columns` are those of a `TokenTrace`, the rest as above."""
    rollouts, lesson = batch.rollouts, batch.lesson
    assert lesson is not None
    weight, length = float(batch.weights[q, g]), int(rollouts.lengths[q, g])
    ids = rollouts.ids[q, g, :length].tolist()
    sampled = rollouts.policy_logprobs[q, g, :length].double().cpu()
    given = {name: table for name, table in columns.items() if not name.startswith("top_")}
    scale, old = float(given.pop("scale")[0]), given.pop("old_logprob")
    tops = columns["top_ids"] >= 0
    top_ids = [row[kept].tolist() for row, kept in zip(columns["top_ids"], tops, strict=True)]
    record = {
        **_place(batch, q, g, where),
        "temperature": rollouts.temperature,
        "objective_name": lesson.objective_name,
        "coefficient": _rounded(scale / weight),
        "weight": weight,
        "ids": ids,
        "text": chat.pieces(ids),
        "sampler_logprob": _numbers(sampled),
        "gap": _numbers(old - sampled),
        **{name: _numbers(column) for name, column in given.items()},
        "top_ids": top_ids,
        **{
            name: [_numbers(row[kept]) for row, kept in zip(columns[name], tops, strict=True)]
            for name in ("top_probs", "top_teacher_probs", "top_credit")
        },
        "vocabulary": {
            str(i): chat.pieces([i])[0] for i in sorted({i for row in top_ids for i in row})
        },
    }
    return cast(TokenRecord, record)


def _place(batch: JudgedBatch, q: int, g: int, where: dict[str, Any]) -> Place:
    prompt, samples = batch.rollouts.prompts[q], batch.outcomes.successes.shape[1]
    here = {"schema_version": SCHEMA_VERSION, **where, "split": batch.split}
    return cast(Place, {**here, "key": prompt.key, "sample": prompt.copy * samples + g})


def _numbers(values: Tensor) -> list[Number]:
    return [_rounded(value) for value in values.tolist()]


def _rounded(value: float) -> Number:
    """Six digits: more than float32 has to say of a loss, and half the bytes; else None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
