"""Teachers by their weights: the student's, the first policy's, an average, or another model's."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from scsdpo.errors import MISTAKES, ConfigurationError, blamed_on, first_line
from scsdpo.loss import TokenLogits
from scsdpo.policy import CausalLM, OtherModel, Stored, Weights
from scsdpo.teacher._base import Teacher
from scsdpo.teacher.context import Context, PlainPrompt, SiblingDemonstration


class Live(Teacher):
    """The student's present weights. T = pi_theta(. | x, f, y<t), detached

    Known to diverge in long runs (arXiv:2601.20802: 36.1 against EMA's 49.3 on LiveCodeBench).

    Args:
        context: the privileged information.
    """

    def __init__(self, context: Context = SiblingDemonstration()) -> None:
        super().__init__(context)

    def weights_to_run(self, policy: CausalLM) -> tuple[Weights, ...]:
        return (policy.adapter.current(),)


class _OwnWeights(Teacher):
    """A teacher with a set of weights of its own, which `configure` makes once."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.weights: Weights | None = None

    @abstractmethod
    def make_weights(self, policy: CausalLM, slot: str) -> Weights:
        """The teacher's own weights; arguments as in `configure`."""

    def configure(self, policy: CausalLM, slot: str) -> None:
        if self.weights is None:
            self.weights = self.make_weights(policy, slot)

    @property
    def configured(self) -> Weights:
        """`weights`.

        Raises:
            RuntimeError: if `configure` was not called.
        """
        if self.weights is None:
            raise RuntimeError(f"{type(self).__name__} has no weights: call `configure` first")
        return self.weights

    def weights_to_run(self, policy: CausalLM) -> tuple[Weights, ...]:
        return (self.configured,)


class _FirstPolicy(_OwnWeights):
    """A teacher that keeps the weights of the policy before any training."""

    def __init__(self, context: Context, stored: Stored) -> None:
        super().__init__(context)
        self.stored = stored

    def share(self, other: Teacher) -> None:
        if isinstance(other, _FirstPolicy) and other.stored == self.stored:
            self.weights = other.weights

    def make_weights(self, policy: CausalLM, slot: str) -> Weights:
        return policy.adapter.initial(policy.wrapped, self.stored)

    @property
    def can_begin_anew(self) -> bool:
        return False


class Frozen(_FirstPolicy):
    """The policy before any training. theta' = theta_0

    A full fine-tune keeps a copy. The copy is not in checkpoints, since the policy's name finds it
    again. Under LoRA it is the base model without adapters, and costs nothing. With `PlainPrompt`
    it is the reference of a KL anchor.

    Args:
        context: the privileged information.
        stored: how a full fine-tune's copy is kept (`Stored`); by default as the student's.
    """

    def __init__(
        self, context: Context = SiblingDemonstration(), stored: Stored = Stored()
    ) -> None:
        super().__init__(context, stored)


class External(_OwnWeights):
    """Another model of the same vocabulary, frozen. theta' = phi

    It may have any size and architecture. It reads the policy's token ids, in the policy's chat
    template. Its vocabulary must be the policy's, id by id; rows of its head beyond the policy's
    (padding) are left out of T. It is loaded from its folder at each start, and is not in
    checkpoints. Two slots with the same model share one copy of its weights.

    Args:
        name_or_path: hub name or local folder; `tiny` and `tiny-tools` ship with the package.
        context: the privileged information; by default none, since another model knows more itself.
        dtype: of its weights, in memory and in forwards. `auto`: bfloat16 on GPU, float32 on CPU.
        on_host: keep the weights in the host's memory, pinned where there is a GPU. In each forward
            they are copied to the device layer by layer, or with shards FSDP unit by unit.
        attn_implementation: as in transformers; prefixes are shared between rollouts with `sdpa`.

    Raises:
        ValueError: if there is no such model, or it cannot be used; the message says why.

    Source:
        On-policy distillation, arXiv:2306.13649.
    """

    def __init__(
        self,
        name_or_path: str,
        context: Context = PlainPrompt(),
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        on_host: bool = False,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__(context)
        try:
            self.source = OtherModel(
                name_or_path=name_or_path,
                dtype=dtype,
                on_host=on_host,
                attn_implementation=attn_implementation,
            )
        except ValueError as error:
            raise ValueError(f"`External(name_or_path={name_or_path!r})`: {error}") from error

    def check(self, policy: CausalLM) -> None:
        with self._named():
            self.source.check_vocabulary(policy.chat)
            self.source.known()

    def share(self, other: Teacher) -> None:
        if isinstance(other, External) and other.source == self.source:
            self.weights = other.weights

    def make_weights(self, policy: CausalLM, slot: str) -> Weights:
        with blamed_on(f"model.{slot}"), self._named():
            return policy.adapter.other(policy.wrapped, self.source)

    @property
    def can_begin_anew(self) -> bool:
        return False

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the model in errors that are raised inside the block."""
        try:
            yield
        except ConfigurationError:
            raise
        except MISTAKES as error:
            raise ValueError(
                f"External({self.source.name_or_path}): {first_line(error)}"
            ) from error


class _Moving(_OwnWeights):
    """A teacher whose weights start as a copy of the student's and follow them."""

    def __init__(self, context: Context, rate: float, stored: Stored) -> None:
        super().__init__(context)
        if not 0 <= rate <= 1:
            raise ValueError(f"`{type(self).__name__}(rate=...)` must be in [0, 1], got {rate}")
        self.rate, self.stored = rate, stored

    def make_weights(self, policy: CausalLM, slot: str) -> Weights:
        return policy.adapter.moving(policy.wrapped, slot, self.stored)

    def begin_anew(self, policy: CausalLM) -> None:
        self.configured.follow(policy.wrapped, 1.0)

    def after_step(self, policy: CausalLM) -> None:
        self.configured.follow(policy.wrapped, self.rate)


class EMA(_Moving):
    """Exponential moving average. theta' <- (1 - rate) theta' + rate theta, once per step taken

    Starts as a copy of the student; after n steps towards a constant theta the remaining
    distance is (1 - rate)^n. Under LoRA the average is over the factors, which is not the average
    of their product (`Lora`).

    Args:
        rate: in [0, 1]; 0 is `Frozen`, 1 is `Live`.
        context: the privileged information.
        stored: how a full fine-tune's copy is kept (`Stored`); by default as the student's.

    Raises:
        ValueError: if `rate` is outside [0, 1].

    Source:
        arXiv:2601.20802: rate .05 (.01 with rich feedback).
    """

    def __init__(
        self,
        rate: float = 0.05,
        context: Context = SiblingDemonstration(),
        stored: Stored = Stored(),
    ) -> None:
        super().__init__(context, rate, stored)


class Restart(_Moving):
    """An average that moves rarely. theta' <- (1 - rate) theta' + rate theta, once in `every` steps

    Between moves the target does not drift with the student. rate = 1 is a hard copy; every = 1 is
    `EMA`. Under LoRA the average is over the factors.

    Args:
        every: optimizer steps taken between moves. Must be >= 1.
        rate: share of the student at a move, in [0, 1].
        context: the privileged information.
        stored: how a full fine-tune's copy is kept (`Stored`); by default as the student's.

    Raises:
        ValueError: if an argument is outside its range.

    Source:
        StableSDPO, arXiv:2607.01763: every 10 steps, rate 1 or .4.
    """

    def __init__(
        self,
        every: int = 10,
        rate: float = 1.0,
        context: Context = SiblingDemonstration(),
        stored: Stored = Stored(),
    ) -> None:
        super().__init__(context, rate, stored)
        if every < 1:
            raise ValueError(f"`Restart(every=...)` must be >= 1, got {every}")
        self.every = every
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.taken: torch.Tensor

    def after_step(self, policy: CausalLM) -> None:
        self.taken += 1
        if self.taken % self.every == 0:
            super().after_step(policy)


class TrustRegion(_FirstPolicy):
    """The first policy with a share of the student. z_T = (1 - mix) z_0 + mix z_theta

    Both sets of logits z are those after (x, f, y<t).

    A linear mix of logits is the geometric mix of the distributions,
    T ~ pi_0^(1 - mix) pi_theta^mix. mix = 0 is `Frozen`, mix = 1 is `Live`.

    Args:
        mix: share of the student, in [0, 1].
        context: the privileged information.
        stored: how a full fine-tune's copy is kept (`Stored`); by default as the student's.

    Raises:
        ValueError: if `mix` is outside [0, 1].

    Source:
        arXiv:2601.20802, mix .01.
    """

    def __init__(
        self,
        mix: float = 0.01,
        context: Context = SiblingDemonstration(),
        stored: Stored = Stored(),
    ) -> None:
        super().__init__(context, stored)
        if not 0 <= mix <= 1:
            raise ValueError(f"`TrustRegion(mix=...)` must be in [0, 1], got {mix}")
        self.mix = mix

    def weights_to_run(self, policy: CausalLM) -> tuple[Weights, ...]:
        return (self.configured, policy.adapter.current())

    def combine(
        self, student: Callable[[], TokenLogits], teachers: tuple[TokenLogits, ...]
    ) -> TokenLogits:
        first, live = teachers
        return TokenLogits(torch.lerp(first.logits, live.logits, self.mix))
