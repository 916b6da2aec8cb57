"""Which responses start next, by the memory that they are expected to need."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from scsdpo.rollout.hf.kv_cache import Size, blocks

_WORTH_ADMITTING = 4
"""New responses start when they are at least a quarter of those that run, or all that wait."""


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """A distinct prompt and all responses to it."""

    ids: tuple[int, ...]
    """The prompt's token ids."""
    rows: list[int]
    """Rows of its responses in the response buffer."""
    running: int = 0
    """Number of responses that are being drawn."""
    slot: int = -1
    """Slot of the prompt's keys and values; -1: they are not held."""


@dataclass(kw_only=True, slots=True, eq=False)
class ResponseRequest:
    """One response that waits or is being drawn."""

    row: int
    """Row in the response buffer."""
    group: Group
    started: int = 0
    """Number of steps before its first one."""


class Scheduler:
    """Starts responses by the memory that they are expected to need, in the order of groups.

    A response that holds d tokens is expected to hold d + m at its end, where m is the mean length:
    tokens drawn so far over responses finished. For geometric lengths this treats running responses
    correctly. One response of `max_new_tokens` counts as finished from the start. If more memory is
    needed than expected, the youngest responses are preempted and drawn again later, with the same
    random numbers.

    Args:
        groups: sorted by prompt length, longest first.
        max_tokens: room for keys and values, in tokens.
        max_rows: most responses that run at a time.
        max_new_tokens: length of the longest response.
    """

    def __init__(
        self, groups: Sequence[Group], *, max_tokens: int, max_rows: int, max_new_tokens: int
    ) -> None:
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens
        self.waiting = deque(ResponseRequest(row=row, group=g) for g in groups for row in g.rows)
        self._finished = 0
        self._tokens = 0

    def admit(self, running: Sequence[int], held: int, prompts: Size) -> list[ResponseRequest]:
        """Take the waiting responses that should start now.

        Args:
            running: number of tokens drawn for each running response.
            held: places that the running responses take.
            prompts: size of the prompts' table.
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

    def finish(self, request: ResponseRequest, tokens: int) -> None:
        """Count a complete response of `tokens` tokens."""
        request.group.running -= 1
        self._finished += 1
        self._tokens += tokens

    def put_back(self, request: ResponseRequest) -> None:
        """Preempt a response; it waits as the first one."""
        request.group.running -= 1
        self.waiting.appendleft(request)

    def needs_prompt(self, group: Group) -> bool:
        """True if a response of `group` runs or is the next to start."""
        return group.running > 0 or (bool(self.waiting) and self.waiting[0].group is group)

    def _mean(self, running: Sequence[int]) -> float:
        drawn = self._tokens + sum(running) + self.max_new_tokens
        return drawn / (self._finished + 1)

    def _expected(self, drawn: int, mean: float) -> int:
        longest = max(self.max_new_tokens - 1, 1)  # the last token never runs
        return min(blocks(drawn + int(mean)), longest)
