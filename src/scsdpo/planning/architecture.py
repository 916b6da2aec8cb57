"""The shapes of a model, read off its `config.json` without a weight."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy import SHIPPED, Quantization, Unquantized
from scsdpo.policy.adapter import Adapter, adapted_layers
from scsdpo.policy.decoder import decoder_of
from scsdpo.policy.names import is_factor

_SHIPPED = Path(__file__).parent / "architectures.json"
"""Shapes of the common models by hub name, so that they can be planned without the hub."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of layers that mix tokens, feed-forwards and RMS norms. Counts are elements."""

    name: str
    """As transformers calls it, e.g. qwen3."""
    layers: int
    """L."""
    hidden: int
    """D."""
    heads: int
    """H, of queries."""
    key_heads: int
    """K, of keys and values."""
    head_size: int
    """d."""
    intermediate: int
    """I."""
    vocabulary: int
    """V, rows of the head."""
    tied: bool
    """Whether the head is the embedding."""
    head_norms: bool
    """Whether queries and keys are normalised."""
    kinds: tuple[str, ...]
    """[L] how each layer mixes tokens, as transformers calls it, e.g. full_attention."""
    windows: tuple[int | None, ...]
    """By layer with attention, tokens that it sees; None: all."""
    state: int
    """Of a sequence, over all layers of linear attention and convolution, whatever its length."""
    matrix_sizes: tuple[int, ...]
    """[L] in the linear layers of each decoder layer, all experts among them."""
    active: int
    """Of these, over all layers, what a token is multiplied with."""
    layer_sizes: tuple[int, ...]
    """[L] in each decoder layer, norms and biases too."""
    parameters: int
    """In all; tied weights once."""

    @property
    def matrices(self) -> int:
        """In the linear layers of the largest decoder layer."""
        return max(self.matrix_sizes)

    @property
    def layer(self) -> int:
        """In the largest decoder layer."""
        return max(self.layer_sizes)

    @property
    def has_experts(self) -> bool:
        """Whether a token is multiplied with a part of the matrices only."""
        return self.active < self.multiplied

    @property
    def is_plain(self) -> bool:
        """Whether all layers are alike: softmax attention and one gated feed-forward."""
        return not self.has_experts and set(self.kinds) <= _ATTENTION

    @property
    def queries(self) -> int:
        """H d."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K d."""
        return self.key_heads * self.head_size

    @property
    def table(self) -> int:
        """V D: the embedding's elements, and the head's."""
        return self.vocabulary * self.hidden

    @property
    def root(self) -> int:
        """What is in no decoder layer: embedding, head, last norm."""
        return self.parameters - sum(self.layer_sizes)

    @property
    def multiplied(self) -> int:
        """The layers' matrices, all experts among them, without the head."""
        return sum(self.matrix_sizes)

    def cached(self, tokens: int) -> int:
        """Elements of keys and values of a sequence of so many tokens, over all layers."""
        places = sum(min(tokens, window or tokens) for window in self.windows)
        return 2 * self.keys * places

    @staticmethod
    def of(model: PreTrainedModel) -> "Architecture":
        """Of a model on any device, `meta` too, before an adapter is put on.

        Raises:
            ConfigurationError: if a layer mixes tokens in a way that is not known here, or the
                configuration lacks a size.
        """
        config = model.config.get_text_config()
        layers = decoder_of(model).layers
        settings = config.to_dict()
        needed = ("num_attention_heads", "intermediate_size", "hidden_size")
        missing = [name for name in needed if name not in settings]
        kinds = tuple(settings.get("layer_types") or ["full_attention"] * len(layers))
        unknown = sorted(set(kinds) - _ATTENTION - _STATES.keys())
        if missing or unknown:
            raise ConfigurationError(
                f"{config.model_type}: plan knows decoders with attention, linear attention and "
                f"convolutions, and this one has {'no ' + missing[0] if missing else unknown[0]}"
            )
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        matrices = [[p for p in each.parameters() if p.dim() > 1] for each in layers]
        # Stacked matrices of experts are the only tensors of three dimensions but convolutions'.
        share = _chosen(settings)
        active = sum(
            p.numel() * (share if p.dim() == 3 and p.shape[1] > 1 else 1)
            for each in matrices
            for p in each
        )
        head = model.get_output_embeddings().weight
        heads = config.num_attention_heads
        window = settings.get("sliding_window")
        return Architecture(
            name=config.model_type,
            layers=len(sizes),
            hidden=config.hidden_size,
            heads=heads,
            key_heads=settings.get("num_key_value_heads") or heads,
            head_size=settings.get("head_dim") or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            vocabulary=head.shape[0],
            tied=head is model.get_input_embeddings().weight,
            head_norms=any(name.endswith("q_norm") for name, _ in layers.named_modules()),
            kinds=kinds,
            windows=tuple(
                window if kind == "sliding_attention" else None
                for kind in kinds
                if kind in _ATTENTION
            ),
            state=sum(_STATES[kind](settings) for kind in kinds if kind in _STATES),
            matrix_sizes=tuple(sum(p.numel() for p in each) for each in matrices),
            active=int(active),
            layer_sizes=tuple(sizes),
            parameters=sum(p.numel() for p in model.parameters()),
        )


def _chosen(settings: Mapping[str, Any]) -> float:
    """Share of the experts that a token goes through; 1 without any."""
    every = settings.get("num_experts") or settings.get("num_local_experts")
    every = every or settings.get("n_routed_experts")
    return (settings.get("num_experts_per_tok") or 1) / every if every else 1.0


def _delta_rule(settings: Mapping[str, Any]) -> int:
    """Keys by values a head, and what the convolution before them still sees."""
    keys, values = settings["linear_key_head_dim"], settings["linear_value_head_dim"]
    heads = settings["linear_num_value_heads"]
    channels = 2 * settings["linear_num_key_heads"] * keys + heads * values
    return heads * keys * values + channels * (settings["linear_conv_kernel_dim"] - 1)


def _convolution(settings: Mapping[str, Any]) -> int:
    return settings["hidden_size"] * (settings["conv_L_cache"] - 1)


_ATTENTION = {"full_attention", "sliding_attention"}
_STATES = {"linear_attention": _delta_rule, "conv": _convolution}
"""By kind of layer, elements of its state, float32 a sequence."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What an adapter leaves frozen and what it trains, in elements."""

    frozen: int
    trained: int
    adapted: int
    """Of the frozen, those with factors beside them: sampling merges them into a copy."""
    rank_tables: int
    """Entries that factors leave behind for the backward, a token and layer."""
    quantized: int = 0
    """Of the frozen, those that are kept in 4 bits."""
    packed: float = 0.0
    """Bytes of each of these."""
    widest: int = 0
    """Of these, in the largest matrix: one at a time is made plain."""

    @property
    def whole(self) -> bool:
        """Whether all parameters are trained."""
        return self.frozen == 0

    @staticmethod
    def of(
        model: PreTrainedModel, adapter: Adapter, quantization: Quantization = Unquantized()
    ) -> "Counted":
        """Puts `adapter` on `model`, which is on `meta`."""
        layers = len(decoder_of(model).layers)
        matrices = matrices_in_4_bits(model, quantization)
        wrapped = adapter.wrap(model)
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        total = sum(p.numel() for p in wrapped.parameters())
        with_factors = [part for part in wrapped.modules() if isinstance(part, LoraLayer)]
        ranks = sum(sum(part.r.values()) for part in with_factors)
        beside = {
            id(p): p.numel()
            for part in adapted_layers(wrapped).values()
            for name, p in part.named_parameters()
            if not is_factor(f".{name}")
        }
        return Counted(
            frozen=total - trained,
            trained=trained,
            adapted=sum(beside.values()),
            rank_tables=ranks // layers,
            quantized=sum(matrices),
            packed=quantization.bytes_each(torch.float32) if matrices else 0.0,
            widest=max(matrices, default=0),
        )

    @staticmethod
    def all_linear(shapes: Architecture, rank: int) -> "Counted":
        """Factors of `rank` beside every linear layer but the head.

        rank * (inputs + outputs) of q, k, v, o, gate, up and down.
        """
        sides = 7 * shapes.hidden + 2 * shapes.queries + 2 * shapes.keys + 3 * shapes.intermediate
        return Counted(
            frozen=shapes.parameters,
            trained=shapes.layers * rank * sides,
            adapted=shapes.multiplied,
            rank_tables=7 * rank,
        )


def matrices_in_4_bits(model: PreTrainedModel, quantization: Quantization) -> list[int]:
    """Elements of each matrix of `model` that is kept in 4 bits: of linear layers but the head."""
    if isinstance(quantization, Unquantized):
        return []
    head = model.get_output_embeddings()
    layers = (part for part in model.modules() if type(part) is nn.Linear and part is not head)
    return [layer.weight.numel() for layer in layers]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, on `meta`."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_config(
    name_or_path: str,
    architecture: str | None = None,
    *,
    key: str = "model.policy.name_or_path",
) -> PreTrainedConfig:
    """The configuration of a model, without asking the hub.

    Args:
        name_or_path: of the model.
        architecture: a config.json, or the folder that holds one, to be taken in its place.
        key: where the name stands.

    Raises:
        ConfigurationError: if it is nowhere on this machine, naming the remedy.
    """
    name_or_path = str(SHIPPED.get(name_or_path, name_or_path))
    if architecture is not None:
        return _load("--architecture", architecture)
    if Path(name_or_path).exists():
        return _load(key, name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        shipped = shapes()
        if name_or_path in shipped:
            sizes = dict(shipped[name_or_path])
            return AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        remedy = "give --architecture FILE, its config.json or the folder that holds it"
        if key != "model.policy.name_or_path":
            remedy = "name a folder that holds its config.json"
        raise ConfigurationError(
            f"{key}: {name_or_path} is no folder, its config.json is not in the cache, and its "
            f"shapes are not among the {len(shipped)} that ship; `scsdpo plan` does not ask the "
            f"hub: {remedy}{hint}"
        ) from error


def shapes() -> Mapping[str, Mapping[str, Any]]:
    """The sizes that ship, by hub name: what of `config.json` decides memory."""
    listed = json.loads(_SHIPPED.read_text(encoding="utf-8"))
    return {name: each["config"] for each in listed for name in each["names"]}


def _load(key: str, path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ConfigurationError(
            f"{key}: {path} holds no config.json that transformers knows: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
