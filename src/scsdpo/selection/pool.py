"""DAPO's dynamic sampling: collect informative groups until they make a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from scsdpo.distributed import all_gather, place
from scsdpo.seeds import run_seed
from scsdpo.selection._base import Judged, Selection
from scsdpo.state import Stateful
from scsdpo.types import Outcomes, Prompt, Rollouts, Verdict, stable_hash
from scsdpo.verifiers import Verifier


@dataclass(frozen=True)
class _Spent(Verifier):
    """Stands for the verifier of a prompt whose rollouts were judged before a restart."""

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        raise RuntimeError(f"{prompt.key} was judged already")


class InformativePool(Selection, Stateful):
    """Learn from full batches of informative groups only.

    Groups whose rewards differ go into a pool; the others are dropped. Each batch of questions is
    one training step; the optimizer steps when the pool holds `questions` groups over all ranks,
    or `max_batches` batches after the last time with what is there. What exceeds a full pool is
    dropped: after the step it would be of an older policy.

    Which groups stay is drawn anew for each pool, every group with the same chance, whichever
    batch it came in and whatever its source is called. The draw is by a hash of the run's seed, the
    number of pools used so far, and the group's question and responses: it does not depend on ranks
    or on the order in the batch. Groups and that number are in the checkpoint.

    Every rank holds the whole pool and learns from its share of it.

    Args:
        questions: groups of a full pool, over all ranks. Must be >= 1.
        max_batches: batches after which a pool that is not full is used. Must be >= 1.

    Raises:
        ValueError: if an argument is below 1.

    Source:
        Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2.
    """

    def __init__(self, questions: int, max_batches: int = 10) -> None:
        super().__init__()
        for name, value in (("questions", questions), ("max_batches", max_batches)):
            if value < 1:
                raise ValueError(f"`InformativePool({name}=...)` must be >= 1, got {value}")
        self.questions, self.max_batches = questions, max_batches
        self.groups: list[Judged] = []
        self.batches = 0
        self.used = 0
        """Pools that were learned from so far."""

    @property
    def needs_group(self) -> bool:
        return True

    def select(self, rollouts: Rollouts, outcomes: Outcomes) -> tuple[Judged, ...]:
        self.batches += 1
        new = _informative(rollouts, outcomes)
        self.groups = sorted([*self.groups, *all_gather(new)], key=self._draw)
        if len(self.groups) < self.questions and self.batches < self.max_batches:
            return ()
        rank, ranks = place()
        mine = self.groups[: self.questions][rank::ranks]
        self.groups, self.batches, self.used = [], 0, self.used + 1
        return (joined(mine, like=(rollouts, outcomes)),)

    def _draw(self, group: Judged) -> int:
        """The group's place in the pool, by a number drawn for it."""
        rollouts, _ = group
        pairs = zip(rollouts.ids[0], rollouts.mask[0], strict=True)
        said = [ids[mask].tolist() for ids, mask in pairs]
        return stable_hash(run_seed(), self.used, rollouts.prompts[0].key, said)

    def preview(self, rollouts: Rollouts, outcomes: Outcomes) -> Judged:
        return joined(_informative(rollouts, outcomes), like=(rollouts, outcomes))

    def remembered(self) -> dict[str, Any]:
        groups = [_plain(group) for group in self.groups]
        return {"batches": self.batches, "used": self.used, "groups": groups}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.batches = remembered["batches"]
        self.used = remembered.get("used", 0)  # earlier checkpoints did not count
        self.groups = [_restored(*group) for group in remembered["groups"]]


def _informative(rollouts: Rollouts, outcomes: Outcomes) -> list[Judged]:
    """The groups whose rewards differ."""
    spread = (outcomes.rewards != outcomes.rewards[:, :1]).any(-1)
    return [one_group(rollouts, outcomes, q) for q in spread.nonzero()[:, 0].tolist()]


def one_group(rollouts: Rollouts, outcomes: Outcomes, q: int) -> Judged:
    """One question's rollouts, on the CPU."""
    one = slice(q, q + 1)
    tensors: dict[str, Any] = {
        n: t[one].cpu() for n, t in vars_of(rollouts).items() if isinstance(t, Tensor)
    }
    return (
        replace(rollouts, prompts=rollouts.prompts[one], texts=rollouts.texts[one], **tensors),
        Outcomes(
            verdicts=outcomes.verdicts[one],
            rewards=outcomes.rewards[one].cpu(),
            successes=outcomes.successes[one].cpu(),
            keys=outcomes.keys[one],
        ),
    )


def joined(groups: Sequence[Judged], like: Judged) -> Judged:
    """One batch of several groups, of 0 questions if there are none; widths and device of all."""
    rollouts, outcomes = like
    width = max([group[0].ids.shape[-1] for group in groups], default=0)
    device = rollouts.ids.device

    def cat(name: str) -> Tensor:
        empty = getattr(rollouts, name)[:0]
        parts = [getattr(group[0], name) for group in groups]
        if empty.ndim == 3:
            empty = empty[..., :0]
            parts = [torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
            empty = torch.nn.functional.pad(empty, (0, width))
        return torch.cat([empty, *(part.to(device) for part in parts)])

    names = [n for n, value in vars_of(rollouts).items() if isinstance(value, Tensor)]
    tensors: dict[str, Any] = {name: cat(name) for name in names}
    return (
        replace(
            rollouts,
            prompts=tuple(prompt for group in groups for prompt in group[0].prompts),
            texts=tuple(texts for group in groups for texts in group[0].texts),
            **tensors,
        ),
        Outcomes(
            verdicts=tuple(row for group in groups for row in group[1].verdicts),
            rewards=torch.cat([outcomes.rewards[:0], *(g[1].rewards.to(device) for g in groups)]),
            successes=torch.cat(
                [outcomes.successes[:0], *(g[1].successes.to(device) for g in groups)]
            ),
            keys=tuple(key for group in groups for key in group[1].keys),
        ),
    )


def vars_of(batch: Rollouts) -> dict[str, Any]:
    """Field -> value."""
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def _plain(group: Judged) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group as tensors and primitives."""
    rollouts, outcomes = group
    (prompt,), (verdicts,) = rollouts.prompts, outcomes.verdicts
    told = {f.name: getattr(prompt, f.name) for f in fields(prompt) if f.name != "verifier"}
    rest = {"verdicts": [asdict(v) for v in verdicts], "keys": outcomes.keys}
    return (
        vars_of(rollouts) | {"prompts": told},
        {"rewards": outcomes.rewards, "successes": outcomes.successes, **rest},
    )


def _restored(rollouts: dict[str, Any], outcomes: dict[str, Any]) -> Judged:
    prompt = Prompt(verifier=_Spent(), **rollouts["prompts"])
    verdicts = tuple(Verdict(**verdict) for verdict in outcomes["verdicts"])
    return (
        Rollouts(**(rollouts | {"prompts": (prompt,)})),
        Outcomes(**(outcomes | {"verdicts": (verdicts,)})),
    )
