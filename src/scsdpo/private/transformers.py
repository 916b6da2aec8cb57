"""Private names of transformers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

CHECKED = ">=5.16,<5.25"


def attention_of(model: PreTrainedModel) -> str:
    """The current attention implementation; a public method sets it but none reads it."""
    return model.config._attn_implementation


def has_sdpa(kind: type[PreTrainedModel]) -> bool:
    """True if the class supports torch's `scaled_dot_product_attention`."""
    return kind._supports_sdpa


def has_attention_interface(kind: type[PreTrainedModel]) -> bool:
    """True if all attention of the class goes through functions that users can register."""
    return kind._supports_attention_backend


def is_stateful(kind: type[PreTrainedModel]) -> bool:
    """True if the class keeps a recurrent state, which cannot be truncated."""
    return kind._is_stateful


def fill_anew(model: PreTrainedModel, part: nn.Module) -> None:
    """Initialise the parameters and buffers of `part`.

    The public `init_weights` initialises the whole model, and skips loaded weights.
    """
    model._init_weights(part)


def forward_in_checkpoint(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a layer's class, without the checkpoint that transformers >= 5.23 puts around.

    It wraps the forward of each class anew, subclasses too; no public name leads to what is inside.
    """
    wrapper = "forward_with_checkpointing"
    return inspect.unwrap(kind.forward, stop=lambda f: f.__code__.co_name != wrapper)


def recorders(part: nn.Module) -> dict[str, Any]:
    """Name of an extra output, such as `router_logits` -> the modules that compute it."""
    return getattr(part, "_can_record_outputs", None) or {}


def conversions_at_load(model: PreTrainedModel) -> Sequence[Any] | None:
    """Conversions by which the checkpoint's tensors became the model's; None or empty: none.

    The public function for a class returns the conversions of its newest format.
    """
    return getattr(model, "_weight_conversions", None)


def drop_conversions_of_quantizer(model: PreTrainedModel) -> None:
    """Remove the conversions of 4-bit weights, because weights are saved dequantised.

    transformers would try to undo them when it saves; no public function sets the conversions.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

    model._weight_conversions = [
        each
        for each in conversions_at_load(model) or ()
        if not any(isinstance(step, Bnb4bitDeserialize) for step in each.operations)
    ]
