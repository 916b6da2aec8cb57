"""Layers that carry a state from token to token, over a tree of segments laid end to end.

A short causal convolution reads the k - 1 inputs before a token. The gated delta rule reads and
writes a matrix. A segment and each of its siblings start with the state after the segment above
them, as if both stood in one row. All operations are differentiable: a state with which several
segments start gets the sum of their gradients.

Shapes: N tokens, S segments, E segments above that ran in an earlier forward, C channels, k the
width of the convolution, H heads, d size of a key, e of a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from scsdpo.policy.transfer import upload

_CHUNKS = (64, 32, 16)
"""Sizes of chunks: tokens whose updates of the state are one product. Small chunks pad less."""
_CHUNK_COST = 32
"""Fixed cost of a chunk, which reads and writes a state, in places of a chunk."""


@dataclass(frozen=True, slots=True)
class Span:
    """A segment of the flat sequence, and the state with which it starts."""

    start: int
    """Place of its first token."""
    length: int
    """At least 1."""
    above: int | None
    """Number of the span above it in this forward; None: there is none."""
    earlier: int | None = None
    """If `above` is None: number of the state of an earlier forward with which it starts; None: it
    starts with zeros."""


class DeltaInputs(NamedTuple):
    """Arguments of the gated delta rule, with any leading shape."""

    query: Tensor
    """[..., K, d], K a divisor of H."""
    key: Tensor
    """[..., K, d]."""
    value: Tensor
    """[..., H, e]."""
    decay: Tensor
    """[..., H], g <= 0: the logarithm of the factor by which a state fades."""
    rate: Tensor
    """[..., H], b in (0, 1): how much of the new value is written."""


class SegmentStates:
    """Convolution and delta rule of one forward over `spans`.

    Args:
        spans: each after the one above it; they do not overlap.
        tokens: N, with places that are in no span; outputs there are arbitrary and finite.
        device: the model's.
    """

    def __init__(self, spans: Sequence[Span], tokens: int, device: torch.device) -> None:
        self.spans, self.tokens, self.device = spans, tokens, device
        numbers = [span.earlier for span in spans if span.earlier is not None]
        self._earlier = max(numbers, default=-1) + 1
        self._histories: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def convolve(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal convolution: y_t = bias + sum_j weight_j x_(t - k + 1 + j).

        Args:
            inputs: [N, C].
            weight: [C, k].
            bias: [C].
            before: [E, k - 1, C]; None if E = 0.

        Returns:
            [N, C], and the k - 1 inputs before the end of each segment [S, k - 1, C], with which
            the segments below it start.
        """
        width = weight.shape[1]
        padded, outputs, ends = self._history(width)
        zero = inputs.new_zeros(1, inputs.shape[1])
        tables = [inputs, zero]
        if before is not None:
            tables.append(before.to(inputs.dtype).flatten(0, 1))
        table = torch.cat(tables)
        rows = table.index_select(0, padded)
        weight, bias = weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)
        mixed = _convolved(rows.T[None], weight, bias)[0].T
        return mixed.index_select(0, outputs), table.index_select(0, ends).unflatten(
            0, (len(self.spans), width - 1)
        )

    def _history(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Three indices for `convolve`, where a table is [inputs, zero, before].

        The first picks, for each segment, its history and then its own inputs from the table. The
        second [N] picks the outputs that are wanted. The third picks, for each segment, its last
        k - 1 inputs from the table.
        """
        if width not in self._histories:
            padded: list[Tensor] = []
            ends: list[list[int]] = []
            outputs = torch.zeros(self.tokens, dtype=torch.long)
            done, past = 0, width - 1
            for span in self.spans:
                if span.above is not None:
                    history = ends[span.above]
                elif span.earlier is not None:
                    first = self.tokens + 1 + span.earlier * past
                    history = list(range(first, first + past))
                else:
                    history = [self.tokens] * past
                own = torch.arange(span.start, span.start + span.length)
                outputs[own] = torch.arange(done, done + span.length)
                padded += [torch.tensor(history, dtype=torch.long), own]
                done += past + span.length
                last = own[-past:].tolist() if past else []
                ends.append((history + last)[len(last) :])
            of_ends = torch.tensor(ends, dtype=torch.long).flatten()
            rows, wanted, tails = upload([torch.cat(padded), outputs, of_ends], self.device)
            self._histories[width] = rows, wanted, tails
        return self._histories[width]

    def delta_rule(
        self,
        inputs: DeltaInputs,
        before: Tensor | None,
        *,
        ends: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gated delta rule. o_t = M_t^T q_t,

            M_t = e^(g_t) M_(t-1) + b_t k_t (v_t - e^(g_t) M_(t-1)^T k_t)^T

        with k and q scaled to length 1, and q then divided by sqrt(d).

        Args:
            inputs: [N, ...].
            before: [E, H, d, e], M after the segments above that ran earlier; None if E = 0.
            ends: return M after each segment.

        Returns:
            [N, H, e], and M after each segment [S, H, d, e], or [0, ...], in float32 or wider.

        Source:
            Yang et al. 2024, arXiv:2412.06464, eq. (10); in chunks as in their section 3.3.
        """
        work = self._delta_rule_by_levels if _has("fla", self.device) else self._delta_rule
        return work(inputs, before, ends)

    def _delta_rule(
        self,
        inputs: DeltaInputs,
        before: Tensor | None,
        ends: bool,
    ) -> tuple[Tensor, Tensor]:
        query, key, value, decay, rate = inputs
        with torch.autocast(self.device.type, enabled=False):
            chunks = self._chunks
            wide = torch.promote_types(value.dtype, torch.float32)
            heads, size, width = value.shape[1], key.shape[2], value.shape[2]
            # [M, H, c, ...], M chunks of c places.
            queries, keys = (
                chunks.take(unit(x.to(wide))).repeat_interleave(heads // key.shape[1], 1)
                for x in (query, key)
            )
            queries = queries * size**-0.5
            values = chunks.take(value.to(wide))
            # A padded place changes no state.
            decays, rates = (chunks.take(x.to(wide)) * chunks.real for x in (decay, rate))
            total = decays.cumsum(-1)
            fade = total[..., None] - total[..., None, :]
            fade = fade.masked_fill(chunks.later, -torch.inf).exp()
            weights = (queries @ keys.mT) * fade
            # A place writes its value less what earlier places of the chunk wrote for its key: a
            # triangular system.
            rated = keys * rates[..., None]
            sides = torch.cat([values * rates[..., None], rated * total.exp()[..., None]], -1)
            solved = torch.linalg.solve_triangular(
                (rated @ keys.mT) * fade, sides, upper=False, unitriangular=True
            )
            written, read = solved.split([width, size], -1)
            queries = queries * total.exp()[..., None]
            keys = (keys * (total[..., -1:] - total).exp()[..., None]).mT
            kept = total[..., -1].exp()[..., None, None]
            states = torch.zeros(1, heads, size, width, dtype=wide, device=self.device)
            if before is not None:
                states = torch.cat([states, before.to(wide)])
            outputs, lasts = [], [states[:0]]
            for step in chunks.steps:
                here, states = step.chunks, states.index_select(0, step.starts)
                new = written[here] - read[here] @ states
                outputs.append(queries[here] @ states + weights[here] @ new)
                states = states * kept[here] + keys[here] @ new
                if ends and len(step.ends):
                    lasts.append(states.index_select(0, step.ends))
            table = torch.cat(outputs).transpose(1, 2).flatten(0, 1)
            result = table.index_select(0, chunks.outputs).to(value.dtype)
            last = torch.cat(lasts)
            return result, last.index_select(0, chunks.order) if ends else last

    def _delta_rule_by_levels(
        self,
        inputs: DeltaInputs,
        before: Tensor | None,
        ends: bool,
    ) -> tuple[Tensor, Tensor]:
        """`delta_rule` by the kernel of flash-linear-attention, one call for each tree level."""
        kernel = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        query, key, value, decay, rate = inputs
        heads, size, width = value.shape[1], key.shape[2], value.shape[2]
        query, key = (x.repeat_interleave(heads // key.shape[1], 1) for x in (query, key))
        first = torch.zeros(1, heads, size, width, dtype=torch.float32, device=self.device)
        states = first if before is None else torch.cat([first, before.float()])
        result = torch.zeros_like(value)
        for level in self._levels:
            q, k, v, g, beta = (x[None, level.places] for x in (query, key, value, decay, rate))
            mixed, last = kernel(
                q,
                k,
                v,
                g=g,
                beta=beta,
                initial_state=states[level.starts],
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
                cu_seqlens=level.borders,
            )
            result = result.index_copy(0, level.places, mixed[0].to(value.dtype))
            states = torch.cat([states, last])
        return result, states[1 + self._earlier :][self._by_level] if ends else states[:0]

    @cached_property
    def _chunks(self) -> "_Chunks":
        return _Chunks(self.spans, self.tokens, self.device)

    @cached_property
    def _levels(self) -> list["_Level"]:
        return _levels(self.spans, 1 + self._earlier, self.device)

    @cached_property
    def _by_level(self) -> Tensor:
        """[S] for each span, the place of its state when those of the levels are concatenated."""
        depth = _depths(self.spans)
        order = sorted(range(len(depth)), key=depth.__getitem__)
        return torch.tensor(order, device=self.device).argsort()


def unit(vectors: Tensor) -> Tensor:
    """[..., d] scaled to length 1, up to an epsilon as in flash-linear-attention."""
    return vectors * (vectors.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def convolve_one(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor]:
    """`SegmentStates.convolve` for one token of each of R rows.

    Args:
        inputs: [R, C].
        weight: [C, k].
        bias: [C].
        before: [R, k - 1, C], inputs of the tokens before.

    Returns:
        [R, C], and the new `before`.
    """
    window = torch.cat([before, inputs[:, None]], 1)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    mixed = (window.to(wide) * weight.to(inputs.dtype).T).sum(1)
    if bias is not None:
        mixed += bias.to(inputs.dtype)
    return mixed.to(inputs.dtype), window[:, 1:]


def delta_rule_one(inputs: DeltaInputs, state: Tensor) -> Tensor:
    """`SegmentStates.delta_rule` for one token of each of R rows.

    Args:
        inputs: [R, ...].
        state: [R, H, d, e]; updated in place.

    Returns:
        [R, H, e].
    """
    query, key, value, decay, rate = inputs
    with torch.autocast(query.device.type, enabled=False):
        rows, heads, size, width = state.shape
        query, key = (
            unit(x.to(state.dtype)).repeat_interleave(heads // x.shape[1], 1) for x in (query, key)
        )
        state.mul_(decay.to(state.dtype).exp()[..., None, None])
        read = (key[..., None, :] @ state)[..., 0, :]
        new = rate.to(state.dtype)[..., None] * (value.to(state.dtype) - read)
        flat = state.view(rows * heads, size, width)
        flat.baddbmm_(key.reshape(-1, size, 1), new.reshape(-1, 1, width))
        return (query[..., None, :] * size**-0.5 @ state)[..., 0, :].to(value.dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Step:
    """Chunks that have equally many chunks above them. They run together."""

    chunks: slice
    starts: Tensor
    """[m] for each chunk, the index of its first state among the states of the step before."""
    ends: Tensor
    """Indices of those of the m states that stand at the end of a segment."""


class _Chunks:
    """Segments cut into M chunks of c places, in the order in which they run.

    `outputs` [N] is each token's place among the M * c places. `order` [S] is the place of the
    state after each span when those of the steps are concatenated.
    """

    def __init__(self, spans: Sequence[Span], tokens: int, device: torch.device) -> None:
        lengths = torch.tensor([span.length for span in spans])
        size = min(_CHUNKS, key=lambda c: int((lengths.add(c - 1) // c).sum()) * (c + _CHUNK_COST))
        # For each step: (span, number of the chunk in it, index of its first state).
        steps: list[list[tuple[int, int, int]]] = []
        ended: list[tuple[int, int]] = []
        """For each span: the step of its last chunk, and its place there."""
        for number, span in enumerate(spans):
            step, start = -1, _first(span.earlier)
            if span.above is not None:
                step, start = ended[span.above]
            for chunk in range(-(-span.length // size)):
                step += 1
                if step == len(steps):
                    steps.append([])
                steps[step].append((number, chunk, start))
                start = len(steps[step]) - 1
            ended.append((step, start))
        chunks = [chunk for step in steps for chunk in step]
        first = torch.tensor([spans[n].start + chunk * size for n, chunk, _ in chunks])
        count = torch.tensor([min(size, spans[n].length - chunk * size) for n, chunk, _ in chunks])
        real = torch.arange(size) < count[:, None]
        places = first[:, None] + torch.minimum(torch.arange(size), count[:, None] - 1)
        outputs = torch.zeros(tokens, dtype=torch.long)
        outputs[places[real]] = real.flatten().nonzero()[:, 0]
        ends = [[n for n, (at, _) in enumerate(ended) if at == step] for step in range(len(steps))]
        order = torch.tensor([n for of in ends for n in of]).argsort()
        starts = [torch.tensor([start for _, _, start in step]) for step in steps]
        of_ends = [torch.tensor([ended[n][1] for n in of], dtype=torch.long) for of in ends]
        tables = [places.flatten(), real.flatten().long(), outputs, order, *starts, *of_ends]
        flat, is_real, self.outputs, self.order, *rest = upload(tables, device)
        self._places = flat.view(-1, size)
        self.real = is_real.bool().view(-1, 1, size)
        """[M, 1, c]: True where a place is not padding."""
        self.later = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
        borders = list(accumulate(map(len, steps), initial=0))
        self.steps = [
            _Step(chunks=slice(*border), starts=start, ends=end)
            for border, start, end in zip(
                pairwise(borders), rest[: len(steps)], rest[len(steps) :], strict=True
            )
        ]

    def take(self, rows: Tensor) -> Tensor:
        """[N, H, ...] -> [M, H, c, ...]; a padded place repeats the last token."""
        taken = rows.index_select(0, self._places.flatten())
        return taken.unflatten(0, self._places.shape).transpose(1, 2)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Level:
    """Spans that have equally many spans above them."""

    places: Tensor
    """[n] places of their tokens, span after span."""
    borders: Tensor
    """[spans + 1] int32: where each span begins in `places`, and n."""
    starts: Tensor
    """[spans] index of each span's first state in [zeros, `before`, states of earlier levels]."""


def _levels(spans: Sequence[Span], states: int, device: torch.device) -> list[_Level]:
    """The spans by depth; `states` is the number of states before the first level runs."""
    depths = _depths(spans)
    levels: list[_Level] = []
    number: dict[int, int] = {}
    for depth in range(max(depths) + 1):
        here = [n for n, d in enumerate(depths) if d == depth]
        starts = []
        for i, n in enumerate(here):
            above, earlier = spans[n].above, spans[n].earlier
            starts.append(number[above] if above is not None else _first(earlier))
            number[n] = states + i
        states += len(here)
        places = [torch.arange(spans[n].start, spans[n].start + spans[n].length) for n in here]
        borders = torch.tensor([0, *(len(p) for p in places)]).cumsum(0)
        levels.append(
            _Level(
                places=torch.cat(places).to(device),
                borders=borders.to(device, torch.int32),
                starts=torch.tensor(starts, device=device),
            )
        )
    return levels


def _first(earlier: int | None) -> int:
    """Index of a span's first state in [zeros, states of earlier forwards]."""
    return 0 if earlier is None else 1 + earlier


def _depths(spans: Sequence[Span]) -> list[int]:
    """[S] number of spans above each span in this forward."""
    depths: list[int] = []
    for span in spans:
        depths.append(0 if span.above is None else depths[span.above] + 1)
    return depths


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _has(package: str, device: torch.device) -> bool:
    """True if `package` is installed and has kernels for `device`."""
    return device.type == "cuda" and _installed(package)


def _convolved(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[1, C, n] -> [1, C, n - k + 1], each output from its k inputs; channels are contiguous."""
    channels, width = weight.shape
    # The kernel supports these widths, and in this layout multiples of 8 channels.
    if _has("causal_conv1d", rows.device) and 2 <= width <= 4 and channels % 8 == 0:
        kernel = import_module("causal_conv1d").causal_conv1d_fn
        return kernel(rows, weight, bias)[..., width - 1 :]
    return conv1d(rows, weight[:, None], bias, groups=len(weight))
