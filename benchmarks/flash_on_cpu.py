"""torch's two FlashAttention operators, emulated on CPU by their formulas.

They are put into torch's own dispatcher, so that the library calls them as it does on a GPU, and a
count of operators sees one for each call.
"""

from contextlib import contextmanager
from itertools import pairwise

import torch


def _scores(query, key, first, last, causal, scale, left):
    """[H, n, t] of queries `first` and keys `last`, float64."""
    groups = query.shape[1] // key.shape[1]
    many = key[last].double().repeat_interleave(groups, 1)
    scores = scale * torch.einsum("nhd,thd->hnt", query[first].double(), many)
    n, t = scores.shape[1:]
    back = torch.arange(n)[:, None] + (t - n) - torch.arange(t)  # from the end of the keys
    hidden = torch.zeros(n, t, dtype=torch.bool)
    if causal:
        hidden |= back < 0
    if left is not None:
        hidden |= back > left
    return scores.masked_fill(hidden, -torch.inf)


def _runs(starts, longest):
    """Slices, as told by int32 starts on the device."""
    assert starts.dtype == torch.int32
    slices = [slice(*pair) for pair in pairwise(starts.tolist())]
    assert longest >= max(s.stop - s.start for s in slices)
    return slices


def _forward(
    query,
    key,
    value,
    query_starts,
    key_starts,
    most_queries,
    most_keys,
    dropout,
    causal,
    debug,
    *,
    scale,
    window_size_left=None,
    **others,
):
    assert not dropout and not debug and not others and most_queries > 1
    assert all(x.stride(-1) == 1 and x.dtype == query.dtype for x in (query, key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=wide)
    pairs = zip(_runs(query_starts, most_queries), _runs(key_starts, most_keys), strict=True)
    for first, last in pairs:
        scores = _scores(query, key, first, last, causal, scale, window_size_left)
        lse[:, first] = scores.logsumexp(-1)
        groups = query.shape[1] // key.shape[1]
        many = value[last].double().repeat_interleave(groups, 1)
        out[first] = torch.einsum("hnt,thd->nhd", scores.softmax(-1), many).to(out.dtype)
    state = torch.empty(2, dtype=torch.uint64)
    return out, lse, state, torch.empty((), dtype=torch.uint64), query.new_empty(0)


def _backward(
    grad,
    query,
    key,
    value,
    out,
    lse,
    query_starts,
    key_starts,
    most_queries,
    most_keys,
    dropout,
    causal,
    state,
    unused,
    *,
    scale,
    window_size_left=None,
    **others,
):
    assert not dropout and not others
    assert all(x.dtype == query.dtype for x in (grad, key, value, out))
    assert lse.shape == (query.shape[1], len(query)) and lse.is_contiguous()
    made = [torch.empty_like(x) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    pairs = zip(_runs(query_starts, most_queries), _runs(key_starts, most_keys), strict=True)
    for first, last in pairs:
        scores = _scores(query, key, first, last, causal, scale, window_size_left)
        weights = (scores - lse[:, first, None].double()).exp()
        here, mixed = grad[first].double(), out[first].double()
        keys, values = (x[last].double().repeat_interleave(groups, 1) for x in (key, value))
        of_weights = torch.einsum("nhd,thd->hnt", here, values)
        of_scores = scale * weights * (of_weights - (here * mixed).sum(-1).T[..., None])
        made[0][first] = torch.einsum("hnt,thd->nhd", of_scores, keys).to(query.dtype)
        of_keys = torch.einsum("hnt,nhd->thd", of_scores, query[first].double())
        of_values = torch.einsum("hnt,nhd->thd", weights, here)
        for table, gradient in zip(made[1:], (of_keys, of_values), strict=True):
            table[last] = gradient.unflatten(1, (-1, groups)).sum(2).to(table.dtype)
    return tuple(made)


@contextmanager
def emulated_flash():
    """The operators run on CPU, in any dtype."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield
    finally:
        library._destroy()
