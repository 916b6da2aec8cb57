"""The data that flows between the strategies: frozen, keyword-only, never annotated in place.

Shape suffixes: Q questions in the batch, G rollouts a question, L the longest response of the batch
(responses are padded on the right), V vocabulary, D hidden size, n tokens in a chunk.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor

from scsdpo.prompt import Message, Prompt, Tool, Verdict, stable_hash
from scsdpo.seeds import Seed, resolved

__all__ = [
    "JudgedBatch",
    "Lesson",
    "Message",
    "Outcomes",
    "Prompt",
    "Rollouts",
    "Sampling",
    "TeacherContexts",
    "Tool",
    "Verdict",
    "stable_hash",
]


class _ToDevice:
    """Mixin: `.to(device)` for a frozen dataclass of tensors (Lightning moves batches with it)."""

    __slots__ = ()

    def to(self, device: torch.device | str) -> Self:
        moved = {
            f.name: value.to(device)
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Sampling:
    """How responses are drawn: from softmax(logits / temperature), cut to min-p, top-k, top-p.

    The cuts come in this order, and each but min-p counts mass within what the ones before left.

    Args:
        n: responses per prompt, G.
        max_new_tokens: cap on a response's length in tokens, end-of-sequence included.
        temperature: in (0, 100], above it is noise; the trainer's distributions use the same one.
        top_p: keep the smallest set of most likely tokens whose mass reaches `top_p`; 1 keeps all.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        min_p: keep tokens at least `min_p` times as likely as the most likely one; 0 keeps all.
        stop: strings that end a response. The token that completes one is the response's last;
            ids and text keep it. The ends of a sequence have no text.
        seed: the draw of response i to a prompt depends on (seed, prompt key, i) and on nothing
            else: not on the batch, its order, or the device count. `auto`: in training the run's
            seed (`seed_everything`), in validation 0, so that runs stay comparable in pairs.

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
                raise ValueError(
                    f"`Sampling({name}=...)` must be {rule}, got {getattr(self, name)}"
                )

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out, so that what is drawn from is not the policy."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def stops(self, prompt: Prompt) -> tuple[str, ...]:
        """The strings that end a response to `prompt`."""
        return (*self.stop, *prompt.stop)

    def seeded(self, auto: int) -> "Sampling":
        """The same sampling with `auto` in the place of a seed that was left open."""
        return replace(self, seed=auto) if self.seed == "auto" else self

    def at(self, step: int) -> "Sampling":
        """The same sampling with a seed of its own for `step`, so that steps draw afresh."""
        return replace(self, seed=stable_hash(resolved(self.seed), step))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollouts(_ToDevice):
    """Q x G responses, token ids straight from the sampler."""

    prompts: tuple[Prompt, ...]
    """The Q questions."""
    ids: Tensor
    """[Q, G, L] int64: sampled tokens, end-of-sequence included, then padding."""
    mask: Tensor
    """[Q, G, L] bool: True at sampled tokens. A response may be empty (no True)."""
    sampling_logprobs: Tensor
    """[Q, G, L] float32, nats: under the distribution drawn from (temperature and cuts)."""
    policy_logprobs: Tensor
    """[Q, G, L] float32, nats: under softmax(logits / temperature), nothing cut; nan: unknown."""
    finished: Tensor
    """[Q, G] bool: ended by an end of sequence or a stop string, not by the length cap."""
    texts: tuple[tuple[str, ...], ...]
    """[Q][G] as `Chat.decode` gives them; for verifiers and demonstrations only."""
    temperature: float
    """The sampling temperature."""
    version: str = ""
    """Label of the weights that were sampled from: a `rollout.weights.digest`, or a `Versions`'."""

    @property
    def lengths(self) -> Tensor:
        """[Q, G] int64: tokens in each response."""
        return self.mask.sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcomes(_ToDevice):
    """The verdicts on a batch of rollouts."""

    verdicts: tuple[tuple[Verdict, ...], ...]
    """[Q][G]."""
    rewards: Tensor
    """[Q, G] float32."""
    successes: Tensor
    """[Q, G] bool: reward >= the success threshold."""
    keys: tuple[str, ...] = ()
    """[Q] `Prompt.key` of each question, for strategies that remember questions."""

    def question_keys(self) -> tuple[str, ...]:
        """`keys`, which must be there."""
        assert len(self.keys) == len(self.rewards), "these outcomes do not name their questions"
        return self.keys

    @property
    def pass_rates(self) -> Tensor:
        """[Q] float64: share of successes among a question's rollouts, p = k / G."""
        return self.successes.double().mean(-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TeacherContexts:
    """What the teacher reads before each response."""

    ids: tuple[tuple[tuple[int, ...], ...], ...]
    """[Q][G] rendered teacher prompts; empty: the rollout has no teacher."""

    @property
    def available(self) -> Tensor:
        """[Q, G] bool: the rollout has a teacher prompt."""
        return torch.tensor([[bool(row) for row in group] for group in self.ids], dtype=torch.bool)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lesson:
    """What of a batch the loss looks at."""

    active: Tensor
    """[Q, G] bool: rollouts that may get credit; the others are not run."""
    reads_teacher: Tensor
    """[Q, G] bool: rollouts whose credit reads the teacher."""
    teacher: TeacherContexts
    """What it reads before each response."""
    objective_name: str
    """What the advantage calls its objective."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JudgedBatch:
    """One rank's share of a batch of questions, answered and judged."""

    split: Literal["train", "val", "test"]
    rollouts: Rollouts
    outcomes: Outcomes
    weights: Tensor
    """[Q, G] float64: `Weighting.weigh` in training; ones elsewhere."""
    lesson: Lesson | None = None
    """How it is learned from; None in validation and test."""
