"""Private names of transformers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

CHECKED = ">=5.16,<5.25"


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation in force; a public method sets it and none reads it."""
    return model.config._attn_implementation


def has_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Whether the class can attend by torch's `scaled_dot_product_attention`."""
    return kind._supports_sdpa


def has_attention_interface(kind: type[PreTrainedModel]) -> bool:
    """Whether all attention of the class goes through the functions that users can register."""
    return kind._supports_attention_backend


def is_stateful(kind: type[PreTrainedModel]) -> bool:
    """Whether the class keeps a recurrent state, which cannot be cut."""
    return kind._is_stateful


def fill_anew(model: PreTrainedModel, part: nn.Module) -> None:
    """Write the first values of the parameters and tables of `part` alone.

    The public `init_weights` does the whole model, and skips what was loaded.
    """
    model._init_weights(part)


def forward_in_checkpoint(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a layer's class, without the checkpoint that transformers >= 5.23 puts around.

    It wraps the forward of each class anew, subclasses too; no public name leads to what is inside.
    """
    wrapper = "forward_with_checkpointing"
    return inspect.unwrap(kind.forward, stop=lambda f: f.__code__.co_name != wrapper)


def recorders(part: nn.Module) -> dict[str, Any]:
    """What a model can return beside its output, such as `router_logits`, and where it is made."""
    return getattr(part, "_can_record_outputs", None) or {}


def conversions_at_load(model: PreTrainedModel) -> Sequence[Any] | None:
    """How the checkpoint's tensors became the model's; None or empty: it was not loaded from one.

    The public function for a class gives the conversions of its newest format.
    """
    return getattr(model, "_weight_conversions", None)


def drop_conversions_of_quantizer(model: PreTrainedModel) -> None:
    """Leave out of these how packed weights were put together, for plain ones are handed on.

    transformers would undo them in saving, and cannot; no public function sets the conversions.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

    model._weight_conversions = [
        each
        for each in conversions_at_load(model) or ()
        if not any(isinstance(step, Bnb4bitDeserialize) for step in each.operations)
    ]
