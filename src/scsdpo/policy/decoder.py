"""A causal language model below its head, and what it does to the logits behind it."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """What makes hidden states of ids.

    `get_decoder` goes by usual names, and gives the head or the model itself where a class has
    others.
    """
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model:
        return found
    # As Llama4 (the model itself) and ModernBERT's decoder (the head, called so).
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
"""By class: the same setting multiplies in one and divides in another."""


def is_scale_known(model: PreTrainedModel) -> bool:
    """Whether the class's logits are its head's times a constant that `logit_scale` knows."""
    return _scale_of(model) is not None


def logit_scale(model: PreTrainedModel) -> float:
    """What the class multiplies its logits by behind the head, so that hidden states may be
    multiplied before it: c (W h) = W (c h). 1 for most.
    """
    scale = _scale_of(model)
    return 1.0 if scale is None else float(scale(model.config.get_text_config()) or 1.0)


def _scale_of(model: PreTrainedModel) -> Callable[[PreTrainedConfig], float] | None:
    # Shards give a model a class of their own, below its own.
    names = (kind.__name__ for kind in type(model).__mro__)
    return next((_SCALES[name] for name in names if name in _SCALES), None)
