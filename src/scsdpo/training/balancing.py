"""Questions exchanged between ranks, so that each has nearly as many tokens to train on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scsdpo.advantage import Advantage, Batch
from scsdpo.distributed import all_gather, rank_and_size
from scsdpo.teacher import Teacher
from scsdpo.types import Judged, TeacherContexts

Ids = tuple[tuple[int, ...], ...]


class _Group(NamedTuple):
    """A question with its rollouts, and what its rank has made of them."""

    number: tuple[int, int]
    """In the order of one process: place in its rank's batch, rank."""
    cost: int
    judged: Judged
    weights: Tensor
    contexts: dict[str, Ids]


def balance_ranks(home: Batch, advantage: Advantage, teacher: Teacher) -> Batch:
    """A share of what all ranks have prepared, groups whole, for nearly equal work on each.

    Every rank waits for the slowest in each optimizer step, and what a question costs is known only
    when its rollouts are. Sums are over all ranks, hence no number depends on who has which.

    Args:
        home: prepared by this rank.
        advantage: plans again for the share.
        teacher: says which rollouts have what it needs.
    """
    rank, ranks = rank_and_size()
    if ranks == 1:
        return home
    groups = sorted(all_gather(_groups(home, rank)), key=lambda group: group.number)
    mine: list[_Group] = []
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
    """Questions of each step, in nearly equal numbers."""
    return tuple(len(part) for part in torch.arange(questions).tensor_split(steps))


def balanced(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """For each rank, which items it gets, ascending: dearest first, each to who has least."""
    loads = [0] * ranks
    given: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], len(given[r]), r))
        loads[rank] += costs[item]
        given[rank].append(item)
    return [sorted(items) for items in given]


def _groups(batch: Batch, rank: int) -> list[_Group]:
    # In tokens forward: a student's token goes forward and back, three times as much work.
    lengths, active = batch.judged.lengths, batch.active.view_as(batch.weights)
    read = sum(batch.reads(slot).to(lengths).view_as(lengths) for slot in batch.contexts)
    costs = (lengths * active * (3 + read)).sum(-1).tolist()
    return [
        _Group(
            number=(q, rank),
            cost=cost,
            judged=batch.judged[[q]].to("cpu"),
            weights=batch.weights[q].cpu(),
            contexts={slot: each.ids[q] for slot, each in batch.contexts.items()},
        )
        for q, cost in enumerate(costs)
    ]
