"""The decoder of a causal language model, and the constant by which the model scales its logits."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """The module that turns token ids into final hidden states, without the head.

    transformers' `get_decoder` looks for the usual attribute names. It returns the head or the
    model itself for a class with other names; then the first child that is a model is taken.
    """
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model:
        return found
    # `get_decoder` returns Llama4 itself, and for ModernBERT the head, which is named `decoder`.
    return next(part for part in model.children() if isinstance(part, PreTrainedModel))


_SCALES: dict[str, Callable[[PreTrainedConfig], float]] = {
    **dict.fromkeys(
        ("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
        lambda config: config.logit_scale,
    ),
    **dict.fromkeys(
        (
            "GraniteForCausalLM",
            "GraniteMoeForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "GraniteMoeSWAForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "GraniteSWAForCausalLM",
            "MiniCPM3ForCausalLM",
        ),
        lambda config: 1 / config.logits_scaling,
    ),
    "FalconH1ForCausalLM": lambda config: config.lm_head_multiplier,
    "HyperCLOVAXForCausalLM": lambda config: config.logits_scaling,
}
"""Class name -> its logit scale. A setting that multiplies in one class divides in another."""


def is_scale_known(model: PreTrainedModel) -> bool:
    """True if the class multiplies its head's output by a constant that `logit_scale` knows."""
    return _scale_of(model) is not None


def logit_scale(model: PreTrainedModel) -> float:
    """The constant c by which the class multiplies the output of its head; 1 for most classes.

    Hidden states can be multiplied in its place: c (W h) = W (c h).
    """
    scale = _scale_of(model)
    return 1.0 if scale is None else float(scale(model.config.get_text_config()) or 1.0)


def _scale_of(model: PreTrainedModel) -> Callable[[PreTrainedConfig], float] | None:
    # FSDP2 replaces a model's class by a subclass of it.
    names = (kind.__name__ for kind in type(model).__mro__)
    return next((_SCALES[name] for name in names if name in _SCALES), None)
