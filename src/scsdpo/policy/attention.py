"""Mixing of tokens in transformers models, by a layout that the caller gives.

A transformers model calls the attention function that its config names, and hands the keyword
arguments of its forward through to it. `use_layouts` names ours: called with an `AttentionLayout`
as `layout` it attends by that, and without one as `sdpa` does. So trees of prefixes and decoding
from shared prompts run through the model's own layers, also when a layer is recomputed in the
backward. Layers of linear attention and convolution have no such interface: theirs are in
`policy/mixers.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from scsdpo.policy.experts import final_states
from scsdpo.policy.mixers import let_mixers_accept_layouts
from scsdpo.policy.segment_states import DeltaInputs

_NAME = "scsdpo"


class AttentionLayout(ABC):
    """Who attends to whom in one forward of the decoder, and who goes on from whose state."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None
    ) -> Tensor:
        """Attention of one layer; `query` comes scaled.

        Args:
            layer: its index.
            query: [B, H, s, d].
            key: [B, K, s, d], K a divisor of H.
            value: as `key`.
            window: a token sees so many positions, itself included; None: all before it.

        Returns:
            [B, s, H, d].
        """

    @abstractmethod
    def convolve(self, layer: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Causal convolution of one layer: y_t = bias + sum_j weight_j x_(t - k + 1 + j).

        Args:
            layer: its index.
            inputs: [B, s, C].
            weight: [C, k].
            bias: [C].

        Returns:
            [B, s, C].
        """

    @abstractmethod
    def delta_rule(self, layer: int, inputs: DeltaInputs) -> Tensor:
        """Gated delta rule of one layer (`SegmentStates.delta_rule`), after its `convolve`.

        Args:
            layer: its index.
            inputs: [B, s, ...].

        Returns:
            [B, s, H, e].
        """


def use_layouts(model: PreTrainedModel) -> None:
    """Let `model` (loaded with sdpa) accept a `layout` in its decoder's forward."""
    model.set_attn_implementation(_NAME)
    let_mixers_accept_layouts(model)


def run_decoder(
    model: PreTrainedModel,
    layout: AttentionLayout,
    routers: Sequence[nn.Module] = (),
    **inputs: Tensor,
) -> Tensor:
    """Final hidden states of the decoder under `layout`; `final_states` says what of `routers`."""
    # A 4-D mask is taken as it is: the layout knows better, and none is built.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=model.device)
    return final_states(
        model, routers, attention_mask=mask, use_cache=False, layout=layout, **inputs
    )


@torch.compiler.disable  # lest a compiled layer specialise on a layout: each forward has its own
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
    **others: Any,  # what every model sends along: dropout, position_ids, ...
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    if softcap is not None or s_aux is not None or others.get("position_bias") is not None:
        raise NotImplementedError(
            "shared prefixes need plain softmax attention; this model has soft-capped scores, "
            "attention sinks or position biases: set model.policy.attn_implementation to eager"
        )
    index = module.layer_idx
    assert isinstance(index, int)
    mixed = layout.attend(index, query * scaling, key, value, window=sliding_window)
    return mixed.contiguous(), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
