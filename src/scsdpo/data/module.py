"""The data module, which makes batches of rendered prompts from sources."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import gcd
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch.utils.data import ConcatDataset, DataLoader, Subset

from scsdpo.data._base import Source, source_key
from scsdpo.data.golds import within_reach
from scsdpo.data.loader import (
    EpochSampler,
    EvaluationLoader,
    EvaluationSampler,
    QuestionLoader,
    as_it_is,
)
from scsdpo.data.rendered import Rendered
from scsdpo.data.shuffled import FILTER_AHEAD, Mixture, PromptBatch, ShuffledSource
from scsdpo.data.startup import check_golds, check_start, first_keys, warn_shared, warn_twice
from scsdpo.errors import ConfigurationError, blamed_on
from scsdpo.policy.chat import Chat
from scsdpo.seeds import Seed, resolved
from scsdpo.types import Prompt, stable_hash

_SHARES = 10_000
"""Weights are rounded to multiples of 1 / this of their sum."""


class TaskDataModule(LightningDataModule):
    """Batches of questions, each a `tuple[Prompt, ...]`, for training and validation.

    Each pass over a training source asks each question once, in a new order. A run that is resumed
    from a checkpoint, also within an epoch, continues with the next question. Test and predict use
    `val`.

    Args:
        train: source or sources of training questions; several are mixed.
        val: source or sources of validation questions; `[]`: no validation. Each of several
            sources has its own metrics, under its name.
        questions_per_batch: Q, over all ranks; must be a multiple of their number.
        val_questions_per_batch: Q of validation; the last batch may be smaller.
        max_prompt_tokens: longer prompts are dropped, counted and logged.
        seed: seed of the order of training questions; `auto`: the run's (`seed_everything`).
        num_workers: processes that render prompts in advance; 0: the training process does.
        train_weights: relative share of each source in `train` in every stretch of batches; `[]`:
            its number of questions, so that an epoch is a pass over all.

    Raises:
        ValueError: if a number is too small, weights do not fit the sources, two validation sources
            have one name, or there are fewer training questions than a batch.
    """

    def __init__(
        self,
        train: Source | list[Source],
        val: Source | list[Source],
        *,
        questions_per_batch: int = 32,
        val_questions_per_batch: int = 32,
        max_prompt_tokens: int = 2048,
        seed: Seed = "auto",
        num_workers: int = 0,
        train_weights: Sequence[float] = (),
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("questions_per_batch", questions_per_batch, 1),
            ("val_questions_per_batch", val_questions_per_batch, 1),
            ("max_prompt_tokens", max_prompt_tokens, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"`TaskDataModule({name}=...)` must be >= {least}, got {value}")
        self.train_sources = [train] if isinstance(train, Source) else train
        self.val_sources = [val] if isinstance(val, Source) else val
        if not self.train_sources:
            raise ValueError("`TaskDataModule(train=...)` must hold a source, got none")
        if train_weights and len(train_weights) != len(self.train_sources):
            raise ValueError(
                "`TaskDataModule(train_weights=...)` must hold one weight for each of the "
                f"{len(self.train_sources)} sources in `train`, got {list(train_weights)}"
            )
        if any(not 0 < weight < float("inf") for weight in train_weights):
            raise ValueError(
                "`TaskDataModule(train_weights=...)` must be > 0 and finite, got "
                f"{list(train_weights)}; remove an unwanted source from `train`"
            )
        for name, times in Counter(source.name for source in self.val_sources).items():
            if times > 1:
                raise ValueError(
                    f"`TaskDataModule(val=...)`: {times} sources are called {name!r}; give one "
                    "another `name`, under which its metrics are logged"
                )
        self.train_weights = tuple(train_weights)
        self.questions_per_batch = questions_per_batch
        self.val_questions_per_batch = val_questions_per_batch
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.num_workers = num_workers
        self.trained_on = 0
        """Number of validation questions that are also training questions; set by `setup`."""
        self.answered: Collection[tuple[str, int]] = ()
        """Questions that prediction skips, as (key, number of the copy)."""
        self.ahead = 0
        """Number of future batches of training questions that `upcoming` shows."""
        self.upcoming: tuple[tuple[Prompt, ...], ...] = ()
        """The batches that follow the last training batch, in order."""

    def check_ranks(self, ranks: int) -> None:
        """Check that every rank gets as many questions of a batch.

        Raises:
            ConfigurationError: if not.
        """
        for name in ("questions_per_batch", "val_questions_per_batch"):
            if (questions := getattr(self, name)) % ranks:
                below, above = questions // ranks * ranks, -(-questions // ranks) * ranks
                near = f"{below} or {above}" if below else f"{above}"
                raise ConfigurationError(
                    f"data.{name}: must be a multiple of the {ranks} ranks, got {questions}: set "
                    f"it to {near}"
                )

    def setup(self, stage: str) -> None:
        """Lightning's hook: `set_up_for` the Trainer's module."""
        self.set_up_for(cast(Any, self.trainer).lightning_module, stage)

    def set_up_for(self, module: Any, stage: str = "fit") -> None:
        """Open the sources and drop prompts that are longer than `max_prompt_tokens`.

        It needs no Trainer: afterwards `train_dataloader` and `val_dataloader` give batches.

        Args:
            module: the `PolicyOptimizer` that learns from the questions.
            stage: `fit`; any other stage opens the validation questions only.

        Raises:
            ConfigurationError: if the data cannot be used.
        """
        with blamed_on("data"):
            self._setup(module, stage)

    def _setup(self, module: Any, stage: str) -> None:
        # Rendering a batch takes milliseconds and a step takes seconds.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        chat = self.chat = module.policy.chat
        if stage == "fit":
            check_start(module, self.train_sources)
            self.train_set = Mixture(
                [self._shuffled(number, chat) for number in range(len(self.train_sources))]
            )
            if len(self.train_set) < self.questions_per_batch:
                raise ConfigurationError(
                    f"data.questions_per_batch: must be at most {len(self.train_set)}, the number "
                    f"of training questions, got {self.questions_per_batch}"
                )
            module.weightings.check_questions(self.train_set.question_keys())
        self.val_set = self._in_order(self.val_sources, chat) if self.val_sources else None
        asked: list[str] = []
        if self.val_set:
            parts = cast(list[Rendered], self.val_set.datasets)
            asked = [part.key(index) for part in parts for index in range(len(part))]
            warn_twice("data.val", asked, "counts in every figure")
        if stage == "fit":
            learned = first_keys(self.train_sources, streams=bool(asked))
            warn_twice("data.train", learned, "is asked in every pass")
            self.trained_on = warn_shared(learned, asked)

    def _shuffled(self, number: int, chat: Chat) -> ShuffledSource:
        source, sources = self.train_sources[number], len(self.train_sources)
        seed = stable_hash(resolved(self.seed), number)
        with blamed_on(source_key("train", number, sources)):
            return ShuffledSource.of(source, chat, self.max_prompt_tokens, seed)

    def _in_order(
        self, sources: Sequence[Source], chat: Chat, most: float = float("inf")
    ) -> ConcatDataset[Prompt]:
        """The first questions of each source. Copies of a question are numbered; with several
        sources, categories begin with the source's name.
        """
        parts = []
        before: Counter[str] = Counter()
        split = "train" if sources is self.train_sources else "val"
        for number, source in enumerate(sources):
            with blamed_on(source_key(split, number, len(sources))):
                check_golds(source)
                head = []
                for prompt in _head(source, most, named=len(sources) > 1):
                    head.append(replace(prompt, copy=before[prompt.key]))
                    before[prompt.key] += 1
                parts.append(Rendered(head, source.name, chat, self.max_prompt_tokens))
        return ConcatDataset(parts)

    def some(self, count: int, name: str) -> list[Prompt]:
        """Training questions in a random order, equally many of each source.

        Args:
            count: at most so many.
            name: of the purpose; it seeds the order.
        """
        share = -(-count // len(self.train_sources))
        chosen: list[Prompt] = []
        for number, source in enumerate(self.train_sources):
            chosen += islice(source.shuffled(stable_hash(name, number)), share)
        return chosen[:count]

    def train_dataloader(self) -> DataLoader[Prompt]:
        """Batches in shuffled order with a saved position; in order for `overfit_batches`."""
        if self.trainer is not None and cast(Any, self.trainer).overfit_batches:
            first = self._in_order(self.train_sources, self.chat, most=FILTER_AHEAD)
            return self._loader(first, self.questions_per_batch)
        ranks, rank = self._ranks()
        sampler = EpochSampler(
            self.train_set,
            self._whole_weights(),
            batch_size=self.questions_per_batch,
            num_replicas=ranks,
            rank=rank,
        )
        sampler.ahead = self.ahead
        return QuestionLoader(
            self.train_set,
            batch_size=self.questions_per_batch // ranks,
            sampler=sampler,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
        )

    def _whole_weights(self) -> list[int]:
        """The weights as integers in lowest terms: the schedule's period is their sum."""
        total = sum(self.train_weights)
        weights = [max(1, round(_SHARES * weight / total)) for weight in self.train_weights]
        weights = weights or [len(source) for source in self.train_set.sources]
        return [weight // gcd(*weights) for weight in weights]

    def val_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """Batches in order, each question once."""
        return self._loader(self.val_set, self.val_questions_per_batch) if self.val_set else []

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader[Prompt] | list[DataLoader[Prompt]]:
        """Batches of the validation questions that are not `answered`, without empty batches."""
        if not self.val_set:
            return []
        asked = self.val_set
        if self.answered:
            places = [
                place
                for place, prompt in enumerate(self.val_prompts())
                if (prompt.key, prompt.copy) not in self.answered
            ]
            if not places:
                return []
            asked = ConcatDataset([Subset(self.val_set, places)])
        return self._loader(asked, self.val_questions_per_batch, kind=DataLoader)

    def val_prompts(self) -> Iterator[Prompt]:
        """The validation questions in order, rendered; after `setup`."""
        parts = cast(list[Rendered], self.val_set.datasets) if self.val_set else []
        return (part[place] for part in parts for place in range(len(part)))

    def _loader(
        self,
        questions: ConcatDataset[Prompt],
        batch_size: int,
        kind: type[DataLoader[Prompt]] = EvaluationLoader,
    ) -> DataLoader[Prompt]:
        ranks, rank = self._ranks()
        # Lightning replaces a sampler that is not distributed on several ranks; on one rank it
        # expects none for an unshuffled loader.
        many = ranks > 1
        sampler = EvaluationSampler(questions, num_replicas=ranks, rank=rank) if many else None
        return (kind if many else DataLoader)(
            questions,
            batch_size=batch_size // ranks,
            sampler=sampler,
            collate_fn=PromptBatch,
            num_workers=self.num_workers,
        )

    def transfer_batch_to_device(
        self, batch: PromptBatch, device: torch.device, dataloader_idx: int
    ) -> tuple[Prompt, ...]:
        """The questions of the batch; they hold no tensors."""
        if batch.draws:
            self.upcoming = tuple(each.prompts for each in batch.upcoming)
        return batch.prompts

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and the index of this one."""
        if self.trainer is None:
            return 1, 0
        trainer = cast(Any, self.trainer)
        self.check_ranks(trainer.world_size)
        return trainer.world_size, trainer.global_rank


def _head(source: Source, most: float, *, named: bool) -> list[Prompt]:
    """The first prompts of a source: at most `most`, and at most its length."""
    prompts = islice(within_reach(source, source.read()), int(min(len(source), most)))
    return [_named(prompt, source.name) if named else prompt for prompt in prompts]


def _named(prompt: Prompt, name: str) -> Prompt:
    parts = [name, *([prompt.category] if prompt.category not in ("", name) else [])]
    return replace(prompt, category="/".join(parts))
