"""Which responses are drawn next, and which give way when memory runs out."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from scsdpo.rollout.hf.kv_cache import Size, blocks

_WORTH_ADMITTING = 4
"""New responses are let in when they are a quarter of those that run, or all that wait."""


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """A distinct prompt and all responses to it."""

    ids: tuple[int, ...]
    rows: list[int]
    """Its responses' rows of the response buffer."""
    running: int = 0
    """Responses being drawn."""
    slot: int = -1
    """Where the prompt's keys and values are; -1: nowhere."""


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One response that is to be drawn."""

    row: int
    """Of the response buffer."""
    group: Group
    started: int = 0
    """Steps that were made before its first."""


class Scheduler:
    """Lets responses in by the memory that they are expected to need, in the order of groups.

    A response that holds d tokens is expected to hold d + m in the end, m the mean length: tokens
    drawn so far over responses finished, which counts those still running rightly if lengths are
    geometric. Before any has finished, m is `max_new_tokens`, counted as one response. Where more
    is needed than was expected, the youngest responses give way and are drawn again later, from
    the same uniforms.

    Args:
        groups: by falling prompt length.
        max_tokens: room for keys and values.
        max_rows: most responses that run.
        max_new_tokens: longest response.
    """

    def __init__(
        self, groups: Sequence[Group], *, max_tokens: int, max_rows: int, max_new_tokens: int
    ) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens
        self.waiting = deque(Request(row=row, group=g) for g in groups for row in g.rows)
        self._finished = 0
        self._tokens = 0

    def admit(self, running: Sequence[int], held: int, prompts: Size) -> list[Request]:
        """Take from those that wait what is worth starting now.

        Args:
            running: tokens drawn of each response that runs.
            held: places that they take.
            prompts: what is held of prompts.
        """
        mean = self._mean(running)
        expected = sum(self._expected(drawn, mean) for drawn in running)
        room = self.max_tokens - max(held, expected) - prompts.tokens
        first = self._expected(0, mean)
        chosen = 0
        new: set[Group] = set()
        for request in self.waiting:
            group, grown = request.group, prompts
            if group.slot < 0 and group not in new:
                grown = Size(prompts.slots + 1, max(prompts.width, len(group.ids)))
            room -= first + grown.tokens - prompts.tokens
            count = len(running) + chosen
            if count and (room < 0 or count >= self.max_rows):
                break
            prompts = grown
            new.add(group)
            chosen += 1
        if chosen < len(self.waiting) and chosen * _WORTH_ADMITTING < len(running):
            return []
        admitted = [self.waiting.popleft() for _ in range(chosen)]
        for request in admitted:
            request.group.running += 1
        return admitted

    def finish(self, request: Request, tokens: int) -> None:
        """A response is complete, with so many tokens."""
        request.group.running -= 1
        self._finished += 1
        self._tokens += tokens

    def put_back(self, request: Request) -> None:
        """A response gives way; it waits at the head."""
        request.group.running -= 1
        self.waiting.appendleft(request)

    def needs_prompt(self, group: Group) -> bool:
        """Whether a response to it runs or is next."""
        return group.running > 0 or (bool(self.waiting) and self.waiting[0].group is group)

    def _mean(self, running: Sequence[int]) -> float:
        drawn = self._tokens + sum(running) + self.max_new_tokens
        return drawn / (self._finished + 1)

    def _expected(self, drawn: int, mean: float) -> int:
        longest = max(self.max_new_tokens - 1, 1)  # the last token is never read back
        return min(blocks(drawn + int(mean)), longest)
