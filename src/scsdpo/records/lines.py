"""Lines of records for a response and its tokens."""

import math
from dataclasses import asdict
from typing import Any, cast

from torch import Tensor

from scsdpo.advantage import Batch
from scsdpo.policy.chat import Chat
from scsdpo.records.schema import (
    SCHEMA_VERSION,
    JsonNumber,
    Place,
    RolloutRecord,
    TokenRecord,
    TurnRecord,
)
from scsdpo.types import Judged


def rollout_record(
    judged: Judged,
    q: int,
    g: int,
    *,
    where: dict[str, Any],
    chat: Chat,
    traced: bool,
    batch: Batch | None = None,
) -> RolloutRecord:
    """The record of one response of a judged batch.

    Args:
        judged: the judged batch.
        q: index of the question.
        g: index of its response.
        where: the run's name, batch and step.
        chat: decodes the teacher's prompt.
        traced: True if its tokens are recorded too.
        batch: weights and contexts of `judged` in training; None in validation.
    """
    prompt, verdict = judged.prompts[q], judged.verdicts[q][g]
    told = batch.teacher.ids[q][g] if batch else ()
    active = batch.active.view_as(judged.successes) if batch else judged.successes & False
    oldest = judged.responses[[q]].ages(batch.now)[0, g].tolist() if batch else []
    return RolloutRecord(
        **_place(judged, q, g, where),
        category=prompt.category,
        messages=list(prompt.messages),
        gold=prompt.answer,
        response=judged.texts[q][g],
        turns=[cast(TurnRecord, asdict(part)) for part in judged.responses.episodes[q][g].parts],
        answer=verdict.answer,
        reward=verdict.reward,
        success=bool(judged.successes[q, g]),
        feedback=verdict.feedback,
        error=verdict.error,
        stopped=verdict.stopped,
        finished=bool(judged.ended[q, g]),
        n_tokens=int(judged.lengths[q, g]),
        samples=judged.successes.shape[1],
        pass_rate=float(judged.pass_rates[q]),
        weight=float(batch.weights[q, g]) if batch else 1.0,
        active=bool(active[q, g]),
        teacher_prompt="".join(chat.pieces(told)) if told else None,
        version=judged.responses.version_of(q, g),
        age_steps=max((steps for steps, _ in oldest), default=0),
        age_batches=max((batches for _, batches in oldest), default=0),
        traced=traced,
    )


def token_record(
    batch: Batch,
    q: int,
    g: int,
    *,
    where: dict[str, Any],
    chat: Chat,
    columns: dict[str, Tensor],
) -> TokenRecord:
    """The record of a response's sampled tokens, from the `columns` of a `TokenTrace`."""
    responses, weight = batch.judged.responses, float(batch.weights[q, g])
    here = responses.sampled[q, g]
    ids = responses.ids[q, g][here].tolist()
    sampled = responses.policy_logprobs[q, g][here].double().cpu()
    given = {name: table for name, table in columns.items() if not name.startswith("top_")}
    scale, old = float(given.pop("scale")[0]), given.pop("old_logprob")
    tops = columns["top_ids"] >= 0
    top_ids = [row[kept].tolist() for row, kept in zip(columns["top_ids"], tops, strict=True)]
    record = {
        **_place(batch.judged, q, g, where),
        "temperature": responses.temperature,
        "objective_name": batch.objective_name,
        "coefficient": _rounded(scale / weight),
        "weight": weight,
        "ids": ids,
        "text": chat.pieces(ids),
        "turn": responses.turns[q, g][here].tolist(),
        "version": [responses.labels[i] for i in responses.versions[q, g][here].tolist()],
        "age": responses.ages(batch.now)[q, g][here][:, 0].tolist(),
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


def _place(judged: Judged, q: int, g: int, where: dict[str, Any]) -> Place:
    prompt, samples = judged.prompts[q], judged.successes.shape[1]
    here = {"schema_version": SCHEMA_VERSION, **where, "split": judged.split}
    return cast(Place, {**here, "key": prompt.key, "sample": prompt.copy * samples + g})


def _numbers(values: Tensor) -> list[JsonNumber]:
    return [_rounded(value) for value in values.tolist()]


def _rounded(value: float) -> JsonNumber:
    """Six digits, about float32's precision, to halve the file; None if not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
