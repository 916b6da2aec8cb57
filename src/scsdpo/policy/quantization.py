"""A frozen base in 4 bits: how it is loaded, and its weights in plain numbers.

`whole_weight` (sharding.py) reads through `plain_weight`, so that merging, delivery to engines and
export see the numbers that the layers multiply with.
"""

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scsdpo.errors import ConfigurationError
from scsdpo.private.transformers import drop_conversions_of_quantizer

BLOCK, SCALES = 64, 256
"""Elements with one scale, and scales with one scale of their own: what bitsandbytes takes."""
IN_SHARDS = (
    "model.policy.quantization: weights in 4 bits cannot lie in shards: use DDP "
    "(configs/scale/ddp.yaml), or set it to Unquantized"
)


class Quantization(ABC):
    """How the matrices of a frozen base are kept."""

    @abstractmethod
    def bytes_each(self, dtype: torch.dtype) -> float:
        """Bytes of an element of a linear layer, given the dtype of loaded weights."""

    @abstractmethod
    def loading(self, dtype: torch.dtype) -> dict[str, Any]:
        """What `from_pretrained` is told, given the dtype of loaded weights."""

    def check(self) -> None:  # noqa: B027 - plain weights need nothing
        """See whether weights can be loaded so.

        Raises:
            ConfigurationError: if a library is missing.
        """


@dataclass(frozen=True)
class Unquantized(Quantization):
    """Matrices are kept in the dtype of loading, as everything else is."""

    def bytes_each(self, dtype: torch.dtype) -> float:
        return dtype.itemsize

    def loading(self, dtype: torch.dtype) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class NF4(Quantization):
    """Linear layers in 4 bits: QLoRA's base. W_i ~ s_b c[q_i], s_b = max over block b of |W_i|

    c are 16 quantiles of a normal distribution, scaled to [-1, 1], q_i the index of the nearest to
    W_i / s_b, and a block has 64 elements. Embedding, head, norms, convolutions and matrices of
    fused experts stay in the dtype of loading, and each layer multiplies with its matrix in that
    dtype, made anew for each product. A policy with this base has these weights: teachers on the
    base, engines and exports get s_b c[q_i].

    Needs `pip install 'scsdpo[qlora]'` (bitsandbytes), a `Lora` adapter, and whole weights on each
    rank (one device or DDP).

    Args:
        double_quant: keep the scales in 8 bits, with a float32 scale to each 256 of them: .516
            bytes an element, and not .5625.

    Source:
        Dettmers et al. 2023, arXiv:2305.14314; the code is bitsandbytes'.
    """

    double_quant: bool = True

    def bytes_each(self, dtype: torch.dtype) -> float:
        scale = 1 + 4 / SCALES if self.double_quant else 4
        return 0.5 + scale / BLOCK

    def check(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigurationError(
                "model.policy.quantization: a base in 4 bits needs bitsandbytes: "
                "pip install 'scsdpo[qlora]'"
            )

    def loading(self, dtype: torch.dtype) -> dict[str, Any]:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        # Weights are quantised where they will be: Lightning loads under its device.
        return {"quantization_config": config, "device_map": {"": torch.get_default_device()}}


def quantization_of(config: PreTrainedConfig, asked: Quantization) -> Quantization:
    """How a checkpoint's matrices are kept: as `asked`, or as its config.json says.

    Raises:
        ValueError: if the checkpoint is quantised by anything but bitsandbytes in 4 bits, or is to
            be quantised once more.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return asked
    said = stored if isinstance(stored, dict) else stored.to_dict()
    if not said.get("load_in_4bit"):
        bits = " in 8 bits" if said.get("load_in_8bit") else ""
        raise ValueError(
            f"its config.json says that it is quantised by {said.get('quant_method')}{bits}, and "
            "only bitsandbytes in 4 bits is known: take the checkpoint that it was made from, and "
            "set model.policy.quantization: NF4"
        )
    if not isinstance(asked, Unquantized):
        raise ValueError(
            "its config.json says that it is in 4 bits already: leave model.policy.quantization out"
        )
    return NF4(double_quant=bool(said.get("bnb_4bit_use_double_quant")))


def is_quantized(layer: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is in 4 bits."""
    library: Any = sys.modules.get("bitsandbytes")  # nothing is in 4 bits before its import
    return library is not None and isinstance(layer, library.nn.Linear4bit)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of those in 4 bits."""
    return ((name, part) for name, part in model.named_modules() if is_quantized(part))


def scales_of(weight: Tensor) -> Any:
    """Bitsandbytes' `QuantState` of a weight in 4 bits; None: it is plain."""
    library: Any = sys.modules.get("bitsandbytes")
    return weight.quant_state if library and isinstance(weight, library.nn.Params4bit) else None


def plain_weight(weight: Tensor) -> Tensor:
    """The numbers that a product takes for `weight`, without gradient.

    Shapes:
        packed [n, 1] -> [outputs, inputs]; any other weight is returned as it is.
    """
    state = scales_of(weight)
    if state is None:
        return weight.detach()
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state)


def plain_elements(weight: Tensor) -> int:
    """Elements of a weight in plain numbers."""
    state = scales_of(weight)
    return weight.numel() if state is None else state.shape.numel()


def plain_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of a weight in plain numbers."""
    state = scales_of(weight)
    return weight.dtype if state is None else state.dtype


def plain_layer(layer: nn.Module) -> nn.Linear:
    """The plain linear layer that does what a layer in 4 bits does."""
    part: Any = layer
    with torch.device("meta"):
        plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
    plain.weight = nn.Parameter(plain_weight(part.weight), requires_grad=False)
    plain.bias = part.bias
    return plain


def scale_tensors(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(end of a name, tensor) of what beside its bytes tells a weight in 4 bits from another."""
    state = scales_of(weight)
    if state is not None:
        yield ".scales", state.absmax
        if state.nested:
            yield ".scales_of_scales", state.state2.absmax
            yield ".offset", state.offset


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a freshly loaded base in 4 bits one whose layers compute in `dtype`, always alike.

    Raises:
        ConfigurationError: if what cannot be in 4 bits is.
    """
    layers = list(quantized_layers(model))
    head = model.get_output_embeddings()
    for name, part in layers:
        layer: Any = part
        if part is head:
            raise ConfigurationError(
                f"model.policy.name_or_path: its head ({name}) is in 4 bits, and logits need it "
                "plain: name the checkpoint that it was made from, with quantization: NF4"
            )
        if issubclass(layer.source_cls, Conv1D):
            raise ConfigurationError(
                f"model.policy.quantization: {name} keeps its matrix transposed (Conv1D), which "
                "cannot be in 4 bits here: set it to Unquantized"
            )
        # By default the first input decides in which dtype a layer computes, and on some CPUs a
        # forward without gradient repacks the weight in its place and computes in bfloat16.
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        layer.support_avx512bf16_for_cpu = False
        # The forward makes its matrix in the dtype of its input, the backward in this one.
        layer.weight.quant_state.dtype = dtype
    if not layers:
        raise ConfigurationError(
            f"model.policy.quantization: {type(model).__name__} has no linear layer that could be "
            "in 4 bits: set it to Unquantized"
        )
    drop_conversions_of_quantizer(model)
    # On CPU the other weights are views of the checkpoint's mapped file, whose pages, those of the
    # packed matrices too, would stay in memory with them.
    for parameter in model.parameters():
        if scales_of(parameter) is None and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def make_plain(model: PreTrainedModel) -> None:
    """Put plain layers in the place of those that are in 4 bits, and have transformers know it."""
    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, plain_layer(layer))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False
