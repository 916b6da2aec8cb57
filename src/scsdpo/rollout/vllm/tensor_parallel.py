"""Ranks that share one engine: requests of all are gathered, answered and handed back."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from scsdpo import interrupt
from scsdpo.distributed import LocalError, RemoteError, raise_first
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.rollout.vllm.rollout import Answer, Request

T = TypeVar("T")

_STEPS = 16
"""Steps of the engine between two questions to the group whether the run was asked to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One rank's part of a round."""

    requests: tuple[Request, ...]
    left: bool
    error: RemoteError | None


class TensorParallelQueue:
    """The requests of a tensor-parallel group of ranks, gathered round by round.

    In each round every rank runs the engine on the requests of all of them, for the engine's layers
    wait for each other. A rank without requests takes part until all have left.

    Args:
        group: of the ranks that share an engine, on the host.
        refuse: raises `ConfigurationError` for requests that cannot be answered.
        ask: the engine.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        refuse: Callable[[Sequence[Request]], None],
        ask: Callable[[Sequence[Request]], list[list[Answer]]],
    ) -> None:
        self._group, self._refuse, self._ask = group, refuse, ask
        self._rank = dist.get_rank(group)
        self._broken = False
        self._steps = 0

    def answers(self, version: str, requests: Sequence[Request]) -> list[list[Answer]]:
        """Responses to this rank's requests, which may be none; one round.

        Raises:
            ConfigurationError: on every rank, if any of them asks for what cannot be answered.
            TrainingStopped: on every rank, if they do not all ask for the same of the same weights;
                `LocalError`, if the engine fails in here: the others wait in its layers.
        """
        parts = self._parts(requests)
        answers = self._run(version, parts)
        start = sum(len(part.requests) for part in parts[: self._rank])
        return answers[start : start + len(requests)]

    def leave(self, version: str) -> None:
        """Take part until no rank asks any more."""
        while not self._broken:
            parts = self._parts((), left=True)
            if all(part.left for part in parts):
                return
            self._run(version, parts)

    def check_interrupt(self) -> None:
        """Before each step of the engine: all ranks give up before the same one."""
        self._steps += 1
        if self._steps % _STEPS:
            return
        signum = 0
        try:
            interrupt.check()
        except interrupt.Interrupted as asked:
            signum = asked.signum
        highest = torch.tensor(signum)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        if highest:
            raise interrupt.Interrupted(int(highest))

    def _parts(self, requests: Sequence[Request], *, left: bool = False) -> list[_Part]:
        refused: ConfigurationError | None = None
        try:
            self._refuse(requests)
        except ConfigurationError as error:
            refused = error
        own = None if refused is None else RemoteError.of(refused)
        parts = self._gather(_Part(requests=tuple(requests), left=left, error=own))
        raise_first([part.error for part in parts], refused)
        return parts

    def _run(self, version: str, parts: Sequence[_Part]) -> list[list[Answer]]:
        requests = [request for part in parts for request in part.requests]
        asked = repr((version, requests)).encode()
        marks = self._gather(hashlib.blake2b(asked, digest_size=8).hexdigest())
        if len(set(marks)) > 1:
            raise TrainingStopped(
                "the ranks of a tensor-parallel vLLM engine ask it for different responses, or "
                f"have different weights ({', '.join(marks)}), and what it returns would be of "
                "neither; no step was taken on this batch: go on with --ckpt_path"
            )
        try:
            return self._ask(requests) if requests else []
        except TrainingStopped:  # of the answers, and on every rank
            raise
        except Exception as error:
            self._broken = True
            if isinstance(error, interrupt.RankLost):
                raise
            raise LocalError(
                f"vLLM failed on rank {dist.get_rank()} while the ranks that share its engine "
                f"wait for it ({type(error).__name__}: {first_line(error)}); go on with --ckpt_path"
            ) from error

    def _gather(self, item: T) -> list[T]:
        gathered: list[T] = [item] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, item, group=self._group)
        return gathered
