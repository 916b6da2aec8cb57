"""Ranks that share one engine: their requests are gathered, answered together and returned."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from scsdpo import interrupt
from scsdpo.distributed import LocalError, RemoteError, raise_first
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.rollout.vllm.rollout import EngineAnswer, Request

T = TypeVar("T")

_STEPS = 16
"""Steps of the engine between two collectives that check if the run was asked to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One rank's part of a round."""

    requests: tuple[Request, ...]
    left: bool
    """True: the rank has no more requests."""
    error: RemoteError | None
    """Error that the rank has raised."""


class TensorParallelQueue:
    """The requests of a tensor-parallel group of ranks, gathered round by round.

    In each round every rank runs the engine on the requests of all ranks, because the engine's
    layers communicate. A rank without requests takes part until all ranks have left.

    Args:
        group: process group of the ranks that share an engine, for tensors of the host.
        refuse: raises `ConfigurationError` for requests that the engine cannot serve.
        ask: calls the engine.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        refuse: Callable[[Sequence[Request]], None],
        ask: Callable[[Sequence[Request]], list[list[EngineAnswer]]],
    ) -> None:
        self._group, self._refuse, self._ask = group, refuse, ask
        self._rank = dist.get_rank(group)
        self._broken = False
        self._steps = 0

    def answers(self, version: str, requests: Sequence[Request]) -> list[list[EngineAnswer]]:
        """Run one round; return the answers to this rank's requests, which may be none.

        Raises:
            ConfigurationError: on every rank, if one of them has a request that cannot be served.
            TrainingStopped: on every rank, if their requests or weights differ.
            LocalError: if the engine fails on this rank, while the others wait in its layers.
        """
        parts = self._parts(requests)
        answers = self._run(version, parts)
        start = sum(len(part.requests) for part in parts[: self._rank])
        return answers[start : start + len(requests)]

    def leave(self, version: str) -> None:
        """Take part in rounds until no rank has requests."""
        while not self._broken:
            parts = self._parts((), left=True)
            if all(part.left for part in parts):
                return
            self._run(version, parts)

    def check_interrupt(self) -> None:
        """Call it before each step of the engine, so that all ranks stop before the same step."""
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

    def _run(self, version: str, parts: Sequence[_Part]) -> list[list[EngineAnswer]]:
        requests = [request for part in parts for request in part.requests]
        asked = repr((version, requests)).encode()
        marks = self._gather(hashlib.blake2b(asked, digest_size=8).hexdigest())
        if len(set(marks)) > 1:
            raise TrainingStopped(
                "the ranks of a tensor-parallel vLLM engine have different requests or different "
                f"weights ({', '.join(marks)}), so its responses would be wrong; no step was taken "
                "on this batch: resume with --ckpt_path"
            )
        try:
            return self._ask(requests) if requests else []
        except TrainingStopped:  # the answers are faulty on every rank
            raise
        except Exception as error:
            self._broken = True
            if isinstance(error, interrupt.RankLost):
                raise
            raise LocalError(
                f"vLLM failed on rank {dist.get_rank()} while the other ranks of its engine wait "
                f"({type(error).__name__}: {first_line(error)}); resume with --ckpt_path"
            ) from error

    def _gather(self, item: T) -> list[T]:
        gathered: list[T] = [item] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, item, group=self._group)
        return gathered
