"""VLLMRollout: requests to a vLLM engine, and rollouts from its answers."""

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
"""Version of vLLM that the tests run with; the extra `vllm` of this package pins it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, and the parameters with which vLLM samples responses to it."""

    ids: tuple[int, ...]
    """Token ids of the prompt."""
    parameters: dict[str, Any]
    """Fields of `vllm.SamplingParams`, as plain values that JSON can hold."""

    @classmethod
    def of(cls, prompt: Prompt, sampling: Sampling, policy: CausalLM) -> "Request":
        """A request for `sampling.n` responses to `prompt`.

        vLLM seeds response i with `seed` + i, so a response depends on (seed, prompt key, i) only.
        i counts on over copies of the prompt.
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
                "skip_special_tokens": False,  # a stop string may be special, as </tool_call>
                # vLLM refuses ids beyond the vocabulary.
                "stop_token_ids": [i for i in policy.chat.eos_ids if i < policy.vocabulary],
                "ignore_eos": True,  # vLLM knows one id only, and does not return it
                "logprobs": 0,  # of the drawn token only
            },
        )

    def after(self, ids: Sequence[int], *, number: int, turn: int) -> "Request":
        """A request for the next turn of an episode, with a seed of its own.

        Args:
            ids: tokens after the prompt so far, drawn or written by the environment.
            number: number of the episode among those of the prompt.
            turn: number of the turn, from 1.
        """
        seed = stable_hash(self.parameters["seed"] + number, "turn", turn) >> 1
        left = self.parameters["max_tokens"] - len(ids)
        turned = self.parameters | {"n": 1, "seed": seed, "max_tokens": left}
        return Request(ids=(*self.ids, *ids), parameters=turned)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAnswer:
    """One response as vLLM returns it."""

    ids: Sequence[int]
    """The ids that were drawn, the end included."""
    logprobs: Sequence[float]
    """Log-prob of each id in nats, under the distribution that it was drawn from."""
    finish_reason: str | None
    """`stop`: an id or a string ended it; `length`: `max_tokens` did; else it is unfinished."""
    versions: frozenset[str]
    """Labels of the weights that drew its tokens; several if weights changed during the response.
    """
    by_token: tuple[str, ...] = ()
    """The label for each token, if weights changed during the response."""

    def fault(self, *versions: str) -> str:
        """Why it cannot be used as a response of the weights `versions`; '' if it can."""
        if self.finish_reason not in ("stop", "length"):
            return f"returned an unfinished response (finish reason {self.finish_reason})"
        if not self.ids:
            return "returned an empty response"
        if not self.versions or not self.versions <= {*versions}:
            others = ", ".join(sorted(self.versions - {*versions})) or "without a label"
            return f"sampled from weights {others}, not {' or '.join(versions)}"
        if len(self.versions) > 1 and len(self.by_token) != len(self.ids):
            return "did not return which weights drew which token"
        return ""


class PendingAnswers(ABC):
    """The answers of an engine that works while the trainer does other things."""

    @property
    @abstractmethod
    def is_done(self) -> bool:
        """True once all answers are there."""

    @abstractmethod
    def answers(self, publish: Callable[[], None]) -> list[list[EngineAnswer]]:
        """Wait for the answers [Q][G].

        Args:
            publish: sends the policy's current weights again, if the engine has lost its weights.

        Raises:
            ConfigurationError: as `Engine.generate`.
            TrainingStopped: as `Engine.generate`.
        """


class Engine(ABC):
    """A place where vLLM runs: in this process (`Colocated`) or on servers (`Servers`)."""

    @abstractmethod
    def generate(
        self, policy: CausalLM, requests: Sequence[Request], version: str
    ) -> list[list[EngineAnswer]]:
        """Answers [Q][G] under the policy's current weights.

        If the engine does not have these weights yet, they are sent first and its prefix cache is
        emptied. Answers with a `fault` are never returned.

        Args:
            policy: its weights are sent.
            requests: Q requests.
            version: label of the policy's weights.

        Raises:
            ConfigurationError: if the engine cannot serve the requests; it names the key.
            TrainingStopped: if the engine does not answer in time; it names the engine.
        """

    @declared
    def answers_behind(self) -> bool:
        """True if the engine defines `begin`."""
        return False

    def begin(self, requests: Sequence[Request], version: str, *, within: bool) -> PendingAnswers:
        """Send requests without waiting for their answers. Call it inside `hold_weights`.

        Each token of the answers is drawn with the weights `version` or with later ones.

        Args:
            requests: Q requests.
            version: label of the weights that are held.
            within: True: weights may change in the middle of a response.
        """
        raise NotImplementedError(type(self).__name__)

    def hold_weights(
        self, policy: CausalLM, version: str, *, barrier: bool = True
    ) -> AbstractContextManager[object]:
        """`Rollout.hold_weights`, for weights with the label `version`."""
        return nullcontext()

    def check(self, requests: Sequence[Request]) -> None:  # noqa: B027 - some cannot know yet
        """Raise on all ranks if a request cannot be served, before anything starts."""

    def generate_nothing(self) -> None:  # noqa: B027 - most engines need no other rank
        """`Rollout.sample_nothing`: take part in the other ranks' collectives without requests."""

    def check_installed(self) -> None:  # noqa: B027 - servers have their own
        """`Rollout.check_installed`."""

    def max_length(self) -> int | None:
        """`Rollout.max_length`: most tokens of a prompt and its response; None: no limit."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Stop processes and close files and connections; `generate` may start them again."""


class VLLMRollout(DialogueRollout):
    """Samples with vLLM, from the policy's current weights.

    Weights are sent to the engine before sampling whenever they changed (after each optimizer
    step). LoRA is merged in float32 or sent alone; weights are rounded once to the engine's dtype
    and never quantised. Ids and log-probs are the engine's. `policy_logprobs` are known only
    without cuts (top-p, top-k and min-p off) and nan otherwise, because the engine returns only
    those of the cut distribution.

    The choice of a token depends on (seed, prompt key, number in the group, position) and, up to
    rounding of batched matrix products, on nothing else. `HFRollout` draws other tokens.

    Episodes are drawn turn by turn. One request holds the next turn of all episodes that go on;
    vLLM's prefix cache keeps the keys and values of their earlier turns.

    Args:
        engine: `Colocated(...)`, in this process, or `Servers(...)`, by URL.
        digest_every: optimizer steps after which all weights are hashed again for their label
            (`Versions`). Must be >= 1.

    Raises:
        ValueError: if `digest_every` < 1.
        ConfigurationError: from `sample`, if the engine cannot serve the requests.
        TrainingStopped: from `sample`, if the engine does not answer in time.
    """

    def __init__(self, engine: Engine, digest_every: int = 100) -> None:
        self.engine = engine
        self.versions = Versions(digest_every)
        self._version = ""
        """Label of the weights inside `hold_weights`; '' outside."""

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
            raise ValueError(f"prompt {prompt.key!r} has no ids: render it with `Chat.render`")
    return [Request.of(prompt, sampling, policy) for prompt in dialogue.prompts]


@dataclass(frozen=True, kw_only=True)
class _Drawing(Drawing):
    """Responses that an engine draws while the trainer does other things."""

    rollout: VLLMRollout
    policy: CausalLM
    dialogue: Dialogue
    sampling: Sampling
    version: str
    asked: PendingAnswers

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
    """Turn autocast off, which would change the precision of vLLM's arithmetic."""
    return torch.autocast(policy.language_model.device.type, enabled=False)


class _Row:
    """The tokens of one response or episode, turn by turn."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.sampled: list[bool] = []
        self.turns: list[int] = []
        self.versions: list[str] = []
        """The label for each token; a token of the environment has that of the token before it."""
        self.turn = 0
        self.ended = False

    def draw(self, answer: EngineAnswer) -> None:
        """Append a turn that the policy drew."""
        self._add(answer.ids, answer.logprobs, sampled=True)
        several = len(answer.versions) > 1
        self.versions += answer.by_token if several else [*answer.versions] * len(answer.ids)
        self.ended = answer.finish_reason == "stop"

    def read(self, ids: Sequence[int]) -> None:
        """Append an environment's answer; the next turn begins after it."""
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


def answers_without_faults(
    ask: Callable[[Sequence[Request]], list[list[EngineAnswer]]],
    requests: Sequence[Request],
    version: str,
    tries: int = 3,
) -> list[list[EngineAnswer]]:
    """The answers of `ask`; requests with a faulty answer are asked again.

    Args:
        ask: calls the engine.
        requests: Q requests.
        version: label that the answers must have.
        tries: number of tries for each request.

    Raises:
        TrainingStopped: if a request has a faulty answer in every try.
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
    """Raise if a prompt leaves no room for `max_new_tokens`: vLLM would cut its responses short.

    Args:
        requests: the requests.
        longest: most tokens of a prompt with its response in the engine.
        remedy: end of the error message.

    Raises:
        ConfigurationError: if a request may need more tokens.
    """
    needed = max((len(r.ids) + r.parameters["max_tokens"] for r in requests), default=0)
    if needed > longest:
        raise ConfigurationError(
            f"model.rollout.engine: a prompt and its response may take {needed} tokens, but vLLM "
            f"has room for {longest}: {remedy}"
        )


def not_quantised(quantization: object, where: str) -> None:
    """Raise if an engine quantises its weights, because it then samples from another policy."""
    if quantization is not None:
        raise ConfigurationError(
            f"model.rollout.engine: {where} quantises its weights ({quantization}), so it would "
            "not sample from the policy: use a checkpoint and settings without quantization"
        )
