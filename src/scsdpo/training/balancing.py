"""Exchanges questions between ranks, so that each has nearly as many tokens to train on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scsdpo.advantage import Advantage, Batch
from scsdpo.distributed import all_gather, rank_and_size
from scsdpo.teacher import Teacher
from scsdpo.types import Judged, TeacherContexts

Ids = tuple[tuple[int, ...], ...]


class _PreparedGroup(NamedTuple):
    """A question with its rollouts, weights and contexts, as its rank prepared them."""

    number: tuple[int, int]
    """(place in its rank's batch, rank): sorted by it, questions stand as in a run of one rank."""
    cost: int
    """Estimated work, in tokens of a forward."""
    judged: Judged
    weights: Tensor
    contexts: dict[str, Ids]


def balance_ranks(home: Batch, advantage: Advantage, teacher: Teacher) -> Batch:
    """Give this rank a share of all ranks' questions, so that ranks have nearly equal work.

    Every rank waits for the slowest one in each optimizer step, and a question's work is known only
    after its rollouts. All sums are over all ranks, so no number depends on which rank has which
    question. A question's rollouts stay together.

    Args:
        home: the batch that this rank has prepared.
        advantage: makes a new plan for the share.
        teacher: says which rollouts have the contexts that it needs.
    """
    rank, ranks = rank_and_size()
    if ranks == 1:
        return home
    groups = sorted(all_gather(_groups(home, rank)), key=lambda group: group.number)
    mine: list[_PreparedGroup] = []
    sizes: list[int] = []
    start = 0
    for size in split(len(groups), len(home.questions)):
        step, start = groups[start : start + size], start + size
        chosen = balanced([group.cost for group in step], ranks)[rank]
        mine += [step[i] for i in chosen]
        sizes.append(len(chosen))
    device, shared = home.weights.device, home.judged[[]].cat([group.judged for group in mine])
    contexts = {
        slot: TeacherContexts(ids=tuple(group.contexts[slot] for group in mine))
        for slot in home.contexts
    }
    available = teacher.available(contexts).to(device).view_as(shared.successes)
    return Batch.of(
        shared,
        advantage.planned(shared, available),
        torch.cat([home.weights[:0], *(group.weights.to(device)[None] for group in mine)]),
        contexts,
        tuple(sizes),
        home.objective_name,
        home.now,
    )


def split(questions: int, steps: int) -> tuple[int, ...]:
    """Number of questions of each step, nearly equal."""
    return tuple(len(part) for part in torch.arange(questions).tensor_split(steps))


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Items of each rank, ascending. The most costly item comes first, to the rank with least."""
    loads = [0] * ranks
    given: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], len(given[r]), r))
        loads[rank] += costs[item]
        given[rank].append(item)
    return [sorted(items) for items in given]


def _groups(batch: Batch, rank: int) -> list[_PreparedGroup]:
    # In tokens of a forward. The student's tokens run forward and backward, three times the work.
    lengths, active = batch.judged.lengths, batch.active.view_as(batch.weights)
    read = sum(batch.reads(slot).to(lengths).view_as(lengths) for slot in batch.contexts)
    costs = (lengths * active * (3 + read)).sum(-1).tolist()
    return [
        _PreparedGroup(
            number=(q, rank),
            cost=cost,
            judged=batch.judged[[q]].to("cpu"),
            weights=batch.weights[q].cpu(),
            contexts={slot: each.ids[q] for slot, each in batch.contexts.items()},
        )
        for q, cost in enumerate(costs)
    ]
