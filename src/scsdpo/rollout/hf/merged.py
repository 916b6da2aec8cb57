"""Sampling with LoRA factors merged into a copy of the weights that they adapt."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from scsdpo.policy.adapter import STUDENT, merged_layer
from scsdpo.policy.quantization import is_quantized, plain_dtype, plain_elements


@contextmanager
def merged_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Run plain layers of W + scale B A in the place of `model`'s LoRA layers.

    One matrix product takes the place of three. W + scale B A is summed in float32 and rounded to
    W's dtype, for W in 4 bits the one that it is multiplied in; the policy's own weights are not
    touched. The copy takes the memory of the weights that are adapted, in plain numbers, from entry
    to exit. Where that is more than half of what is free, and for layers that are not linear ones
    with plain LoRA factors (DoRA), the adapted layers run as they are: the same numbers, slower.
    """
    adapted = [
        (parent, name, layer, layer.get_base_layer().weight)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, LoraLayer) and _is_plain(layer)
    ]
    size = sum(plain_elements(w) * plain_dtype(w).itemsize for _, _, _, w in adapted)
    if 2 * size > _free_bytes(model.device):
        adapted = []
    for parent, name, layer, weight in adapted:
        setattr(parent, name, merged_layer(layer).to(plain_dtype(weight)))
    try:
        yield
    finally:
        for parent, name, layer, _ in adapted:
            setattr(parent, name, layer)


def _is_plain(layer: LoraLayer) -> bool:
    base = layer.get_base_layer()
    linear = type(base) is nn.Linear or is_quantized(base)
    return linear and STUDENT in layer.lora_A and STUDENT not in layer.lora_variant


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # What the allocator holds without using it is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
