"""The order in which questions are asked, and their batches."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from scsdpo.data._base import source_key
from scsdpo.data.shuffled import Draws, Mixture, PromptBatch, interleave
from scsdpo.types import Prompt

_log = logging.getLogger(__name__)


class EpochSampler(DistributedSampler[Any]):
    """A rank's share of the endless `interleave` of draws, cut into epochs of whole batches.

    Rank r of R takes draws r, r + R, ...: the questions of a step are the same for every R. It
    gives the draws of the whole batch with each of its places in them. What does not fill a batch
    at the end of an epoch is asked first in the next one. An iteration starts after the draws that
    were `asked`, which whoever asks them counts, and ends with the epoch.

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
        self.questions = questions
        self.asked = 0
        self.counts = [0] * len(weights)
        """Of those asked, the ones of each source's present order."""
        self.marks = [""] * len(weights)
        """`ShuffledSource.mark` after those; '' before any."""
        self.origin, self.base = 0, [0] * len(weights)
        """Draws that were asked, and numbers of the sources, when the schedule began."""
        self.ahead = 0
        """Batches of the next epoch that are drawn after those of this one, to be looked at."""

    def __len__(self) -> int:
        return self.num_samples

    @property
    def batches_left(self) -> int:
        """Batches that this epoch still has."""
        batches = (self.epoch_size - self.asked % self.epoch_size) // self.batch_size
        # Only a run that was resumed with other batches has a rest that does not fill any.
        return batches or self.epoch_size // self.batch_size

    def __iter__(self) -> Iterator[tuple[Draws, int]]:
        draws = (
            (source, self.base[source] + number)
            for source, number in interleave(self.weights, self.asked - self.origin)
        )
        for _ in range(self.batches_left + self.ahead):
            batch = tuple(islice(draws, self.batch_size))
            for place in range(self.rank, self.batch_size, self.num_replicas):
                yield batch, place

    def took(self, batch: PromptBatch) -> None:
        """A batch is asked."""
        self.asked += len(batch.draws)
        for source, number in batch.draws:
            self.counts[source] = number + 1
        for source, mark in batch.marks.items():
            self.marks[source] = mark

    def position(self) -> dict[str, Any]:
        """Where it stands, in plain values."""
        sources = zip(map(len, self.questions.sources), self.counts, self.marks, strict=True)
        return {
            "asked": self.asked,
            "origin": self.origin,
            "base": list(self.base),
            "weights": list(self.weights),
            "sources": [
                {"questions": size, "asked": count, "mark": mark} for size, count, mark in sources
            ],
        }

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Stand where `position` says; a source that has changed begins a new pass, and is named.

        Raises:
            ConfigurationError: if a source cannot be read.
        """
        self.asked = position["asked"]
        if "sources" not in position:  # of a version that kept nothing else
            passes, rest = divmod(self.asked, sum(self.weights))
            drawn = Counter(source for source, _ in islice(interleave(self.weights), rest))
            counts = [passes * weight + drawn[s] for s, weight in enumerate(self.weights)]
            self.counts, self.marks = counts, list(map(self._mark, range(len(counts)), counts))
            return
        unknown: dict[str, Any] = {"asked": 0, "mark": ""}
        before = position["sources"]
        for number, source in enumerate(self.questions.sources):
            old = before[number] if number < len(before) else unknown
            mark = self._mark(number, old["asked"])
            if mark != old["mark"]:
                key = source_key("train", number, len(self.questions.sources))
                _log_changed(key, old["questions"], len(source), old["asked"])
            here = (old["asked"], mark) if mark == old["mark"] else (0, "")
            self.counts[number], self.marks[number] = here
        self.origin, self.base = position["origin"], list(position["base"])
        if list(self.weights) != position["weights"] or self.counts != [s["asked"] for s in before]:
            # Another schedule begins here, with the questions that are next.
            self.origin, self.base = self.asked, list(self.counts)

    def _mark(self, source: int, count: int) -> str:
        with self.questions.blamed(source):
            return self.questions.sources[source].mark(count) if count else ""

    def set_epoch(self, epoch: int) -> None:
        """Nothing: Lightning's next epoch starts where a limit on steps ended a run; ours not."""


@rank_zero_only
def _log_changed(key: str, before: int, now: int, asked: int) -> None:
    _log.warning(
        "%s: its questions, or their order, are not those of the checkpoint (%d then, %d now): "
        "the pass under way is given up and a new one begins, which asks each question once, those "
        "too that were asked before (%d so far). To go on with the old pass, bring back the old "
        "rows, seed, window and max_prompt_tokens, and resume from the same checkpoint again",
        *(key, before, now, asked),
    )


def as_it_is(batch: Any) -> Any:
    """Collates what a `Mixture` gives, which is a batch already."""
    return batch


class QuestionLoader(DataLoader[Any]):
    """Batches whose position Lightning saves and restores, over an `EpochSampler`.

    The position counts the batches that were taken, not those that workers fetched ahead. A draw
    gives the same prompt each time as long as the data are the same, which a mark of each source
    tells: hence there is nothing else to restore.
    """

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        sampler = cast(EpochSampler, self.sampler)
        left, batches = sampler.batches_left, super().__iter__()
        looked: deque[PromptBatch] = deque()
        for _ in range(left):
            looked.extend(islice(batches, sampler.ahead + 1 - len(looked)))
            batch = looked.popleft()
            if batch.fault:
                raise batch.fault
            sampler.took(batch)
            batch.upcoming = tuple(looked)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many questions were asked, over all ranks, since the run began; which of each source
        is next, and what tells whether the source has changed.
        """
        return cast(EpochSampler, self.sampler).position()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks.

        A source that has changed begins a new pass, which is logged: where its old one stood means
        nothing in the new order.

        Raises:
            ConfigurationError: if a source cannot be read.
        """
        cast(EpochSampler, self.sampler).go_on(state_dict)


class EvaluationSampler(DistributedSampler[Any]):
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


class EvaluationLoader(DataLoader[Any]):
    """Batches over an `EvaluationSampler`, as many on every rank: the last one may be empty."""

    def __len__(self) -> int:
        sampler = cast(EvaluationSampler, self.sampler)
        most = -(-len(cast(Sized, sampler.dataset)) // sampler.num_replicas)
        return -(-most // cast(int, self.batch_size))

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        batches = super().__iter__()
        for _ in range(len(self)):
            yield next(batches, PromptBatch(()))
