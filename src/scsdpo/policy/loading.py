"""Loading a causal language model with the weights of its checkpoint."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy.attention import use_layouts
from scsdpo.policy.decoder import is_scale_known
from scsdpo.policy.quantization import IN_SHARDS, Quantization, Unquantized, prepare_quantized
from scsdpo.policy.row_path import KnownPath, RowPath

_CAPPED = ("final_logit_softcapping",)
_SCALED = ("logit_scale", "logits_scaling", "output_multiplier")


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    known: KnownPath,
    quantization: Quantization,
    on_meta: bool,
) -> PreTrainedModel:
    """Load a model in eval mode. If its rows share prompts, it accepts layouts.

    Args:
        path: local folder or hub name.
        dtype: dtype of the weights.
        known: how the model's rows run.
        quantization: how its matrices are kept (`quantization_of`).
        on_meta: build it on `meta`, without values.

    Raises:
        ConfigurationError: if weights in 4 bits would be sharded, or cannot be in 4 bits.
        ValueError: if the checkpoint lacks some of the model's weights, which would stay random;
            if the architecture changes its logits after the head by more than a known constant.
    """
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": known.implementation}
    config = AutoConfig.from_pretrained(path)
    plain = isinstance(quantization, Unquantized)
    quantization.check()
    if on_meta:
        if not plain:
            raise ConfigurationError(IN_SHARDS)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **settings).eval()
    else:
        settings |= quantization.loading(dtype)
        if hasattr(config, "quantization_config"):  # the checkpoint's own setting counts
            settings.pop("quantization_config")
        model, found = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, **settings
        )
        if names := sorted(found["missing_keys"]):
            raise ValueError(
                f"{path} lacks {names[0]}"
                f"{f' and {len(names) - 1} more weights' if names[1:] else ''}, which transformers "
                "would initialise at random: use a checkpoint of the architecture that its "
                "config.json names"
            )
    if not plain:
        prepare_quantized(model, dtype)
    _refuse_rescaled_logits(model)
    if known.path is RowPath.SHARED:
        use_layouts(model)
    return model


def _refuse_rescaled_logits(model: PreTrainedModel) -> None:
    settings = model.config.get_text_config().to_dict()
    for name in _CAPPED if is_scale_known(model) else (*_CAPPED, *_SCALED):
        if settings.get(name) not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__} changes its logits after the head "
                f"({name}={settings[name]}), which the loss does not support: "
                "choose an architecture without it (Qwen3, OLMo-3, Llama, Mistral, ...)"
            )
