"""The data that flows between the strategies: frozen dataclasses, never changed in place.

Shape suffixes: Q questions in the batch, G rollouts a question, L the longest response of the batch
(responses are padded on the right), V vocabulary, D hidden size, n tokens in a chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from scsdpo.prompt import Episode, Message, Part, Prompt, ToolSchema, Verdict, stable_hash
from scsdpo.seeds import Seed, resolved

__all__ = [
    "Episode",
    "Judged",
    "Message",
    "Moment",
    "Part",
    "Prompt",
    "Responses",
    "Sampling",
    "TeacherContexts",
    "ToolSchema",
    "Verdict",
    "stable_hash",
]


class _ToDevice:
    """Mixin: `.to(device)` for a frozen dataclass of tensors. Lightning moves batches with it."""

    __slots__ = ()

    def to(self, device: torch.device | str) -> Self:
        moved = {
            f.name: value.to(device)
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor | _ToDevice)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Sampling:
    """How responses are drawn: from softmax(logits / temperature), cut by min-p, top-k, top-p.

    The cuts are applied in this order. Top-p counts the mass of the tokens that the cuts before it
    have left.

    Args:
        n: responses per prompt, G.
        max_new_tokens: cap on a response's length in tokens, end-of-sequence included. In an
            episode it is a cap on all tokens behind the prompt, the world's too.
        temperature: in (0, 100]; the trainer's distributions use the same one.
        top_p: keep the smallest set of most likely tokens whose mass reaches `top_p`; 1 keeps all.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        min_p: keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all.
        stop: strings that end a response. The token that completes one is the last token of the
            response, and is in its ids and its text. End-of-sequence tokens have no text.
        seed: the draw of response i to a prompt depends on (seed, prompt key, i) alone, and not on
            the batch, its order, or the number of devices. `auto`: in training the run's seed
            (`seed_everything`), in validation 0, so that runs can be compared in pairs.

    Raises:
        ValueError: if an argument is outside its range.
    """

    n: int = 8
    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: Seed = "auto"

    def __post_init__(self) -> None:
        checks = {
            "n": (self.n >= 1, ">= 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, ">= 1"),
            "temperature": (
                0 < self.temperature <= 100,
                "> 0 and <= 100; for nearly greedy decoding write 0.01",
            ),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, ">= 0; 0 keeps every token"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]; 0 keeps every token"),
            "stop": ("" not in self.stop, "free of empty strings"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                limit, *hint = rule.partition("; ")
                raise ValueError(
                    f"`Sampling({name}=...)` must be {limit}, got {getattr(self, name)}"
                    f"{''.join(hint)}"
                )

    @property
    def cuts(self) -> bool:
        """True if a cut changes the distribution, so that it is not the policy's."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def stops(self, prompt: Prompt) -> tuple[str, ...]:
        """The strings that end a response to `prompt`."""
        return (*self.stop, *prompt.stop)

    def seeded(self, auto: int) -> "Sampling":
        """A copy with the seed `auto`, if the seed was left "auto"."""
        return replace(self, seed=auto) if self.seed == "auto" else self

    def at(self, step: int) -> "Sampling":
        """A copy with a seed for `step`, so that each step draws new responses."""
        return replace(self, seed=stable_hash(resolved(self.seed), step))


class Moment(NamedTuple):
    """A moment of training."""

    step: int
    """Optimizer steps taken until then."""
    batch: int
    """Batches until then that took at least one optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Responses(_ToDevice):
    """Q x G responses, as the token ids that stand after their prompts.

    A token is `present` if it is no padding, and `sampled` if the policy drew it. Tokens that are
    present but not sampled, such as a tool's answer, are attended to and never learned from:
    losses, log-probs, entropies, denominators and lengths are of sampled tokens alone.
    """

    prompts: tuple[Prompt, ...]
    """The Q questions."""
    ids: Tensor
    """[Q, G, L] int64: the sampler's own ids, never tokenised again; then padding."""
    present: Tensor
    """[Q, G, L] bool: a token and no padding; the first entries of L."""
    sampled: Tensor
    """[Q, G, L] bool: the policy drew this token; end-of-sequence tokens count. May be empty."""
    sampling_logprobs: Tensor
    """[Q, G, L] float32, nats: under the distribution that was drawn from, with all cuts."""
    policy_logprobs: Tensor
    """[Q, G, L] float32, nats: under softmax(logits / temperature) without cuts; nan: unknown."""
    ended: Tensor
    """[Q, G] bool: ended by an end-of-sequence token or a stop string, not by the length cap."""
    texts: tuple[tuple[str, ...], ...]
    """[Q][G] text from `Chat.decode`, or transcript of an episode; for verifiers and
    demonstrations only."""
    temperature: float
    """The sampling temperature."""
    turns: Tensor
    """[Q, G, L] int32: number, from 0, of the turn that a token belongs to. The world's answer to a
    turn has the turn's number."""
    labels: tuple[str, ...]
    """Labels of the weights that were sampled from, oldest first."""
    versions: Tensor
    """[Q, G, L] int32: index into `labels` of the weights that drew the token."""
    experts: Tensor
    """[Q, G, L, layers, k] int16: experts that the sampler chose at the position that predicts the
    token; layers is 0 if it reports none."""
    episodes: tuple[tuple[Episode, ...], ...]
    """[Q][G] turns of the episode; without parts if the response is the only turn."""
    drawn_at: tuple[Moment, ...] = ()
    """For each of `labels`, the moment when they were the policy's weights; empty: now."""

    @classmethod
    def of_one_turn(
        cls,
        *,
        prompts: tuple[Prompt, ...],
        ids: Tensor,
        sampled: Tensor,
        sampling_logprobs: Tensor,
        policy_logprobs: Tensor,
        ended: Tensor,
        texts: tuple[tuple[str, ...], ...],
        temperature: float,
        version: str = "",
    ) -> "Responses":
        """Responses of one turn from one set of weights, so that all present tokens are sampled."""
        zeros = torch.zeros_like(ids, dtype=torch.int32)
        return cls(
            prompts=prompts,
            ids=ids,
            present=sampled,
            sampled=sampled,
            sampling_logprobs=sampling_logprobs,
            policy_logprobs=policy_logprobs,
            ended=ended,
            texts=texts,
            temperature=temperature,
            turns=zeros,
            labels=(version,),
            versions=zeros,
            experts=zeros.new_zeros((*ids.shape, 0, 0), dtype=torch.int16),
            episodes=tuple(tuple(Episode() for _ in group) for group in texts),
        )

    @property
    def lengths(self) -> Tensor:
        """[Q, G] int64: number of sampled tokens."""
        return self.sampled.sum(-1)

    @property
    def extents(self) -> Tensor:
        """[Q, G] int64: number of tokens after the prompt, sampled or not."""
        return self.present.sum(-1)

    @property
    def version(self) -> str:
        """Label of the newest weights that were sampled from."""
        return self.labels[-1]

    def version_of(self, q: int, g: int) -> str:
        """Label of the newest weights that a response was sampled from."""
        drew = self.versions[q, g][self.sampled[q, g]].tolist()
        return self.labels[max(drew)] if drew else self.version

    def ages(self, now: Moment) -> Tensor:
        """[Q, G, L, 2] int32: ages of tokens in optimizer steps, and in batches with such a step.

        An age counts from the weights that drew the token to those of `now`; it is 0 for tokens
        that were not sampled.
        """
        if not self.drawn_at:
            return self.versions.new_zeros((*self.versions.shape, 2))
        old = [[now.step - at.step, now.batch - at.batch] for at in self.drawn_at]
        table = self.versions.new_tensor(old)
        return table[self.versions.long()] * self.sampled[..., None]

    def __getitem__(self, questions: Sequence[int]) -> "Responses":
        """Some questions, in the order given."""
        index = list(questions)
        return replace(
            self,
            prompts=tuple(self.prompts[q] for q in index),
            texts=tuple(self.texts[q] for q in index),
            episodes=tuple(self.episodes[q] for q in index),
            **{name: table[index] for name, table in _tensors(self).items()},
        )

    def cat(self, others: "Sequence[Responses]") -> "Responses":
        """The questions of this batch, then those of others, on this batch's device.

        Tables are as wide as the widest one of a batch that has questions.
        """
        every = [self, *(other.to(self.ids.device) for other in others)]
        known = {
            label: at
            for each in every
            for label, at in zip(each.labels, each.drawn_at, strict=False)
        }
        newest = max(known.values(), default=Moment(0, 0))
        labels = tuple(dict.fromkeys(label for each in every for label in each.labels))
        labels = tuple(sorted(labels, key=lambda label: known.get(label, newest)))
        width = max((each.ids.shape[2] for each in every if each.prompts), default=0)

        def joined(name: str) -> Tensor:
            tables = [_tensors(each)[name] for each in every]
            if name == "versions":
                numbers = [[labels.index(label) for label in each.labels] for each in every]
                tables = [
                    torch.tensor(number, dtype=t.dtype, device=t.device)[t.long()]
                    for number, t in zip(numbers, tables, strict=True)
                ]
            if tables[0].ndim > 2:
                tables = [_wide(table, width) for table in tables]
            return torch.cat(tables)

        return replace(
            self,
            prompts=tuple(prompt for each in every for prompt in each.prompts),
            texts=tuple(texts for each in every for texts in each.texts),
            episodes=tuple(group for each in every for group in each.episodes),
            labels=labels,
            drawn_at=tuple(known.get(label, newest) for label in labels) if known else (),
            **dict[str, Any]({name: joined(name) for name in _tensors(self)}),
        )


def _wide(table: Tensor, width: int) -> Tensor:
    """[Q, G, L, ...] -> [Q, G, width, ...], cut or filled with zeros at the end of L."""
    table = table[:, :, :width]
    missing = table.new_zeros((*table.shape[:2], width - table.shape[2], *table.shape[3:]))
    return torch.cat([table, missing], dim=2)


def _tensors(batch: Responses) -> dict[str, Any]:
    """Field -> tensor."""
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged(_ToDevice):
    """A batch of responses with their verdicts, which strategies, selections and callbacks read.

    In a run of several ranks it is one rank's share.
    """

    responses: Responses
    verdicts: tuple[tuple[Verdict, ...], ...]
    """[Q][G]."""
    rewards: Tensor
    """[Q, G] float32."""
    successes: Tensor
    """[Q, G] bool: reward >= the success threshold."""
    split: Literal["train", "val", "test"] = "train"
    """The purpose of the responses: training, validation or test."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The Q questions."""
        return self.responses.prompts

    @property
    def keys(self) -> tuple[str, ...]:
        """[Q] `Prompt.key` of each question, under which strategies remember it."""
        return tuple(prompt.key for prompt in self.responses.prompts)

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """[Q][G] decoded responses."""
        return self.responses.texts

    @property
    def lengths(self) -> Tensor:
        """[Q, G] int64: number of sampled tokens of each response."""
        return self.responses.lengths

    @property
    def ended(self) -> Tensor:
        """[Q, G] bool: the response ended by itself, not by the length cap."""
        return self.responses.ended

    @property
    def turn_rewards(self) -> Tensor:
        """[Q, G, T] float64: reward of each turn, T the most turns of a response; nan: no turn.

        The last turn's reward has the verdict's reward less `Verdict.earned`, the part that earlier
        turns got.
        """
        responses = self.responses
        counts = torch.where(responses.present, responses.turns + 1, 1).amax(-1).tolist()
        most = max((count for group in counts for count in group), default=1)
        table = []
        for q, group in enumerate(counts):
            for g, count in enumerate(group):
                verdict, row = self.verdicts[q][g], [0.0] * count
                for turn, earned in enumerate(responses.episodes[q][g].rewards):
                    row[min(turn, count - 1)] += earned
                row[-1] += verdict.reward - verdict.earned
                table.append(row + [math.nan] * (most - count))
        rewards = torch.tensor(table, dtype=torch.float64, device=self.rewards.device)
        return rewards.view(*self.rewards.shape, most)

    @property
    def pass_rates(self) -> Tensor:
        """[Q] float64: share of successes among a question's responses, p = k / G."""
        return self.successes.double().mean(-1)

    def __getitem__(self, questions: Sequence[int]) -> "Judged":
        """Some questions, in the order given."""
        index = list(questions)
        return replace(
            self,
            responses=self.responses[index],
            verdicts=tuple(self.verdicts[q] for q in index),
            rewards=self.rewards[index],
            successes=self.successes[index],
        )

    def cat(self, others: "Sequence[Judged]") -> "Judged":
        """The questions of this batch, then those of others, on this batch's device."""
        device = self.rewards.device
        return replace(
            self,
            responses=self.responses.cat([other.responses for other in others]),
            verdicts=tuple(row for each in (self, *others) for row in each.verdicts),
            rewards=torch.cat([self.rewards, *(each.rewards.to(device) for each in others)]),
            successes=torch.cat([self.successes, *(each.successes.to(device) for each in others)]),
        )

    def alone(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> "Judged":
        """Some responses, each as the only one to its question, [N, 1, L].

        Args:
            rows: numbers q * G + g of the responses, in the order wanted.
            prompts: the question of each.
        """
        group, index = self.rewards.shape[1], list(rows)
        places = [divmod(row, group) for row in index]
        responses = self.responses
        return replace(
            self,
            responses=replace(
                responses,
                prompts=tuple(prompts),
                texts=tuple((responses.texts[q][g],) for q, g in places),
                episodes=tuple((responses.episodes[q][g],) for q, g in places),
                **{n: t.flatten(0, 1)[index][:, None] for n, t in _tensors(responses).items()},
            ),
            verdicts=tuple((self.verdicts[q][g],) for q, g in places),
            rewards=self.rewards.flatten()[index][:, None],
            successes=self.successes.flatten()[index][:, None],
        )

    def best_first(self, question: int) -> list[int]:
        """Numbers of a question's successes by falling reward, equal ones in the group's order."""
        rewards = self.rewards[question].tolist()
        good = self.successes[question].nonzero()[:, 0].tolist()
        return sorted(good, key=lambda g: -rewards[g])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherContexts:
    """The prompts that a teacher reads before each response."""

    ids: tuple[tuple[tuple[int, ...], ...], ...]
    """[Q][G] token ids of the rendered prompt; empty: the rollout has no teacher."""

    @property
    def available(self) -> Tensor:
        """[Q, G] bool: the rollout has a teacher prompt."""
        return torch.tensor([[bool(row) for row in group] for group in self.ids], dtype=torch.bool)
