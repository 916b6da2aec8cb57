"""The order in which questions are asked, and their batches."""

from collections.abc import Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler

from scsdpo.types import Prompt, stable_hash


class PromptBatch:
    """The questions of a step, until the data module hands them over as a tuple.

    Not a sequence, lest Lightning's precision plugins rebuild every prompt in search of tensors.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = tuple(prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)


class EpochSampler(DistributedSampler):
    """A rank's share of an endless row of epochs, each a permutation that (seed, epoch) fixes.

    Rank r of R takes entries r, r + R, ...: the questions of a step are the same for every R. An
    epoch leaves out what does not fill a batch. An iteration starts after the questions that were
    `asked`, which whoever asks them counts, and ends with the epoch.

    Args:
        questions: what indices are drawn of.
        batch_size: questions per step, over all ranks; a multiple of `num_replicas`.
        num_replicas: R.
        rank: r.
        seed: another seed gives other permutations.
    """

    # A DistributedSampler by name only: on several ranks Lightning replaces any other.
    def __init__(
        self, questions: Sized, *, batch_size: int, num_replicas: int, rank: int, seed: int
    ) -> None:
        super().__init__(questions, num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        self.size = len(questions)
        self.num_samples = self.size // batch_size * batch_size // num_replicas
        self.asked = 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        if self.asked >= len(self):
            self.epoch, self.asked = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(stable_hash(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)[self.rank :: self.num_replicas]
        return iter(order[self.asked : len(self)].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Nothing: Lightning's next epoch starts where a limit on steps ended a run; ours not."""


class QuestionLoader(DataLoader):
    """Batches whose position Lightning saves and restores, over an `EpochSampler`.

    The position counts the batches that were taken, not those that workers fetched ahead. A source
    gives the same prompt for an index each time, hence there is nothing else to restore.
    """

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        sampler = cast(EpochSampler, self.sampler)
        for batch in super().__iter__():
            sampler.asked += len(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its questions were asked, over all ranks."""
        sampler = cast(EpochSampler, self.sampler)
        return {"epoch": sampler.epoch, "asked": sampler.asked * sampler.num_replicas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks."""
        sampler = cast(EpochSampler, self.sampler)
        sampler.epoch = state_dict["epoch"]
        sampler.asked = state_dict["asked"] // sampler.num_replicas
