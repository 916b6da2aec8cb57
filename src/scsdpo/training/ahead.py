"""Sampling ahead: batches are drawn before their turn to be learned from."""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info

from scsdpo import interrupt
from scsdpo.data import TaskDataModule
from scsdpo.distributed import all_gather, all_max, rank_and_size
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.loss import Importance, NoImportance
from scsdpo.rollout import Drawing, Drawn, Rollout
from scsdpo.state import plain, restored
from scsdpo.types import Moment, Prompt, Responses, Sampling


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Ahead:
    """How many batches are drawn before their turn to be learned from.

    With k batches, the responses to the k batches after the one that is learned from are drawn
    already, or are being drawn: each with the weights of the moment at which it was asked for. So
    at most k batches that moved the weights, and at most k `updates_per_rollout` optimizer steps,
    lie between the weights that drew a token and those that learn from it. Only sampling is early:
    verdicts, contexts, selection, weights and all that strategies remember are made when a batch is
    learned from, with what is known then. An episode of several turns is played while it is
    sampled, and brings its environment's verdict along.

    The host holds at most k batches of responses that wait. They are in checkpoints.

    Args:
        batches: k. 0: each batch is drawn when it is learned from, by the weights that learn.
        within_responses: whether servers get newer weights amid the responses that they draw, whose
            further tokens are then of those; False: they end them first.

    Raises:
        ValueError: if `batches` < 0.
    """

    batches: int = 0
    within_responses: bool = False

    def __post_init__(self) -> None:
        if self.batches < 0:
            raise ValueError(f"`Ahead(batches=...)` must be >= 0, got {self.batches}")


class Host(Protocol):
    """The part of the `PolicyOptimizer` that sampling ahead uses."""

    batches: torch.Tensor
    sampling: Sampling

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> Drawing:
        """Ask the policy as it is now."""

    def finish(self, drawing: Drawing) -> Responses:
        """Wait for the responses."""


class _Waiting:
    """A batch that was asked for, and may be drawn by now.

    Args:
        drawing: its responses, or those that are on their way.
        asked: this rank's questions.
        sampling: how they were to be answered.
        moments: by label, when weights were the newest: of all that may draw it.
    """

    def __init__(
        self,
        drawing: Drawing,
        asked: Sequence[Prompt],
        sampling: Sampling,
        moments: Mapping[str, Moment],
    ) -> None:
        self._drawing, self._moments = drawing, moments
        self.asked, self.sampling = _questions(asked), sampling
        self._responses: Responses | None = None

    @property
    def is_done(self) -> bool:
        return self._responses is not None or self._drawing.is_done

    def responses(self, finish: Callable[[Drawing], Responses], now: Moment) -> Responses:
        """Wait for them; on the host, and with the moments of the weights that drew them.

        Args:
            finish: `Host.finish`.
            now: the moment of weights that are newer than all that batches were asked for with:
                those of a validation since the last step.
        """
        if self._responses is None:
            drawn = finish(self._drawing).to("cpu")
            drawn_at = tuple(self._moments.get(label, now) for label in drawn.labels)
            self._responses = replace(drawn, drawn_at=drawn_at).cat([])  # labels by age
            self._drawing, self._moments = Drawn(self._responses), {}
        return self._responses

    @classmethod
    def of(cls, responses: Responses, sampling: Sampling) -> "_Waiting":
        """Responses of a checkpoint."""
        waiting = cls(Drawn(responses), responses.prompts, sampling, {})
        waiting._responses = responses
        return waiting


@dataclass(frozen=True, kw_only=True)
class _Queue:
    """Its state between two batches; never changed."""

    moved: int = 0
    """Batches from which an optimizer step was taken."""
    asked_again: int = 0
    """Batches that were drawn and could not be learned from."""
    waiting: Mapping[int, _Waiting]
    """Number of the batch -> this rank's share, on the host."""
    stored: Mapping[int, Mapping[str, Any]]
    """Number of the batch -> all ranks' shares in a checkpoint, until their questions are known."""

    @property
    def known(self) -> Set[int]:
        """Numbers of the batches, the same on all ranks."""
        return self.waiting.keys() | self.stored.keys()


class DrawnAhead:
    """The batches that wait for their turn.

    Every rank has its share of each of them, and all ranks ask in step.

    Args:
        ahead: how many may wait.
    """

    def __init__(self, ahead: Ahead) -> None:
        self.most = ahead.batches
        self._queue = self._finished = _Queue(waiting={}, stored={})
        """The second as it was after the last finished batch."""
        self._step = 0
        """Optimizer steps at its end."""
        self._moments: dict[str, Moment] = {}
        """Label of weights that may still be drawing -> when they were the newest."""

    @property
    def asked_again(self) -> int:
        """Batches so far that were drawn and asked again, for they could not be learned from."""
        return self._queue.asked_again

    def now(self, step: int) -> Moment:
        """The present one, after so many optimizer steps."""
        return Moment(step, self._queue.moved)

    def responses(
        self,
        host: Host,
        prompts: Sequence[Prompt],
        upcoming: Sequence[Sequence[Prompt]],
        step: int,
    ) -> Responses:
        """The responses to the batch whose turn it is; those to later ones are asked for.

        Args:
            host: samples, and counts batches.
            prompts: this rank's questions of the batch.
            upcoming: those of the batches that come next, in order.
            step: optimizer steps taken.
        """
        now, number = self.now(step), int(host.batches)
        asked = dict(enumerate((prompts, *upcoming[: self.most]), number))
        if number in self._queue.waiting:  # before servers get other weights
            self._queue.waiting[number].responses(host.finish, now)
        interrupt.meet()  # who gives the batch up while it waits leaves nobody in a collective
        usable = self._usable(asked, host, now)
        interrupt.open_window()
        waiting: dict[int, _Waiting] = {}
        for each, questions in asked.items():
            waiting[each] = usable.get(each) or self._ask(host, each, questions, now)
        due = waiting.pop(number)
        again = self.asked_again + len(self._queue.known - usable.keys())
        self._queue = replace(self._queue, waiting=waiting, stored={}, asked_again=again)
        return due.responses(host.finish, now)

    def _ask(self, host: Host, number: int, prompts: Sequence[Prompt], now: Moment) -> _Waiting:
        sampling = host.sampling.at(number)
        drawing = host.begin(prompts, sampling)
        least = now.batch - self.most
        for label in [label for label, at in self._moments.items() if at.batch < least]:
            del self._moments[label]
        self._moments[drawing.label] = now
        return _Waiting(drawing, prompts, sampling, self._moments)

    def _usable(
        self, asked: Mapping[int, Sequence[Prompt]], host: Host, now: Moment
    ) -> dict[int, _Waiting]:
        """Number -> waiting batch, of those that answer the questions `asked` on all ranks."""
        rank, ranks = rank_and_size()
        found: dict[int, _Waiting | None] = {}
        unfit = []
        for number in sorted(self._queue.known & asked.keys()):
            each = self._queue.waiting.get(number)
            stored = self._queue.stored.get(number, {})
            if "sampling" in stored:  # else it is of a checkpoint of version 0.2 or older
                share = _share(stored, asked[number], slice(rank, None, ranks))
                sampling = Sampling(**stored["sampling"])
                each = None if share is None else _Waiting.of(share, sampling)
            if each is not None and each.asked != _questions(asked[number]):
                each = None  # fitted before, with other data
            found[number] = each
            if each is None or not each.is_done:  # what is on its way was asked for as it should be
                unfit.append(each is None)
                continue
            responses = each.responses(host.finish, now)
            unfit.append(
                each.sampling != host.sampling.at(number)
                or any(now.batch - at.batch > self.most for at in responses.drawn_at)
            )
        pairs = zip(found.items(), _anywhere(unfit), strict=True)
        return {number: each for (number, each), wrong in pairs if each is not None and not wrong}

    # ------------------------------------------------------------------ checkpoints

    def begin(self, step: int) -> None:
        """Training begins or goes on, after so many optimizer steps."""
        waiting = self._queue.waiting
        lost = _anywhere([not each.is_done for each in waiting.values()])  # with an earlier fit
        pairs = zip(waiting.items(), lost, strict=True)
        drawn = {number: each for (number, each), is_lost in pairs if not is_lost}
        again = self.asked_again + sum(lost)
        self._queue = self._finished = replace(self._queue, waiting=drawn, asked_again=again)
        self._step = step

    def finish(self, step: int) -> None:
        """A batch is finished, after so many optimizer steps in all."""
        self._queue = self._finished = self._settled(step)
        self._step = step

    def _settled(self, step: int) -> _Queue:
        return replace(self._queue, moved=self._queue.moved + (step > self._step))

    def saved(self, host: Host, step: int, *, under_way: bool, alone: bool) -> dict[str, Any]:
        """Give what waits on all ranks as tensors and primitives; a collective unless `alone`.

        What is still being drawn on any rank will be asked again, and is counted as that.

        Args:
            host: knows how to take what is drawn.
            step: optimizer steps taken.
            under_way: a batch was begun and is not finished: what was before it.
            alone: no other rank takes part: what waits on several ranks is left out.
        """
        queue = self._finished if under_way else self._settled(step)
        now, batches = Moment(step, queue.moved), dict(queue.stored)
        if not alone or rank_and_size()[1] == 1:
            own: dict[int, Responses] = {}
            for number, waiting in queue.waiting.items():
                if waiting.is_done:
                    with suppress(TrainingStopped):  # said when its turn comes
                        own[number] = waiting.responses(host.finish, now)
            shares = all_gather([own])
            for number, waiting in queue.waiting.items():
                if all(number in share for share in shares):
                    each = [share[number] for share in shares]
                    batches[number] = _whole(each, waiting.sampling)
        again = queue.asked_again + len(queue.known) - len(batches)
        return {"moved": queue.moved, "asked_again": again, "batches": batches}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on with what `saved` gave."""
        self._queue = self._finished = _Queue(
            moved=saved["moved"],
            asked_again=saved["asked_again"],
            waiting={},
            stored=saved["batches"],
        )


def _anywhere(flags: Sequence[bool]) -> list[bool]:
    """Tell for each flag whether any rank has set it; all ranks give equally many. A collective."""
    if not flags:
        return []
    return [bool(flag) for flag in all_max(torch.tensor(flags, dtype=torch.float32)).tolist()]


def _questions(prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
    return [(prompt.key, prompt.copy) for prompt in prompts]


def _whole(shares: Sequence[Responses], sampling: Sampling) -> dict[str, Any]:
    """A batch of which rank r of R has the questions r, r + R, ..., and how it was sampled."""
    ranks, together = len(shares), shares[0].cat(shares[1:])
    starts = list(accumulate((len(share.prompts) for share in shares), initial=0))
    order = [starts[p % ranks] + p // ranks for p in range(starts[-1])]
    batch = together[order]
    questions = [
        {"key": p.key, "copy": p.copy, "messages": p.messages, "ids": p.ids} for p in batch.prompts
    ]
    return {"questions": questions, "responses": plain(batch), "sampling": asdict(sampling)}


def _share(stored: Mapping[str, Any], prompts: Sequence[Prompt], mine: slice) -> Responses | None:
    """Some questions of a batch; None if they are not these."""
    everyone = stored["questions"]
    questions = everyone[mine]
    if [(q["key"], q["copy"]) for q in questions] != _questions(prompts):
        return None
    batch = restored(stored["responses"], (prompts[0],) * len(everyone))
    opened = tuple(
        replace(prompt, messages=tuple(q["messages"]), ids=tuple(q["ids"]))
        for prompt, q in zip(prompts, questions, strict=True)
    )
    return replace(batch[range(len(everyone))[mine]], prompts=opened)


def check_ahead(
    ahead: Ahead, rollout: Rollout, data: object, overfits: bool, importance: Importance
) -> None:
    """Refuse runs of which the next batches cannot be known; say what is not corrected.

    Args:
        ahead: as configured.
        rollout: of the run.
        data: the run's data module.
        overfits: whether the same batches are asked again and again.
        importance: of the run.

    Raises:
        ConfigurationError: naming the key and the remedy.
    """
    if ahead.within_responses and not (ahead.batches and rollout.draws_behind):
        raise ConfigurationError(
            "model.ahead.within_responses: weights can change within a response only if servers "
            "sample while the policy trains. Set model.ahead.batches above 0 and model.rollout to "
            "VLLMRollout with Servers, or set within_responses to false"
        )
    if not ahead.batches:
        return
    if not isinstance(data, TaskDataModule):
        raise ConfigurationError(
            f"model.ahead.batches: sampling {ahead.batches} batches ahead needs the next "
            f"questions, which {type(data).__name__} does not give: use "
            "scsdpo.data.TaskDataModule, or set model.ahead.batches to 0"
        )
    if overfits:
        raise ConfigurationError(
            "trainer.overfit_batches: repeats the same batches, which cannot be sampled ahead: set "
            "model.ahead.batches to 0, or leave trainer.overfit_batches out"
        )
    if isinstance(importance, NoImportance):
        rank_zero_info(
            f"model.ahead.batches: {ahead.batches}, so older weights sample some tokens, and "
            "model.importance is NoImportance, which does not correct for that: set it to "
            "SamplerImportance (docs/ahead.md)"
        )
    data.ahead = ahead.batches
