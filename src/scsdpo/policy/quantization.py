"""A frozen base in 4 bits: how it is loaded, and its dequantised weights.

`whole_weight` (sharding.py) reads weights by `plain_weight`, so that merging, delivery to engines
and export see the numbers with which the layers compute.
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
"""Elements that share a scale, and scales that share a scale of their own, in bitsandbytes."""
IN_SHARDS = (
    "model.policy.quantization: weights in 4 bits cannot be sharded: use DDP "
    "(configs/scale/ddp.yaml), or set it to Unquantized"
)


class Quantization(ABC):
    """Format in which the matrices of a frozen base are kept."""

    @abstractmethod
    def bytes_each(self, dtype: torch.dtype) -> float:
        """Bytes of an element of a linear layer's weight, given the dtype of other weights."""

    @abstractmethod
    def loading(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, given the dtype of other weights."""

    def check(self) -> None:  # noqa: B027 - plain weights need no library
        """Check that the libraries for this format are installed.

        Raises:
            ConfigurationError: if a library is missing.
        """


@dataclass(frozen=True)
class Unquantized(Quantization):
    """Matrices are kept in the dtype of all other weights."""

    def bytes_each(self, dtype: torch.dtype) -> float:
        return dtype.itemsize

    def loading(self, dtype: torch.dtype) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class NF4(Quantization):
    """Linear layers in 4 bits: QLoRA's base. W_i ~ s_b c[q_i], s_b = max over block b of |W_i|

    c are 16 quantiles of a normal distribution, scaled to [-1, 1]. q_i is the index of the quantile
    nearest to W_i / s_b. A block has 64 elements. Embedding, head, norms, convolutions and matrices
    of fused experts stay in the model's dtype. Each layer dequantises its matrix to that dtype for
    each product. The policy's base weights are then s_b c[q_i]: teachers on the base, engines and
    exports get these.

    It needs `pip install 'scsdpo[qlora]'` (bitsandbytes), a `Lora` adapter, and one device or DDP:
    weights cannot be sharded.

    Args:
        double_quant: keep the scales in 8 bits, with a float32 scale for each 256 of them. An
            element then takes .516 bytes instead of .5625.

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
        # Quantise on the target device: Lightning builds modules under it as default device.
        return {"quantization_config": config, "device_map": {"": torch.get_default_device()}}


def quantization_of(config: PreTrainedConfig, asked: Quantization) -> Quantization:
    """The format of a checkpoint's matrices: what its config.json says, else `asked`.

    Raises:
        ValueError: if the checkpoint is quantised by anything but bitsandbytes in 4 bits, or
            `asked` would quantise it again.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return asked
    said = stored if isinstance(stored, dict) else stored.to_dict()
    if not said.get("load_in_4bit"):
        bits = " in 8 bits" if said.get("load_in_8bit") else ""
        raise ValueError(
            f"its config.json says that it is quantised by {said.get('quant_method')}{bits}, but "
            "only bitsandbytes in 4 bits is supported: use the checkpoint that it was made from, "
            "and set model.policy.quantization: NF4"
        )
    if not isinstance(asked, Unquantized):
        raise ValueError(
            "its config.json says that it is in 4 bits already: leave model.policy.quantization out"
        )
    return NF4(double_quant=bool(said.get("bnb_4bit_use_double_quant")))


def is_quantized(layer: nn.Module) -> bool:
    """True if `layer` is a linear layer with a weight in 4 bits."""
    library: Any = sys.modules.get("bitsandbytes")  # not imported: nothing is in 4 bits
    return library is not None and isinstance(layer, library.nn.Linear4bit)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of each linear layer in 4 bits."""
    return ((name, part) for name, part in model.named_modules() if is_quantized(part))


def scales_of(weight: Tensor) -> Any:
    """The `QuantState` of bitsandbytes of a weight in 4 bits; None: it is not in 4 bits."""
    library: Any = sys.modules.get("bitsandbytes")
    return weight.quant_state if library and isinstance(weight, library.nn.Params4bit) else None


def plain_weight(weight: Tensor) -> Tensor:
    """`weight` dequantised, without gradient.

    Shapes:
        packed [n, 1] -> [outputs, inputs]; any other weight keeps its shape.
    """
    state = scales_of(weight)
    if state is None:
        return weight.detach()
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state)


def plain_elements(weight: Tensor) -> int:
    """Number of elements of a weight once it is dequantised."""
    state = scales_of(weight)
    return weight.numel() if state is None else state.shape.numel()


def plain_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of a weight once it is dequantised."""
    state = scales_of(weight)
    return weight.dtype if state is None else state.dtype


def plain_layer(layer: nn.Module) -> nn.Linear:
    """The `nn.Linear` with the dequantised weight of a layer in 4 bits."""
    part: Any = layer
    with torch.device("meta"):
        plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
    plain.weight = nn.Parameter(plain_weight(part.weight), requires_grad=False)
    plain.bias = part.bias
    return plain


def scale_tensors(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(suffix of a name, tensor) of the scales of a weight in 4 bits; nothing for any other."""
    state = scales_of(weight)
    if state is not None:
        yield ".scales", state.absmax
        if state.nested:
            yield ".scales_of_scales", state.state2.absmax
            yield ".offset", state.offset


def prepare_quantized(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the 4-bit layers of a freshly loaded model compute in `dtype`, forward and backward.

    Raises:
        ConfigurationError: if the head or a transposed matrix is in 4 bits, or no layer is.
    """
    layers = list(quantized_layers(model))
    head = model.get_output_embeddings()
    for name, part in layers:
        layer: Any = part
        if part is head:
            raise ConfigurationError(
                f"model.policy.name_or_path: its head ({name}) is in 4 bits, which is not "
                "supported: name the checkpoint that it was made from, with quantization: NF4"
            )
        if issubclass(layer.source_cls, Conv1D):
            raise ConfigurationError(
                f"model.policy.quantization: {name} keeps its matrix transposed (Conv1D), which is "
                "not supported in 4 bits: set it to Unquantized"
            )
        # By default the first input decides the dtype in which a layer computes. On some CPUs a
        # forward without gradient would repack the weight in place and compute in bfloat16.
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        layer.support_avx512bf16_for_cpu = False
        # The forward dequantises to the dtype of its input, the backward to this one.
        layer.weight.quant_state.dtype = dtype
    if not layers:
        raise ConfigurationError(
            f"model.policy.quantization: {type(model).__name__} has no linear layer that can be in "
            "4 bits: set it to Unquantized"
        )
    drop_conversions_of_quantizer(model)
    # On CPU the other weights are views of the checkpoint's memory-mapped file. They would keep all
    # its pages in memory, those of the quantised matrices too.
    for parameter in model.parameters():
        if scales_of(parameter) is None and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def make_plain(model: PreTrainedModel) -> None:
    """Replace the layers in 4 bits by dequantised ones, and tell transformers."""
    for name, layer in list(quantized_layers(model)):
        model.set_submodule(name, plain_layer(layer))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = False
