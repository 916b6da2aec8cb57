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
        """The group's place in the pool, by a number drawn for it."""
        responses = group.responses
        pairs = zip(responses.ids[0], responses.sampled[0], strict=True)
        said = [ids[sampled].tolist() for ids, sampled in pairs]
        return stable_hash(run_seed(), self.used, group.keys[0], said)

    def preview(self, judged: Judged) -> Judged:
        return judged[_informative(judged)]

    def remembered(self) -> dict[str, Any]:
        groups = [_plain(group) for group in self.groups]
        return {"batches": self.batches, "used": self.used, "groups": groups}

    def remember(self, remembered: Mapping[str, Any]) -> None:
        self.batches = remembered["batches"]
        self.used = remembered.get("used", 0)  # earlier checkpoints did not count
        self.groups = [_restored(*group) for group in remembered["groups"]]


def _informative(judged: Judged) -> list[int]:
    """The questions whose rewards differ."""
    spread = (judged.rewards != judged.rewards[:, :1]).any(-1)
    return spread.nonzero()[:, 0].tolist()


def _plain(group: Judged) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group as tensors and primitives."""
    (prompt,), (verdicts,) = group.prompts, group.verdicts
    told = {f.name: getattr(prompt, f.name) for f in fields(prompt) if f.name != "verifier"}
    return (
        plain(group.responses) | {"prompts": told},
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
