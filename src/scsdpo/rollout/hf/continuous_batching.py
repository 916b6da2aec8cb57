"""Continuous batching: responses are drawn together, and others start as soon as some end."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError
from scsdpo.loss.logits import Buffers, TokenLogits
from scsdpo.policy.adapter import with_head
from scsdpo.policy.attention import run_decoder
from scsdpo.policy.experts import per_token, routers, split_states
from scsdpo.rollout.hf.kv_cache import KVCache, Move, Size, blocks
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.rollout.hf.scheduler import Group, ResponseRequest, Scheduler
from scsdpo.rollout.hf.shared_prefix import Decode, Extend, Prefill

_PREFILL_TOKENS = 8192
"""Most tokens (with padding) of one forward of prompts; it bounds the activations."""
_READ_TOKENS = 65536
"""Most tokens of one forward of environments' answers, with the tokens before them, whose keys and
values are gathered for it."""
_STEPS_BETWEEN_RETIRING = 2
"""Finished responses leave after this many steps; on a GPU the host waits for the device then."""
_PROMPT_GAPS = 4
"""The prompts' table is compacted when one slot in this many is empty."""


class ContinuousBatcher:
    """Draws responses. Running responses are in buckets by length, the longest bucket first.

    Args:
        model: in eval mode, and attends by layouts.
        buffer: chooses and keeps the tokens.
        scheduler: holds the responses to draw.
        cache: with the scheduler's `max_tokens`.
        notes_experts: record the experts of every token, if the model has any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        buffer: ResponseBuffer,
        scheduler: Scheduler,
        cache: KVCache,
        *,
        notes_experts: bool = False,
    ) -> None:
        self.model = model
        self.routers = routers(model) if notes_experts else []
        self.buffer = buffer
        self.scheduler = scheduler
        self.cache = cache
        self.tables = Buffers()
        self.step = 0
        self.buckets: list[list[ResponseRequest]] = [[] for _ in cache.limits]
        """Running responses of each bucket, by slot. [R] tensors go from last bucket to first."""
        self.prompts: list[Group | None] = []
        """Group in each prompt slot; None: the slot is empty."""
        self.prompt_hidden: list[Tensor] = []
        """[D] for each prompt slot: the hidden state that predicts the first token."""
        none = buffer.ids.new_zeros(0)
        self.rows = none
        """[R] rows of the buffer."""
        self.drawn = none
        """[R] tokens drawn so far."""
        self.ended = none.bool()
        """[R] an end of sequence was drawn."""
        self.has_room = True
        """Responses have left since others were last started."""
        self.first_started: dict[int, int] = {}
        """Step at which the longest response of each bucket in use started."""
        self.layout: Decode | None = None
        """None after responses came, left or moved: it must be built again."""
        self.next_event = 0
        """Step at which a response fills its bucket or reaches the cap."""
        self.dialogue = buffer.dialogue
        self.waiting: dict[int, ResponseRequest] = {}
        """Row -> response that waits for its environment. It keeps its place, and each step runs
        its last token again, which writes the same keys and values."""
        self.extended: dict[int, tuple[int, ...]] = {}
        """Row -> answer of its environment since the last step, which runs in one forward."""

    def run(self) -> None:
        """Draw all responses."""
        hidden: list[Tensor] = []
        while self.scheduler.waiting or self.is_running or self.dialogue.due:
            interrupt.check()
            if self.has_room:
                drawn = [self._tokens(request) for request in self._running()]
                held, prompts = self._held(self.buckets), self._prompt_size()
                if new := self.scheduler.admit(drawn, held, prompts):
                    hidden.append(self._start(new))
            if not self.is_running:  # full responses wait for verdicts only
                self._take_answers()
                continue
            ids = self._draw(torch.cat(hidden))
            self.has_room = False
            if self.dialogue.is_played:
                self._end_turns()
                ids = self._extend(ids[self._rearrange()])
            elif self.step % _STEPS_BETWEEN_RETIRING == 0 or self.step >= self.next_event:
                ids = ids[self._rearrange()]
            hidden = [self._decode(ids)] if self.is_running else []

    @property
    def is_running(self) -> bool:
        """True if a response is being drawn."""
        return any(self.buckets)

    def _running(self) -> Iterator[ResponseRequest]:
        for bucket in reversed(self.buckets):
            yield from bucket

    def _tokens(self, request: ResponseRequest) -> int:
        return self.step - request.started

    def _prompt_size(self) -> Size:
        lengths = [len(group.ids) for group in self.prompts if group]
        return Size(len(self.prompts), max(lengths, default=0))

    def _sizes(self, buckets: Sequence[Sequence[ResponseRequest]]) -> list[Size]:
        """The size that each bucket needs for the tokens drawn so far."""
        sizes = []
        for bucket, limit in zip(buckets, self.cache.limits, strict=True):
            longest = max((self._tokens(request) for request in bucket), default=0)
            sizes.append(Size(len(bucket), min(blocks(max(longest, 1)), limit)))
        return sizes

    def _held(self, buckets: Sequence[Sequence[ResponseRequest]]) -> int:
        """Number of places in the buckets' rectangles."""
        return sum(size.tokens for size in self._sizes(buckets))

    def _start(self, requests: list[ResponseRequest]) -> Tensor:
        """Start `requests`; return [r, D], the hidden states that predict their first tokens."""
        new = dict.fromkeys(r.group for r in requests if r.group.slot < 0)
        for group in new:
            group.slot = len(self.prompts)
            self.prompts.append(group)
        for request in requests:
            request.started = self.step
        self.buckets[0].extend(requests)
        self.cache.fit(self._prompt_size(), self._sizes(self.buckets))
        for chunk in _chunks(list(new)):
            self._prefill(chunk)
        slots = torch.tensor([r.group.slot for r in requests], device=self.rows.device)
        self.cache.states.start(slots)
        rows = torch.tensor([r.row for r in requests], device=self.rows.device)
        self.rows = torch.cat([self.rows, rows])
        self.drawn = torch.cat([self.drawn, torch.zeros_like(rows)])
        self.ended = torch.cat([self.ended, torch.zeros_like(rows, dtype=torch.bool)])
        self._expire()
        return torch.stack([self.prompt_hidden[r.group.slot] for r in requests])

    def _prefill(self, groups: list[Group]) -> None:
        device = self.rows.device
        width = max(len(g.ids) for g in groups)
        ids = torch.tensor([[*g.ids, *[0] * (width - len(g.ids))] for g in groups], device=device)
        positions = torch.arange(width, device=device).expand(len(groups), -1)
        lengths = torch.tensor([len(g.ids) for g in groups], device=device)
        layout = Prefill(self.cache, groups[0].slot, lengths)
        hidden = run_decoder(
            self.model, layout, self.routers, input_ids=ids, position_ids=positions
        )
        _refuse_other_layers(self.model, self.cache)
        at = torch.arange(len(groups), device=device)
        self.prompt_hidden.extend(hidden[at, lengths - 1])

    def _draw(self, hidden: Tensor) -> Tensor:
        """Draw the next token [R] of each response from hidden states [R, D]."""
        if self.routers:
            width = self.model.config.get_text_config().hidden_size
            hidden, routes = split_states(hidden, len(self.routers), width)
            chosen = routes.topk(per_token(self.model)).indices
            self.buffer.keep_experts(chosen, self.rows, self.drawn)
        hidden, head = with_head(self.model, hidden)
        self.tables.recycle()
        logits = TokenLogits.of(hidden, head, self.buffer.sampling.temperature, self.tables)
        ids = self.buffer.draw(logits.logits, self.rows, self.drawn)
        ended = self.buffer.is_end(ids)
        self.step += 1
        if self.dialogue.is_played:
            ended &= ~self.buffer.keeps(self.rows, self.drawn)
            waits = self.buffer.waits[self.rows]
            ids = torch.where(waits, self.buffer.ids[self.rows, self.drawn - 1], ids)
            self.drawn += ~waits
            for request in self.waiting.values():
                request.started += 1
            self._refresh()
        else:
            self.drawn += 1
        self.ended |= ended
        return ids

    def _end_turns(self) -> None:
        """Send ended responses to their environments, and take the answers that are there."""
        self.ended |= self.buffer.is_stopped(self.rows, self.drawn)
        for place, (request, ended) in enumerate(
            zip(list(self._running()), self.ended.tolist(), strict=True)
        ):
            tokens = self._tokens(request)
            full = tokens == self.buffer.ids.shape[1]
            if request.row in self.waiting or not (ended or full):
                continue
            if self.dialogue.plays(request.row):
                self.buffer.respond(request.row, tokens, ended=ended)
                if not full:  # a full response leaves: no token could follow
                    self.waiting[request.row] = request
                    self.ended[place] = False
        self._take_answers()

    def _take_answers(self) -> None:
        """Take the environments' answers; wait for one if no response can be drawn."""
        idle = len(self.waiting) == sum(map(len, self.buckets))
        over = set()
        for row, ids in self.dialogue.answers(wait=idle):
            request = self.waiting.pop(row, None)
            if request and ids:
                self.buffer.extend(row, self._tokens(request), ids)
                # With linear attention or convolutions its tokens run one by one instead, while
                # other responses are drawn.
                if not self.cache.states.prompts:
                    request.started -= len(ids)
                    self.extended[row] = ids
            elif request:
                over.add(row)
        if over:
            self.ended |= torch.tensor(
                [request.row in over for request in self._running()], device=self.rows.device
            )

    def _rearrange(self) -> Tensor:
        """Remove finished responses, move grown ones to the next bucket, preempt if memory lacks.

        Returns:
            [R'] old places of the responses that stay.
        """
        self.ended |= self.buffer.is_stopped(self.rows, self.drawn)
        before = list(self._running())
        stay = self._retire(before)
        if self.extended:
            more = [len(self.extended.get(request.row, ())) for request in before]
            self.drawn += torch.tensor(more, device=self.rows.device)
        if len(stay) == len(before) and self.step < self.next_event and not self.extended:
            return torch.arange(len(before), device=self.rows.device)
        buckets = self._make_room(stay)
        moves = self._moves(buckets)
        self.cache.fit(self._prompt_size(), self._sizes(buckets), moves)
        self.buckets = buckets
        place = {request: i for i, request in enumerate(before)}
        order = torch.tensor([place[r] for r in self._running()], device=self.rows.device).long()
        self.rows, self.drawn, self.ended = self.rows[order], self.drawn[order], self.ended[order]
        self.cache.states.order(order)
        self.has_room = True
        self._expire()
        return order

    def _extend(self, ids: Tensor) -> Tensor:
        """Run the environments' answers except their last tokens; return [R] tokens to run next.

        The last token of the response before an answer runs with it, because it may not have run.
        """
        places = {request.row: place for place, request in enumerate(self._running())}
        for bucket, requests in enumerate(self.buckets):
            slots = [s for s, request in enumerate(requests) if request.row in self.extended]
            tokens = [self.cache.prompts.width + self._tokens(r) for r in requests]
            for chunk in _padded(slots, tokens):
                self._read(bucket, chunk)
        for row, given in self.extended.items():
            ids[places[row]] = given[-1]
        self.extended.clear()
        return ids

    def _read(self, bucket: int, slots: list[int]) -> None:
        device = self.rows.device
        requests = [self.buckets[bucket][slot] for slot in slots]
        new = [len(self.extended[request.row]) for request in requests]
        held = [self._tokens(r) - n - 1 for r, n in zip(requests, new, strict=True)]
        ids = torch.zeros(len(new), max(new), dtype=torch.long, device=device)
        for place, (request, first, count) in enumerate(zip(requests, held, new, strict=True)):
            ids[place, :count] = self.buffer.ids[request.row, first : first + count]
        starts = [len(request.group.ids) for request in requests]
        table = torch.tensor([slots, [r.group.slot for r in requests], starts, held, new])
        slot, prompt, start, before, count = table.to(device)
        layout = Extend(
            self.cache, bucket, slots=slot, prompt_of=prompt, starts=start, held=before, new=count
        )
        positions = (start + before)[:, None] + torch.arange(ids.shape[1], device=device)
        run_decoder(self.model, layout, input_ids=ids, position_ids=positions)

    def _retire(self, running: list[ResponseRequest]) -> list[ResponseRequest]:
        """Finish the complete responses of `running`; return the others."""
        stay: list[ResponseRequest] = []
        for request, ended in zip(running, self.ended.tolist(), strict=True):
            tokens = self._tokens(request)
            if ended or tokens == self.buffer.ids.shape[1]:
                self.scheduler.finish(request, tokens)
            else:
                stay.append(request)
        self._drop_prompts(self.scheduler.needs_prompt)
        if self.prompts.count(None) * _PROMPT_GAPS > len(self.prompts):
            self._close_gaps()
        return stay

    def _drop_prompts(self, is_kept: Callable[[Group], bool]) -> None:
        for slot, group in enumerate(self.prompts):
            if group and not is_kept(group):
                group.slot = -1
                self.prompts[slot] = None

    def _close_gaps(self) -> None:
        """Remove empty slots of the prompts' table.

        Prompts keep their order, because neighbours started together and end together.
        """
        kept = [group for group in self.prompts if group]
        slots = [group.slot for group in kept]
        self.cache.keep_prompts(slots)
        self.prompt_hidden = [self.prompt_hidden[slot] for slot in slots]
        self.prompts = [*kept]
        for slot, group in enumerate(kept):
            group.slot = slot
        self.layout = None

    def _make_room(self, requests: list[ResponseRequest]) -> list[list[ResponseRequest]]:
        """Buckets of the responses that stay: all if they fit beside prompts, else the oldest."""
        by_age = sorted(requests, key=self._tokens, reverse=True)
        while True:
            buckets: list[list[ResponseRequest]] = [[] for _ in self.buckets]
            for request in by_age:
                buckets[self.cache.bucket_of(self._tokens(request))].append(request)
            if self._held(buckets) + self._prompt_size().tokens <= self.cache.max_tokens:
                return buckets
            if not all(group and group.running for group in self.prompts):
                self._drop_prompts(lambda group: group.running > 0)
                self._close_gaps()
            elif len(by_age) > 1:
                youngest = by_age.pop()
                self.waiting.pop(youngest.row, None)
                self.extended.pop(youngest.row, None)
                self.buffer.forget(youngest.row)
                self.scheduler.put_back(youngest)
            else:
                return buckets

    def _moves(self, buckets: list[list[ResponseRequest]]) -> list[Move]:
        """Put each of `buckets` in the order of slots that copies least; the copies to make.

        The last bucket comes first: what a response leaves behind is overwritten after it left.
        """
        old = {
            r: (b, slot) for b, bucket in enumerate(self.buckets) for slot, r in enumerate(bucket)
        }
        moves: list[Move] = []
        for target in reversed(range(len(buckets))):
            requests = buckets[target]
            seats: list[ResponseRequest | None] = [None] * len(requests)
            arriving = []
            for request in requests:
                origin, slot = old[request]
                if origin == target and slot < len(seats):
                    seats[slot] = request
                else:
                    arriving.append(request)
            free = [slot for slot, request in enumerate(seats) if request is None]
            for slot, request in zip(free, arriving, strict=True):
                seats[slot] = request
            buckets[target] = [request for request in seats if request]
            moves += self._copies(
                target, [(*old[r], s) for r, s in zip(arriving, free, strict=True)]
            )
        return moves

    def _copies(self, target: int, copies: Sequence[tuple[int, int, int]]) -> Iterator[Move]:
        """Copies (bucket, slot, slot of `target`), those within the bucket first."""
        for origin in sorted({origin for origin, _, _ in copies}, reverse=True):
            pairs = [(slot, seat) for bucket, slot, seat in copies if bucket == origin]
            sources, targets = torch.tensor(pairs, device=self.rows.device).unbind(1)
            yield Move(origin=origin, target=target, sources=sources, targets=targets)

    def _expire(self) -> None:
        """Drop all that depends on the set of running responses, which has changed."""
        self.layout = None
        self._refresh()

    def _refresh(self) -> None:
        """Find the longest response of each bucket again; those that wait do not grow."""
        first = {
            b: min(r.started for r in bucket) for b, bucket in enumerate(self.buckets) if bucket
        }
        self.first_started = first
        full = [started + self.cache.buckets[b].width + 1 for b, started in first.items()]
        capped = [started + self.buffer.ids.shape[1] for started in first.values()]
        self.next_event = min([*full, *capped], default=self.step)

    def _decode(self, ids: Tensor) -> Tensor:
        """Run one token of each response; return the hidden states [R, D] after it."""
        if self.layout is None:
            slots = [request.group.slot for request in self._running()]
            self.layout = Decode(
                self.cache,
                torch.tensor(slots, device=self.rows.device),
                [len(group.ids) if group else 0 for group in self.prompts],
                [(b, len(self.buckets[b])) for b in reversed(self.first_started)],
            )
        columns = self.drawn - 1
        self.layout.at(columns, [self.step - s for s in reversed(self.first_started.values())])
        positions = self.layout.starts + columns
        return run_decoder(
            self.model,
            self.layout,
            self.routers,
            input_ids=ids[:, None],
            position_ids=positions[:, None],
        )[:, 0]


def _chunks(groups: list[Group]) -> Iterator[list[Group]]:
    """Cut `groups` into runs that fit in one forward of prompts."""
    chunk: list[Group] = []
    for group in groups:
        longest = max(len(g.ids) for g in [*chunk, group])
        if chunk and (len(chunk) + 1) * longest > _PREFILL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(group)
    if chunk:
        yield chunk


def _padded(slots: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Cut `slots`, sorted by `lengths`, into runs that fit in one forward when padded."""
    chunk: list[int] = []
    for slot in sorted(slots, key=lambda slot: lengths[slot]):
        if chunk and (len(chunk) + 1) * lengths[slot] > _READ_TOKENS:
            yield chunk
            chunk = []
        chunk.append(slot)
    if chunk:
        yield chunk


def _refuse_other_layers(model: PreTrainedModel, cache: KVCache) -> None:
    """Raise if a layer used no layout because it keeps another kind of state."""
    layers = model.config.get_text_config().num_hidden_layers
    if others := layers - len(cache.layers.keys() | cache.states.prompts.keys()):
        raise ConfigurationError(
            f"model.rollout: HFRollout supports softmax attention, and the linear attention and "
            f"convolutions of Qwen3.5, Qwen3-Next and LFM2; {others} of the {layers} layers of "
            f"{type(model).__name__} have neither: use VLLMRollout"
        )
