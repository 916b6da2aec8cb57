"""Samplers and loaders: the order of questions, and their batches."""

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

_warn = rank_zero_only(logging.getLogger(__name__).warning)


class EpochSampler(DistributedSampler[Any]):
    """A rank's share of the endless `interleave` of draws, cut into epochs of whole batches.

    Rank r of R takes draws r, r + R, ..., so the questions of a step are the same for every R. Each
    item is the draws of the whole batch and an index into them. Questions that do not fill a batch
    at the end of an epoch come first in the next one. An iteration starts after the `asked` draws,
    which `took` counts, and ends with the epoch.

    Args:
        questions: the sources to draw from.
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
        """Number of questions asked of each source in its present order."""
        self.marks = [""] * len(weights)
        """`ShuffledSource.mark` of each source after those questions; '' before the first."""
        self.origin, self.base = 0, [0] * len(weights)
        """Values of `asked` and `counts` when the present schedule of sources began."""
        self.ahead = 0
        """Number of batches of the next epoch that are drawn early, for `PromptBatch.upcoming`."""

    def __len__(self) -> int:
        return self.num_samples

    @property
    def batches_left(self) -> int:
        """Batches that this epoch still has."""
        batches = (self.epoch_size - self.asked % self.epoch_size) // self.batch_size
        # Only after a resume with another batch size can the rest be less than a batch.
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
        """Count a batch as asked."""
        self.asked += len(batch.draws)
        for source, number in batch.draws:
            self.counts[source] = number + 1
        for source, mark in batch.marks.items():
            self.marks[source] = mark

    def position(self) -> dict[str, Any]:
        """The position, in plain values."""
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
        """Go to `position`; a source that has changed begins a new pass, and a warning names it.

        Raises:
            ConfigurationError: if a source cannot be read.
        """
        self.asked = position["asked"]
        if "sources" not in position:  # written by an early version
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
                _warn(
                    "%s: its questions or their order have changed since the checkpoint (%d then, "
                    "%d now). A new pass begins, so the %d questions that the old pass had asked "
                    "are asked again. To continue the old pass, restore the old rows, seed, "
                    "window and max_prompt_tokens, and resume from the same checkpoint again",
                    *(key, old["questions"], len(source), old["asked"]),
                )
            here = (old["asked"], mark) if mark == old["mark"] else (0, "")
            self.counts[number], self.marks[number] = here
        self.origin, self.base = position["origin"], list(position["base"])
        if list(self.weights) != position["weights"] or self.counts != [s["asked"] for s in before]:
            # A new schedule begins here, with the next questions.
            self.origin, self.base = self.asked, list(self.counts)

    def _mark(self, source: int, count: int) -> str:
        with self.questions.blamed(source):
            return self.questions.sources[source].mark(count) if count else ""

    def set_epoch(self, epoch: int) -> None:
        """Ignore Lightning's epoch, which may differ from ours after a limit on steps."""


def as_it_is(batch: Any) -> Any:
    """Collate function of a `Mixture`, whose items are batches already."""
    return batch


class QuestionLoader(DataLoader[Any]):
    """Batches whose position Lightning saves and restores, over an `EpochSampler`.

    The position counts the batches that were handed over, not those that workers fetched ahead. A
    draw gives the same prompt as long as the data are the same, which a hash of each source
    (`mark`) shows; so nothing else has to be restored.
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
        """Number of questions asked over all ranks since the run began; for each source, its next
        question and a hash that shows whether the source has changed.
        """
        return cast(EpochSampler, self.sampler).position()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved position, with any number of ranks.

        A source that has changed begins a new pass, which is logged: its old position means nothing
        in the new order.

        Raises:
            ConfigurationError: if a source cannot be read.
        """
        cast(EpochSampler, self.sampler).go_on(state_dict)


class EvaluationSampler(DistributedSampler[Any]):
    """A rank's share of questions, each asked once, for any number of ranks.

    Rank r of R asks r, r + R, ..., so each step has the same questions as on one rank. If R does
    not divide their number, the last ranks have one question less.

    Args:
        questions: the questions, in order.
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
    """Batches over an `EvaluationSampler`; all ranks have equally many, the last may be empty."""

    def __len__(self) -> int:
        sampler = cast(EvaluationSampler, self.sampler)
        most = -(-len(cast(Sized, sampler.dataset)) // sampler.num_replicas)
        return -(-most // cast(int, self.batch_size))

    def __iter__(self) -> Iterator[PromptBatch]:  # type: ignore[override]
        batches = super().__iter__()
        for _ in range(len(self)):
            yield next(batches, PromptBatch(()))
