"""Attention of transformers models by a layout that the caller passes.

A transformers model calls the attention function that its config names, and passes the keyword
arguments of its forward on to it. `use_layouts` names our function. With an `AttentionLayout` as
`layout` it attends by that layout; without one it attends as `sdpa` does. So trees of prefixes and
decoding from shared prompts run through the model's own layers, also when a layer is recomputed in
the backward. Layers of linear attention and convolution have no such interface: `policy/mixers.py`
subclasses them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from scsdpo.policy.experts import final_states
from scsdpo.policy.layout_contract import AttentionLayout
from scsdpo.policy.mixers import let_mixers_accept_layouts

_NAME = "scsdpo"


def use_layouts(model: PreTrainedModel) -> None:
    """Let the decoder of `model`, which was loaded with sdpa, accept a `layout` in its forward."""
    model.set_attn_implementation(_NAME)
    let_mixers_accept_layouts(model)


def run_decoder(
    model: PreTrainedModel,
    layout: AttentionLayout,
    routers: Sequence[nn.Module] = (),
    **inputs: Tensor,
) -> Tensor:
    """Final hidden states [B, s, D + layers E] under `layout`; for `routers` see `final_states`."""
    # transformers builds no mask of its own where it gets a 4-D one. The layout ignores it.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=model.device)
    return final_states(
        model, routers, attention_mask=mask, use_cache=False, layout=layout, **inputs
    )


@torch.compiler.disable  # a compiled layer would be compiled anew for each forward's layout
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: AttentionLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,  # keywords that models add: dropout, position_ids, ...
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls."""
    if softcap is not None or others.get("position_bias") is not None:
        raise NotImplementedError(
            "model.policy: shared prefixes need plain softmax attention, and this model has "
            "soft-capped scores or position biases: set model.policy.attn_implementation to eager"
        )
    if layout is None and s_aux is not None:
        mixed = attend_beside_sinks(query * scaling, key, value, attention_mask, s_aux)
        return mixed.transpose(1, 2).contiguous(), None
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    index = module.layer_idx
    assert isinstance(index, int)
    mixed = layout.attend(index, query * scaling, key, value, window=sliding_window, sinks=s_aux)
    return mixed.contiguous(), None


def attend_beside_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor
) -> Tensor:
    """Attention of a batch of rows with sinks: one more key a head, whose value is zero.

    Args:
        query: [B, H, n, d], scaled.
        key: [B, K, t, d], K a divisor of H.
        value: [B, K, t, e].
        mask: bool [B or 1, 1, n, t], True where a query sees a key. None: causal if n = t > 1;
            a single query sees all keys.
        sinks: [H] scores of the sinks.

    Returns:
        [B, H, n, e].
    """
    rows, heads, count, _ = query.shape
    if mask is None:
        mask = query.new_ones(count, key.shape[2], dtype=torch.bool)
        mask = mask.tril() if count > 1 else mask
    bias = query.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    bias = bias.expand(rows, heads, count, -1)
    of_sinks = sinks.to(bias.dtype)[:, None, None].expand(rows, -1, count, 1)
    key, value = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, torch.cat([bias, of_sinks], -1), scale=1.0, enable_gqa=True
    )


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
