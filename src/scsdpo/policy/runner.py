"""Forwards and backwards over the responses of an optimizer step, in micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from scsdpo.distributed import all_max
from scsdpo.policy.adapter import with_head
from scsdpo.policy.attention import run_decoder
from scsdpo.policy.experts import routers, split_states
from scsdpo.policy.layout import Kept, PackedSegments, PastSegment
from scsdpo.policy.rows import Rows, separate_rows
from scsdpo.policy.segment_attention import PastKeyValues
from scsdpo.policy.transfer import upload
from scsdpo.policy.tree import SHORTEST_SHARED, Piece, Segment, pieces, prefix_tree

T = TypeVar("T")
Loss = Callable[[Tensor, nn.Linear], T]
"""Takes hidden states [N, D], which predict N sampled tokens, and the head."""
Within = Callable[[Callable[[PreTrainedModel], T]], T]
"""Calls its argument with the model while the right weights are active and gathered."""


class Runner(ABC):
    """Runs some responses of a step, each after its prompt, under one set of weights.

    Losses and gradients equal those of separate rows, whatever the micro-batches.

    Args:
        watches: record the logits of the routers of experts (`routes`).
    """

    routes: Tensor
    """[N, layers, E] logits of the routers at the sampled tokens of the last micro-batch; `loss`
    may read it. layers is 0 if `watches` is false."""

    def __init__(self, *, watches: bool) -> None:
        self._watches = watches

    def _routers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return routers(model) if self._watches else ()

    def _end(self, model: PreTrainedModel, states: Tensor, loss: Loss[T]) -> T:
        """`loss` of the final states [N, ...] of a micro-batch."""
        layers = len(self._routers(model))
        width = model.config.get_text_config().hidden_size if layers else states.shape[-1]
        hidden, self.routes = split_states(states, layers, width)
        return loss(*with_head(model, hidden))

    @abstractmethod
    def micro_batches(self) -> list[list[int]]:
        """Each chosen row once. Rows ascend within a micro-batch.

        If weights are sharded, every rank gets equally many; some ranks' last ones are empty.
        """

    @abstractmethod
    def run(self, micro: Sequence[int], loss: Loss[T]) -> T:
        """Run the rows of `micro`; return `loss(hidden states in row-major order, head)`."""

    @abstractmethod
    def done(self, micro: Sequence[int]) -> None:
        """Say that these rows will not run again. Call it after their backward, if there is one."""


class SeparateRows(Runner):
    """Runs each response with its prompt as a row of its own. It works for every causal model.

    Args:
        within: calls work with the model and its weights.
        rows: the step's responses.
        chosen: the rows to run.
        budget: tokens of a micro-batch; a row that exceeds it alone is a micro-batch of its own.
        lockstep: every rank must run equally many forwards and backwards, because weights are
            sharded.
        alone: True: each row is a forward of its own; False: rows of a micro-batch are padded.
        watches: record the logits of the routers of experts.
    """

    def __init__(
        self,
        within: Within[Any],
        rows: Rows,
        chosen: Sequence[int],
        budget: int,
        *,
        lockstep: bool = False,
        alone: bool = False,
        watches: bool = False,
    ) -> None:
        super().__init__(watches=watches)
        self._within, self._rows, self._chosen, self._budget = within, rows, chosen, budget
        self._lockstep, self._alone = lockstep, alone

    def micro_batches(self) -> list[list[int]]:
        """Rows sorted by length, longest first, because rows are padded to the longest of them."""
        lengths = self._rows.present.sum(-1).tolist()
        sizes = {row: len(self._rows.prompts[row]) + lengths[row] for row in self._chosen}
        longest_first = sorted(sizes, key=lambda row: (-sizes[row], row))
        return _padded(filled(longest_first, sizes, self._budget), self._lockstep)

    def run(self, micro: Sequence[int], loss: Loss[T]) -> T:
        forwards = [[row] for row in micro] if self._alone else [list(micro)] if micro else []
        most = max(len(forwards), 1)
        if self._alone and self._lockstep:
            most = int(all_max(torch.tensor(most)))
        batches = [self._rows.at(each) for each in forwards]
        batches += [self._rows.nothing()] * (most - len(batches))

        def work(model: PreTrainedModel) -> T:
            watched = self._routers(model)
            states = [separate_rows(model, rows, watched) for rows in batches]
            return self._end(model, torch.cat(states), loss)

        return self._within(work)

    def done(self, micro: Sequence[int]) -> None:
        pass


class SharedPrompts(Runner):
    """Runs every common start of prompts once, forward and backward, whatever the budget.

    Prompts run in pieces. A piece leaves keys, values and states. Its responses attend to these
    and go on from them, micro-batch by micro-batch. Their gradients with respect to them are
    summed, and go through the piece's graph in one backward after its last response is done.

    If weights are sharded, every forward and backward is a collective. A rank with fewer pieces or
    micro-batches then runs one token instead, without a gradient. No graph is kept from one forward
    to a later one: a piece runs again for its backward.

    Args:
        within: calls work with the model and its weights.
        rows: the step's responses.
        chosen: the rows to run.
        budget: tokens whose activations are alive at a time, prompts and responses together.
        lockstep: every rank must run equally many forwards and backwards, because weights are
            sharded.
        learns: these weights get a gradient.
        watches: record the logits of the routers of experts.
    """

    def __init__(
        self,
        within: Within[Any],
        rows: Rows,
        chosen: Sequence[int],
        budget: int,
        *,
        lockstep: bool = False,
        learns: bool = True,
        watches: bool = False,
    ) -> None:
        super().__init__(watches=watches)
        self._within, self._lockstep = within, lockstep
        self._runs_again = lockstep and learns and torch.is_grad_enabled()
        self._nothing = Segment((rows.pad_id,))
        roots, ends = prefix_tree(
            [rows.prompts[row] for row in chosen], max(budget, SHORTEST_SHARED)
        )
        self._pieces = list(pieces(roots, budget))
        self._piece_of = {s: i for i, piece in enumerate(self._pieces) for s in piece.segments}
        ranks = {segment: rank for rank, segment in enumerate(self._piece_of)}
        # Rows in the order of the tree: responses to one prompt follow one another.
        self._ends = {row: ends[rows.prompts[row]] for row in chosen}
        self._rank = {row: (ranks[end], row) for row, end in self._ends.items()}
        lengths, ids, sampled = (t.tolist() for t in (rows.present.sum(-1), rows.ids, rows.sampled))
        self._ids = {row: tuple(ids[row][: lengths[row]]) for row in chosen}
        self._predicted = {row: [t for t, of in enumerate(sampled[row]) if of] for row in chosen}
        self._waiting: list[set[int]] = [set() for _ in self._pieces]
        for row, end in self._ends.items():
            for segment in end.line:
                self._waiting[self._piece_of[segment]].add(row)
        self._running: dict[int, _Running] = {}
        self._places: dict[Segment, PastSegment] = {}

    def micro_batches(self) -> list[list[int]]:
        lengths = {row: len(ids) for row, ids in self._ids.items()}
        ending: list[list[int]] = [[] for _ in self._pieces]
        for row in sorted(self._ends, key=self._rank.__getitem__):
            ending[self._piece_of[self._ends[row]]].append(row)
        batches = [
            batch
            for piece, rows in zip(self._pieces, ending, strict=True)
            for batch in filled(rows, lengths, piece.room)
        ]
        return _padded(batches, self._lockstep)

    def run(self, micro: Sequence[int], loss: Loss[T]) -> T:
        above = {self._piece_of[segment] for row in micro for segment in self._ends[row].line}
        new = sorted(above - self._running.keys())  # ascending: pieces above come first
        idle = self._idle(len(new))
        for i in new:
            self._start(i)
        for _ in range(idle):
            self._run_nothing()
        return self._within(lambda model: self._end(model, self._hidden_states(model, micro), loss))

    def done(self, micro: Sequence[int]) -> None:
        for waiting in self._waiting:
            waiting.difference_update(micro)
        # Descending: a piece sends its gradients to those above it first.
        over = [i for i in sorted(self._running, reverse=True) if not self._waiting[i]]
        idle = self._idle(len(over)) if self._runs_again else 0
        for i in over:
            for segment in self._pieces[i].segments:
                del self._places[segment]
            self._running.pop(i).backward()
        for _ in range(idle):
            self._run_nothing().sum().backward()

    def _idle(self, busy: int) -> int:
        """Number of forwards or backwards of one token that this rank must add, so that every rank
        runs equally many; each is a collective under FSDP2.
        """
        return int(all_max(torch.tensor(busy))) - busy if self._lockstep else 0

    def _run_nothing(self) -> Tensor:
        return self._within(lambda model: self._hidden_states(model, []))

    def _start(self, i: int) -> None:
        piece = self._pieces[i]

        def work(model: PreTrainedModel) -> tuple[Tensor, Kept]:
            if piece.kept or self._runs_again or not torch.is_grad_enabled():
                return self._run_prompts(model, piece)
            return checkpoint(self._run_prompts, model, piece, use_reentrant=False)

        run = partial(self._within, work)
        running = _RunAgain(run) if self._runs_again else _Running(*run())
        self._running[i] = running
        start = 0
        for number, segment in enumerate(piece.segments):
            tokens = slice(start, start + len(segment.ids))
            self._places[segment] = PastSegment(running.keys, tokens, running.states, number)
            start += len(segment.ids)

    def _run_prompts(self, model: PreTrainedModel, piece: Piece) -> tuple[Tensor, Kept]:
        """[S, D] hidden states that predict the token after each of S segments, and its `Kept`."""
        layout = PackedSegments(piece.segments, self._places, model.device, keep=True)
        hidden = run_decoder(
            model,
            layout,
            self._routers(model),
            input_ids=layout.ids[None],
            position_ids=layout.positions[None],
        )
        last = [layout.span(segment).stop - 1 for segment in piece.segments]
        (places,) = upload([torch.tensor(last)], hidden.device)
        return nn.functional.embedding(places, hidden[0]), layout.kept()

    def _hidden_states(self, model: PreTrainedModel, micro: Sequence[int]) -> Tensor:
        """[N, D] hidden states that predict the sampled tokens of `micro`, in row-major order."""
        # No state is needed after the last token of a response, so it is not run.
        leaves = {row: Segment(self._ids[row][:-1], self._ends[row].line) for row in micro}
        tables, starts, total = [], {}, 0
        for i in sorted({self._piece_of[self._ends[row]] for row in micro}):
            starts[i] = total
            tables.append(self._running[i].last)
            total += len(tables[-1])
        packed = [leaves[row] for row in sorted(micro, key=self._rank.__getitem__)]
        packed = [leaf for leaf in packed if leaf.ids]
        if self._lockstep and not packed:
            packed = [self._nothing]
        if packed:
            layout = PackedSegments(packed, self._places, model.device, keep=False)
            hidden = run_decoder(
                model,
                layout,
                self._routers(model),
                input_ids=layout.ids[None],
                position_ids=layout.positions[None],
            )
            tables.append(hidden[0])
        predicts = []
        for row in micro:
            # The prompt's last state predicts token 0, the state at token t - 1 predicts token t.
            i = self._piece_of[self._ends[row]]
            first = starts[i] + self._pieces[i].segments.index(self._ends[row])
            start = total + layout.span(leaves[row]).start if leaves[row].ids else 0
            predicts += [start + t - 1 if t else first for t in self._predicted[row]]
        (places,) = upload([torch.tensor(predicts, dtype=torch.long)], model.device)
        return nn.functional.embedding(places, torch.cat(tables))


class _Running:
    """A piece of prompts that ran, and the gradients that its responses send to it.

    Args:
        last: [S, D] hidden states that predict the token after each segment.
        kept: its keys, values and states.
        learns: collect gradients although `last` and `kept` have no graph.
    """

    def __init__(self, last: Tensor, kept: Kept, *, learns: bool = False) -> None:
        self.keys = PastKeyValues(kept.attention)
        self.last = _leaf(last, last.dtype, learns)
        self.states = {
            layer: tuple(_leaf(x, torch.promote_types(x.dtype, torch.float32), learns) for x in of)
            for layer, of in kept.states.items()
        }
        """Layer -> its states. They are leaves, so that the gradients of responses add up there."""
        self._roots, self._kept = last, kept

    def backward(self) -> None:
        """Run the backward of the piece with the gradients that its responses sent to it."""
        leaves = [self.last, *(leaf for of in self.states.values() for leaf in of)]
        if self.keys.gradients or any(leaf.grad is not None for leaf in leaves):
            self._send_back()

    def _send_back(self) -> None:
        # The last hidden states are always among the roots: FSDP2 gathers weights for a backward
        # when a gradient enters through the forward's output.
        of_last = torch.zeros_like(self.last) if self.last.grad is None else self.last.grad
        pairs = [(self._roots, of_last)]
        for layer, sums in self.keys.gradients.items():
            pairs += zip(self._kept.attention[layer], sums, strict=True)
        for layer, leaves in self.states.items():
            of_layer = zip(self._kept.states[layer], leaves, strict=True)
            pairs += [(root, leaf.grad) for root, leaf in of_layer if leaf.grad is not None]
        learned = [(root, sums.to(root.dtype)) for root, sums in pairs if root.requires_grad]
        torch.autograd.backward([root for root, _ in learned], [sums for _, sums in learned])


class _RunAgain(_Running):
    """A piece that keeps no graph, and runs again for its backward.

    Args:
        run: the piece's forward.
    """

    def __init__(self, run: Callable[[], tuple[Tensor, Kept]]) -> None:
        # Seeded, so that dropout draws the same in both runs.
        self._run, self._seed = run, int(torch.randint(2**62, ()))
        with torch.no_grad():
            made = self._drawn()
        super().__init__(*made, learns=True)

    def backward(self) -> None:
        self._roots, self._kept = self._drawn()
        self._send_back()

    def _drawn(self) -> tuple[Tensor, Kept]:
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            return self._run()


def _leaf(root: Tensor, dtype: torch.dtype, learns: bool) -> Tensor:
    """A leaf with the values of `root`; its gradient is passed on to `root` by hand."""
    return root.detach().to(dtype).requires_grad_(learns or root.requires_grad)


def _padded(batches: list[list[int]], lockstep: bool) -> list[list[int]]:
    """`batches` with empty ones at the end, so that every rank has equally many."""
    most = int(all_max(torch.tensor(len(batches)))) if lockstep else len(batches)
    return batches + [[] for _ in range(most - len(batches))]


def filled(rows: Sequence[int], sizes: Mapping[int, int], budget: int) -> list[list[int]]:
    """Cut `rows`, in their order, into batches of at most `budget`; a larger row goes alone."""
    batches: list[list[int]] = []
    total = 0
    for row in rows:
        if batches and total + sizes[row] <= budget:
            batches[-1].append(row)
            total += sizes[row]
        else:
            batches.append([row])
            total = sizes[row]
    return [sorted(batch) for batch in batches]
