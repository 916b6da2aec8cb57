"""VLLMRollout: what it asks of a vLLM engine, and rollouts from what comes back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scsdpo.contracts import declared
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.rollout._base import Drawing
from scsdpo.rollout.dialogue import Dialogue, DialogueRollout
from scsdpo.rollout.weights.versions import Versions
from scsdpo.seeds import resolved
from scsdpo.types import Prompt, Responses, Sampling, stable_hash

TESTED = "0.32.0"
"""The vLLM that the tests run with; the extra `vllm` of this package names it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, and how vLLM is to answer it."""

    ids: tuple[int, ...]
    parameters: dict[str, Any]
    """Fields of `vllm.SamplingParams`; plain values, so that they travel as JSON too."""

    @classmethod
    def of(cls, prompt: Prompt, sampling: Sampling, policy: CausalLM) -> "Request":
        """`sampling.n` responses to `prompt`.

        vLLM seeds response i with `seed` + i: it depends on (seed, prompt key, i) only, where i
        counts on over copies of the prompt.
        """
        stops = sampling.stops(prompt)
        return cls(
            ids=prompt.ids,
            parameters={
                "n": sampling.n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "max_tokens": sampling.max_new_tokens,
                # 62 bits, so that + i stays within 64.
                "seed": (stable_hash(resolved(sampling.seed), prompt.key) >> 1)
                + prompt.copy * sampling.n,
                "stop": list(stops),
                "include_stop_str_in_output": True,
                "detokenize": bool(stops),
                "skip_special_tokens": False,  # a stop string may be one, as </tool_call> is
                # It refuses ids that no token has.
                "stop_token_ids": [i for i in policy.chat.eos_ids if i < policy.vocabulary],
                "ignore_eos": True,  # it would end at one id only, and not say at which
                "logprobs": 0,  # of the drawn token alone
            },
        )

    def after(self, ids: Sequence[int], *, number: int, turn: int) -> "Request":
        """One response where an episode goes on behind `ids`, drawn from a seed of its own.

        Args:
            ids: what stands behind the prompt so far, whoever wrote it.
            number: of the episode, among the prompt's.
            turn: number of the turn, from 1.
        """
        seed = stable_hash(self.parameters["seed"] + number, "turn", turn) >> 1
        left = self.parameters["max_tokens"] - len(ids)
        turned = self.parameters | {"n": 1, "seed": seed, "max_tokens": left}
        return Request(ids=(*self.ids, *ids), parameters=turned)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One response as vLLM gives it."""

    ids: Sequence[int]
    """The ids that were drawn, the end included."""
    logprobs: Sequence[float]
    """Log-prob of each id, nats, under the distribution it was drawn from."""
    finish_reason: str | None
    """`stop`: an id or a string ended it; `length`: the cap; anything else: it was not finished."""
    versions: frozenset[str]
    """Labels of the weights that its tokens were drawn with; more than one: they changed midway."""
    by_token: tuple[str, ...] = ()
    """The label of each token, where they changed midway."""

    def fault(self, *versions: str) -> str:
        """Why it must not be learned from as one of these weights' responses; '' if it may."""
        if self.finish_reason not in ("stop", "length"):
            return f"gave a response that was not finished (finish reason {self.finish_reason})"
        if not self.ids:
            return "gave an empty response"
        if not self.versions or not self.versions <= {*versions}:
            others = ", ".join(sorted(self.versions - {*versions})) or "without a label"
            return f"sampled from weights {others}, not {' or '.join(versions)}"
        if len(self.versions) > 1 and len(self.by_token) != len(self.ids):
            return "does not say which weights drew which token"
        return ""


class Asked(ABC):
    """Requests that an engine answers while the trainer does other things."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """Whether all answers are there."""

    @abstractmethod
    def answers(self, publish: Callable[[], None]) -> list[list[Answer]]:
        """Wait for the answers [Q][G].

        Args:
            publish: brings the policy's present weights, if the engine has lost all it had.

        Raises:
            ConfigurationError: as `Engine.generate`.
            TrainingStopped: as `Engine.generate`.
        """


class Engine(ABC):
    """Where vLLM runs."""

    @abstractmethod
    def generate(
        self, policy: CausalLM, requests: Sequence[Request], version: str
    ) -> list[list[Answer]]:
        """Responses [Q][G] under the policy's weights as they are now.

        Weights that the engine does not have yet are brought to it first, and what it remembers of
        the old ones is forgotten. Responses with a `fault` are never returned.

        Args:
            policy: whose weights are brought.
            requests: what is asked for.
            version: their label; the engine's once it has them.

        Raises:
            ConfigurationError: if the engine cannot do what is asked for, naming the key.
            TrainingStopped: if it does not answer in time, naming it.
        """

    @declared
    def answers_behind(self) -> bool:
        """Whether it has `begin`."""
        return False

    def begin(self, requests: Sequence[Request], version: str, *, within: bool) -> Asked:
        """Ask, and do not wait. Inside `hold_weights`.

        Each token of the answers is of the weights `version`, or of some that came later.

        Args:
            requests: what is asked for.
            version: label of the weights that are held.
            within: whether weights may change amid a response.
        """
        raise NotImplementedError(type(self).__name__)

    def hold_weights(
        self, policy: CausalLM, version: str, *, barrier: bool = True
    ) -> AbstractContextManager[object]:
        """`Rollout.hold_weights`, for weights that are called `version`."""
        return nullcontext()

    def check(self, requests: Sequence[Request]) -> None:  # noqa: B027 - some cannot know yet
        """Refuse what cannot be answered, on all ranks, before anything is begun."""

    def generate_nothing(self) -> None:  # noqa: B027 - most engines need no other rank
        """`Rollout.sample_nothing`: answer no request of this rank's, in step with the others."""

    def check_installed(self) -> None:  # noqa: B027 - servers have their own
        """`Rollout.check_installed`."""

    def max_length(self) -> int | None:
        """`Rollout.max_length`: tokens of a prompt and its response together; None: no limit."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of processes, files and connections; `generate` may make them again."""


class VLLMRollout(DialogueRollout):
    """Samples with vLLM, from the policy's weights of this moment.

    The weights go to the engine before sampling whenever they changed (each optimizer step), LoRA
    merged in float32, rounded once to the engine's dtype and never quantised. Ids and log-probs
    are the engine's; `policy_logprobs` are known only while nothing is cut (top-p, top-k and min-p
    off), and nan otherwise: the engine returns those of the cut distribution alone.

    Which token is drawn depends on (seed, prompt key, number in the group, position), and to the
    rounding of batched matrix products on nothing else; it is not the token that `HFRollout` draws.

    Episodes of several turns go turn by turn: all that go on are asked together, by their ids,
    whose keys and values vLLM's prefix cache keeps.

    Args:
        engine: `Colocated(...)`, in this process, or `Servers(...)`, found by URL.
        digest_every: optimizer steps after which the label of the weights (`Versions`) is made of
            all their bits anew. Must be >= 1.

    Raises:
        ValueError: if `digest_every` < 1.
        ConfigurationError: from `sample`, if the engine cannot do what is asked for.
        TrainingStopped: from `sample`, if it does not answer in time.
    """

    def __init__(self, engine: Engine, digest_every: int = 100) -> None:
        self.engine = engine
        self.versions = Versions(digest_every)
        self._version = ""
        """Label of the weights that are held; '': none are."""

    @property
    def draws_behind(self) -> bool:
        return self.engine.answers_behind

    def begin(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        within: bool = False,
    ) -> Drawing:
        dialogue = Dialogue(prompts, sampling, policy.chat)
        requests = _requests(policy, dialogue, sampling)
        if not self._version:
            self.engine.check(requests)
        with self.hold_weights(policy):
            return _Drawing(
                rollout=self,
                policy=policy,
                dialogue=dialogue,
                sampling=sampling,
                version=self._version,
                asked=self.engine.begin(requests, self._version, within=within),
            )

    def draw(self, policy: CausalLM, dialogue: Dialogue, sampling: Sampling) -> Responses:
        requests = _requests(policy, dialogue, sampling)
        if not self._version:
            self.engine.check(requests)
        with self.hold_weights(policy), _plain(policy):
            version = self._version
            answers = self.engine.generate(policy, requests, version)
            rows = [_Row() for _ in range(len(requests) * sampling.n)]
            going = dict(enumerate(answer for group in answers for answer in group))
            while going:
                for row, answer in going.items():
                    rows[row].draw(answer)
                    if dialogue.plays(row):
                        ended = answer.finish_reason == "stop"
                        dialogue.respond(row, answer.ids, used=len(rows[row].ids), ended=ended)
                asked: dict[int, Request] = {}
                while dialogue.due:
                    for row, ids in dialogue.answers(wait=True):
                        if ids:
                            rows[row].read(ids)
                            q, g = divmod(row, sampling.n)
                            here = {"number": g, "turn": rows[row].turn}
                            asked[row] = requests[q].after(rows[row].ids, **here)
                going = {}
                if asked:
                    asked = dict(sorted(asked.items()))
                    more = self.engine.generate(policy, list(asked.values()), version)
                    going = {row: answer for row, (answer,) in zip(asked, more, strict=True)}
        return _responses(policy, dialogue, sampling, rows, version)

    @contextmanager
    def hold_weights(self, policy: CausalLM, *, barrier: bool = True) -> Iterator[None]:
        if self._version:
            yield
            return
        with ExitStack() as held:
            with _plain(policy):
                version = self.versions.of(policy)
                held.enter_context(self.engine.hold_weights(policy, version, barrier=barrier))
            self._version = version
            try:
                yield
            finally:
                self._version = ""

    def sample_nothing(self) -> None:
        self.engine.generate_nothing()

    def check_installed(self) -> None:
        self.engine.check_installed()

    def max_length(self) -> int | None:
        return self.engine.max_length()

    def close(self) -> None:
        self.engine.close()


def _requests(policy: CausalLM, dialogue: Dialogue, sampling: Sampling) -> list[Request]:
    for prompt in dialogue.prompts:
        if not prompt.ids:
            raise ValueError(f"prompt {prompt.key!r} has no ids; render it with `Chat.render`")
    return [Request.of(prompt, sampling, policy) for prompt in dialogue.prompts]


@dataclass(frozen=True, kw_only=True)
class _Drawing(Drawing):
    """Responses that an engine draws beside the trainer."""

    rollout: VLLMRollout
    policy: CausalLM
    dialogue: Dialogue
    sampling: Sampling
    version: str
    asked: Asked

    @property
    def is_done(self) -> bool:
        return self.asked.is_done

    @property
    def label(self) -> str:
        return self.version

    def responses(self) -> Responses:
        rows = []
        for group in self.asked.answers(self._publish):
            for answer in group:
                rows.append(_Row())
                rows[-1].draw(answer)
        return _responses(self.policy, self.dialogue, self.sampling, rows, self.version)

    def _publish(self) -> None:
        with self.rollout.hold_weights(self.policy):
            pass


def _plain(policy: CausalLM) -> AbstractContextManager[object]:
    """Without autocast: vLLM's arithmetic would be that of the trainer's precision."""
    return torch.autocast(policy.language_model.device.type, enabled=False)


class _Row:
    """A response as it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.sampled: list[bool] = []
        self.turns: list[int] = []
        self.versions: list[str] = []
        """The label of each token; of one that was not sampled, of the one before it."""
        self.turn = 0
        self.ended = False

    def draw(self, answer: Answer) -> None:
        """The policy said something."""
        self._add(answer.ids, answer.logprobs, sampled=True)
        several = len(answer.versions) > 1
        self.versions += answer.by_token if several else [*answer.versions] * len(answer.ids)
        self.ended = answer.finish_reason == "stop"

    def read(self, ids: Sequence[int]) -> None:
        """An environment answered; the next turn begins."""
        self._add(ids, [0.0] * len(ids), sampled=False)
        self.versions += self.versions[-1:] * len(ids)
        self.turn += 1

    def _add(self, ids: Sequence[int], logprobs: Sequence[float], *, sampled: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.sampled += [sampled] * len(ids)
        self.turns += [self.turn] * len(ids)


def _responses(
    policy: CausalLM,
    dialogue: Dialogue,
    sampling: Sampling,
    rows: Sequence[_Row],
    version: str,
) -> Responses:
    device, n = policy.language_model.device, sampling.n
    longest = max((len(row.ids) for row in rows), default=0)
    shape = (len(dialogue.prompts), n, longest)

    def table(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
        padded = [[*row, *[fill] * (longest - len(row))] for row in values]
        return torch.tensor(padded, dtype=dtype, device=device).view(shape)

    mask = table([row.sampled for row in rows], False, torch.bool)
    drawn = table([row.logprobs for row in rows], 0.0, torch.float32)
    ended = [row.ended and number not in dialogue.cut for number, row in enumerate(rows)]
    texts = [dialogue.text(number, row.ids) for number, row in enumerate(rows)]
    records = [dialogue.record(number) for number in range(len(rows))]
    places = range(0, len(rows), n)
    labels = tuple({version: None} | dict.fromkeys(label for row in rows for label in row.versions))
    responses = Responses.of_one_turn(
        prompts=dialogue.prompts,
        ids=table([row.ids for row in rows], policy.chat.pad_id, torch.int64),
        sampled=mask,
        sampling_logprobs=drawn,
        policy_logprobs=torch.where(mask, torch.nan, 0.0) if sampling.cuts else drawn,
        ended=torch.tensor(ended, dtype=torch.bool, device=device).view(shape[:2]),
        texts=tuple(tuple(texts[i : i + n]) for i in places),
        temperature=sampling.temperature,
    )
    number = {label: float(place) for place, label in enumerate(labels)}
    drew = [[number[label] for label in row.versions] for row in rows]
    return replace(
        responses,
        labels=labels,
        versions=table(drew, 0, torch.int32),
        present=table([[True] * len(row.ids) for row in rows], False, torch.bool),
        turns=table([row.turns for row in rows], 0, torch.int32),
        episodes=tuple(tuple(records[i : i + n]) for i in places),
    )


def sampled(
    ask: Callable[[Sequence[Request]], list[list[Answer]]],
    requests: Sequence[Request],
    version: str,
    tries: int = 3,
) -> list[list[Answer]]:
    """The answers of `ask`; requests with a faulty one are asked again.

    Raises:
        TrainingStopped: if a request has a faulty answer in each of so many `tries`.
    """
    answers = ask(requests)
    for left in reversed(range(tries)):
        faults = {
            q: why
            for q, group in enumerate(answers)
            for row in group
            if (why := row.fault(version))
        }
        if not faults:
            break
        if not left:
            raise TrainingStopped(
                f"vLLM {next(iter(faults.values()))}, {tries} times in a row; no step was taken on "
                "this batch: go on with --ckpt_path"
            )
        again = ask([requests[q] for q in faults])
        for q, group in zip(faults, again, strict=True):
            answers[q] = group
    return answers


def check_length(requests: Sequence[Request], longest: int, remedy: str) -> None:
    """Refuse prompts that leave no room for `max_new_tokens`: vLLM would cut responses short.

    Args:
        requests: what is asked for.
        longest: tokens of prompt and response that the engine has room for.
        remedy: what to raise.
    """
    needed = max((len(r.ids) + r.parameters["max_tokens"] for r in requests), default=0)
    if needed > longest:
        raise ConfigurationError(
            f"model.rollout.engine: a prompt and its response may take {needed} tokens, and vLLM "
            f"has room for {longest}: {remedy}"
        )


def not_quantised(quantization: object, where: str) -> None:
    """Refuse an engine that rounds the weights to fewer bits than their dtype has."""
    if quantization is not None:
        raise ConfigurationError(
            f"model.rollout.engine: {where} holds its weights quantised ({quantization}), and what "
            "it samples from is not the policy: use a checkpoint and settings without quantization"
        )
