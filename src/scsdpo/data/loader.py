"""The order in which questions are asked, and their batches."""

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, DistributedSampler

from scsdpo.data.shuffled import Mixture, interleave
from scsdpo.errors import ConfigurationError
from scsdpo.types import Prompt


class PromptBatch:
    """The questions of a step, until the data module hands them over as a tuple.

    Not a sequence, lest Lightning's precision plugins rebuild every prompt in search of tensors.

    Args:
        prompts: the questions, or why there are none.
    """

    def __init__(self, prompts: Sequence[Prompt] | ConfigurationError) -> None:
        self.fault = prompts if isinstance(prompts, ConfigurationError) else None
        self.prompts = () if isinstance(prompts, ConfigurationError) else tuple(prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)


class EpochSampler(DistributedSampler):
    """A rank's share of the endless `interleave` of draws, cut into epochs of whole batches.

    Rank r of R takes draws r, r + R, ...: the questions of a step are the same for every R. What
    does not fill a batch at the end of an epoch is asked first in the next one. An iteration starts
    after the draws that were `asked`, which whoever asks them counts, and ends with the epoch.

    Args:
        questions: what is drawn.
        weights: of its sources, as in `interleave`.
        batch_size: questions per step, over all ranks; a multiple of `num_replicas`.
        num_replicas: R.
        rank: r.
    """

    # A DistributedSampler by name only: on several ranks Lightning replaces any other.
    def __init__(
        self,
        questions: Mixture,
        weights: Sequence[int],
        *,
        batch_size: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        super().__init__(questions, num_replicas, rank)
        self.weights, self.batch_size = weights, batch_size
        self.epoch_size = len(questions) // batch_size * batch_size
        self.num_samples = self.epoch_size // num_replicas
        self.asked = 0

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rest = self.epoch_size - self.asked % self.epoch_size
        # Only a run that was resumed with other batches has a rest that does not fill any.
        rest = rest // self.batch_size * self.batch_size or self.epoch_size
        return islice(interleave(self.weights, self.asked), self.rank, rest, self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: Lightning's next epoch starts where a limit on steps ended a run; ours not."""


class QuestionLoader(DataLoader):
    """Batches whose position Lightning saves and restores, over an `EpochSampler`.

    The position counts the batches that were taken, not those that workers fetched ahead. A draw
    gives the same prompt each time, hence there is nothing else to restore.
    """

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        sampler = cast(EpochSampler, self.sampler)
        for batch in super().__iter__():
            if batch.fault:
                raise batch.fault
            sampler.asked += len(batch) * sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many questions were asked, over all ranks, since the run began."""
        return {"asked": cast(EpochSampler, self.sampler).asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks."""
        cast(EpochSampler, self.sampler).asked = state_dict["asked"]


class EvaluationSampler(DistributedSampler):
    """A rank's share of questions that are asked once, whatever the number of ranks.

    Rank r of R asks r, r + R, ...: each step has the questions that it has on one rank. Where they
    do not divide, the last shares are smaller by one.

    Args:
        questions: what is asked, in order.
        num_replicas: R.
        rank: r.
    """

    def __init__(self, questions: Dataset[Prompt], *, num_replicas: int, rank: int) -> None:
        super().__init__(questions, num_replicas, rank, shuffle=False)
        self.share = range(rank, len(cast(Sized, questions)), num_replicas)

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)


class EvaluationLoader(DataLoader):
    """Batches over an `EvaluationSampler`, as many on every rank: the last one may be empty."""

    def __len__(self) -> int:
        sampler = cast(EvaluationSampler, self.sampler)
        most = -(-len(cast(Sized, sampler.dataset)) // sampler.num_replicas)
        return -(-most // cast(int, self.batch_size))

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        batches = super().__iter__()
        for _ in range(len(self)):
            yield next(batches, PromptBatch(()))
