"""Questions dealt to ranks so that each has nearly as many tokens to train on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scsdpo.advantage import Advantage, Batch
from scsdpo.distributed import all_gather, place
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


def deal(
    prepare: Callable[[Judged], Batch],
    advantage: Advantage,
    teacher: Teacher,
    judged: Judged,
) -> Batch:
    """A batch to learn from: this rank's own, or its share of all, groups whole.

    Every rank waits for the slowest in each optimizer step, and what a question costs is known only
    when its rollouts are. Sums are over all ranks, hence no number depends on who has which.

    Args:
        prepare: contexts, weights and plan of judged responses.
        advantage: plans again for what was dealt.
        teacher: says which rollouts have what it needs.
        judged: the responses of this rank.
    """
    rank, ranks = place()
    if ranks == 1:
        return prepare(judged)
    home = prepare(judged)
    groups = sorted(all_gather(_groups(home)), key=lambda group: group.number)
    mine: list[_Group] = []
    sizes: list[int] = []
    for part in _cut(groups, split(len(groups), len(home.questions))):
        chosen = balanced([group.cost for group in part], ranks)[rank]
        mine += [part[i] for i in chosen]
        sizes.append(len(chosen))
    return _joined(mine, tuple(sizes), home, advantage, teacher)


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


def _groups(batch: Batch) -> list[_Group]:
    # In tokens forward: a student's token goes forward and back, three times as much work.
    lengths, active = batch.judged.lengths, batch.active.view_as(batch.weights)
    read = sum(batch.reads(slot).to(lengths).view_as(lengths) for slot in batch.contexts)
    costs = (lengths * active * (3 + read)).sum(-1).tolist()
    rank, _ = place()
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


def _cut(groups: list[_Group], sizes: Sequence[int]) -> list[list[_Group]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [groups[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _joined(
    groups: Sequence[_Group],
    questions: tuple[int, ...],
    home: Batch,
    advantage: Advantage,
    teacher: Teacher,
) -> Batch:
    judged = home.judged[[]].cat([group.judged for group in groups])
    device = home.weights.device
    contexts = {
        slot: TeacherContexts(ids=tuple(group.contexts[slot] for group in groups))
        for slot in home.contexts
    }
    available = teacher.available(contexts)
    return Batch.of(
        judged,
        advantage.planned(judged, available.to(device).view_as(judged.successes)),
        torch.cat([home.weights[:0], *(g.weights.to(device)[None] for g in groups)]),
        contexts,
        questions,
        home.objective_name,
    )
