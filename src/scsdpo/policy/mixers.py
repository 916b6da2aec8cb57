"""Layers of transformers that mix tokens without attention, made to accept a layout.

transformers has an interface to replace attention, but none for these layers. So their classes are
subclassed in place. Called with a `layout`, a layer convolves and recurs by that layout, with its
own weights and adapters; without one it does what it did before. What a layer computes between its
projections is large but cheap, so the backward recomputes it from the output of the first
projection.

    Qwen3.5, Qwen3-Next   short convolution, then the gated delta rule
    LFM2                  a gated short convolution
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from scsdpo.errors import ConfigurationError
from scsdpo.policy.layout_contract import AttentionLayout
from scsdpo.policy.segment_states import DeltaInputs


class _GatedDeltaNet(nn.Module):
    """Qwen3.5's linear attention."""

    layer_idx: int
    conv1d: nn.Conv1d
    activation: str
    key_dim: int
    value_dim: int
    head_k_dim: int
    head_v_dim: int
    A_log: Tensor
    dt_bias: Tensor
    norm: nn.Module
    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module
    out_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        layout: AttentionLayout | None = None,
        **others: Any,
    ) -> Any:
        if layout is None:
            return super().forward(hidden_states, *args, **others)
        return _computed_again(partial(self._mixed, layout), *self._projected(hidden_states))

    def _mixed(
        self, layout: AttentionLayout, mixed: Tensor, gate: Tensor, rate: Tensor, decay: Tensor
    ) -> Tensor:
        """The layer's output [B, s, D], from the output of `_projected`."""
        mixed = _convolve(layout, self.layer_idx, mixed, self.conv1d)
        query, key, value = ACT2FN[self.activation](mixed).split(
            [self.key_dim, self.key_dim, self.value_dim], -1
        )
        wide = torch.promote_types(decay.dtype, torch.float32)
        decay = -self.A_log.to(wide).exp() * softplus(decay.to(wide) + self.dt_bias)
        query, key = (x.unflatten(-1, (-1, self.head_k_dim)) for x in (query, key))
        value = value.unflatten(-1, (-1, self.head_v_dim))
        inputs = DeltaInputs(query, key, value, decay, rate.sigmoid())
        mixed = layout.delta_rule(self.layer_idx, inputs)
        rows, width = mixed.shape[:2], mixed.shape[-1]
        mixed = self.norm(mixed.reshape(-1, width), gate.reshape(-1, width))
        return self.out_proj(mixed.view(*rows, -1))

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw projections: (inputs of the convolution [B, s, C], gate [B, s, H e], rate [B, s, H],
        decay [B, s, H]).
        """
        parts = self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a
        qkv, gate, rate, decay = (part(hidden) for part in parts)
        return qkv, gate, rate, decay


class _InterleavedGatedDeltaNet(_GatedDeltaNet):
    """Qwen3-Next's linear attention, whose projections are laid out by key head."""

    in_proj_qkvz: nn.Module
    in_proj_ba: nn.Module
    fix_query_key_value_ordering: Callable[[Tensor, Tensor], tuple[Tensor, ...]]

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value, gate, rate, decay = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(hidden), self.in_proj_ba(hidden)
        )
        return torch.cat([x.flatten(2) for x in (query, key, value)], -1), gate, rate, decay


class _ShortConv(nn.Module):
    """LFM2's convolution."""

    layer_idx: int
    conv: nn.Conv1d
    in_proj: nn.Module
    out_proj: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, seq_idx: Any = None, **others: Any) -> Any:
        if seq_idx is None or isinstance(seq_idx, Tensor):
            return super().forward(hidden_states, *args, seq_idx=seq_idx, **others)
        return _computed_again(partial(self._mixed, seq_idx), self.in_proj(hidden_states))

    def _mixed(self, layout: AttentionLayout, projected: Tensor) -> Tensor:
        before, after, mixed = projected.chunk(3, -1)
        mixed = _convolve(layout, self.layer_idx, before * mixed, self.conv)
        return self.out_proj(after * mixed)


class _PassesLayout(nn.Module):
    """LFM2's decoder layer, which passes only the keyword `seq_idx` to its convolution."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        layout: AttentionLayout | None = None,
        **others: Any,
    ) -> Any:
        if layout is not None:
            others |= {"layout": layout, "seq_idx": layout}
        return super().forward(hidden_states, *args, **others)


_MIXERS: dict[str, type[nn.Module]] = {
    "Qwen3_5GatedDeltaNet": _GatedDeltaNet,
    "Qwen3_5MoeGatedDeltaNet": _GatedDeltaNet,
    "Qwen3NextGatedDeltaNet": _InterleavedGatedDeltaNet,
    "Lfm2ShortConv": _ShortConv,
    "Lfm2MoeShortConv": _ShortConv,
    "Lfm2DecoderLayer": _PassesLayout,
    "Lfm2MoeDecoderLayer": _PassesLayout,
}
"""Name of transformers' class -> its mixin. Names, because the classes may not be imported yet."""

HYBRIDS = frozenset(
    {
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
    }
)
"""Models whose layers are among `_MIXERS` or softmax attention."""


def let_mixers_accept_layouts(model: PreTrainedModel) -> None:
    """Subclass the layers of `model` that `_MIXERS` knows. A second call does nothing."""
    for part in model.modules():
        if type(part).__name__ in _MIXERS:
            part.__class__ = _accepting(type(part))  # type: ignore[arg-type]  # of __hash__


@cache
def _accepting(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Segmented{kind.__name__}", (_MIXERS[kind.__name__], kind), {})


@torch.compiler.disable  # a compiled layer would be compiled anew for each forward's layout
def _computed_again(work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`work(*inputs)`, of which only `inputs` are kept; the backward runs `work` again.

    The second run stops once it has all that the backward needs: before the product of the last
    projection, unless that has LoRA factors.
    """
    if not torch.is_grad_enabled():  # sampling: `checkpoint` would only cost time
        return work(*inputs)
    return checkpoint(work, *inputs, use_reentrant=False)


def _convolve(layout: AttentionLayout, layer: int, inputs: Tensor, conv: nn.Conv1d) -> Tensor:
    if not isinstance(conv, nn.Conv1d):  # transformers reads the weight directly, without factors
        raise ConfigurationError(
            "model.policy.adapter.target_modules: an adapter of the convolution in a layer of "
            "linear attention has no effect: leave the convolution out"
        )
    return layout.convolve(layer, inputs, conv.weight[:, 0], conv.bias)
