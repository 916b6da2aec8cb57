"""DAPO's dynamic sampling: collect informative groups until they make a batch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from scsdpo.distributed import all_gather, rank_and_size
from scsdpo.seeds import run_seed
from scsdpo.selection._base import Selection
from scsdpo.state import Stateful, plain, restored
from scsdpo.types import Judged, Prompt, Verdict, stable_hash
from scsdpo.verifiers import Verifier


@dataclass(frozen=True)
class _Spent(Verifier):
    """Replaces the verifier of a prompt whose rollouts were judged before a restart."""

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        raise RuntimeError(f"{prompt.key} was judged already")


class InformativePool(Selection, Stateful):
    """Learn from full batches of informative groups only.

    Groups whose rewards differ go into a pool; others are dropped. The optimizer steps when the
    pool has `questions` groups over all ranks, or with fewer groups `max_batches` batches after the
    last step. Further groups are dropped, for after the step they would be of an older policy.

    The groups that stay are drawn at random for each pool, with equal chances for all. The draw is
    by a hash of the run's seed, the number of pools used so far, and the group's question and
    responses, so that it does not depend on ranks or on the order in a batch. Groups and that
    number are in the checkpoint.

    Every rank keeps the whole pool and learns from its share of it.

    Args:
        questions: groups of a full pool, over all ranks. Must be >= 1.
        max_batches: a pool that is not full is used after so many batches. Must be >= 1.

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
        """Number of pools that were learned from so far."""

    @property
    def needs_group(self) -> bool:
        return True

    def select(self, judged: Judged) -> tuple[Judged, ...]:
        self.batches += 1
        new = [judged[[q]].to("cpu") for q in _informative(judged)]
        self.groups = sorted([*self.groups, *all_gather(new)], key=self._draw)
        if len(self.groups) < self.questions and self.batches < self.max_batches:
            return ()
        rank, ranks = rank_and_size()
        mine = self.groups[: self.questions][rank::ranks]
        self.groups, self.batches, self.used = [], 0, self.used + 1
        return (judged[[]].cat(mine),)

    def _draw(self, group: Judged) -> int:
        """A random number for the group, by which the pool is sorted."""
        responses = group.responses
        pairs = zip(responses.ids[0], responses.sampled[0], strict=True)
        ids = [row[sampled].tolist() for row, sampled in pairs]
        return stable_hash(run_seed(), self.used, group.keys[0], ids)

    def preview(self, judged: Judged) -> Judged:
        return judged[_informative(judged)]

    def remembered(self) -> dict[str, Any]:
        groups = [_plain(group) for group in self.groups]
        return {"batches": self.batches, "used": self.used, "groups": groups}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.batches = remembered["batches"]
        self.used = remembered.get("used", 0)  # missing in checkpoints of earlier versions
        self.groups = [_restored(*group) for group in remembered["groups"]]


def _informative(judged: Judged) -> list[int]:
    """Numbers of the questions whose rewards differ."""
    spread = (judged.rewards != judged.rewards[:, :1]).any(-1)
    return spread.nonzero()[:, 0].tolist()


def _plain(group: Judged) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group as tensors and primitives."""
    (prompt,), (verdicts,) = group.prompts, group.verdicts
    question = {f.name: getattr(prompt, f.name) for f in fields(prompt) if f.name != "verifier"}
    return (
        plain(group.responses) | {"prompts": question},
        {
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "rewards": group.rewards,
            "successes": group.successes,
        },
    )


def _restored(responses: dict[str, Any], verdicts: dict[str, Any]) -> Judged:
    prompt = Prompt(verifier=_Spent(), **responses["prompts"])
    return Judged(
        responses=restored({k: v for k, v in responses.items() if k != "prompts"}, (prompt,)),
        verdicts=(tuple(Verdict(**verdict) for verdict in verdicts["verdicts"]),),
        rewards=verdicts["rewards"],
        successes=verdicts["successes"],
    )
