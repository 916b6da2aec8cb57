"""Which weights of the policy are trained, and how second sets of weights are made beside them."""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy.names import is_factor, plain_name
from scsdpo.policy.other_model import OtherModel, OtherWeights
from scsdpo.policy.quantization import Quantization, Unquantized, is_quantized, plain_layer
from scsdpo.policy.sharding import local, own_rows, reshard, whole_weight
from scsdpo.policy.stored import Stored, mix
from scsdpo.policy.weights import Weights, Whole
from scsdpo.private.peft import use_adapters
from scsdpo.private.torch import ignore_in_ddp
from scsdpo.prompt import stable_hash
from scsdpo.seeds import Seed, resolved, run_seed

STUDENT = "default"
"""Name of the trained LoRA adapter (peft's own default, so that exports load without a name)."""


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Name in the model without adapters -> the layer of peft around it.

    peft nests several layers around a module with several adapted parameters, such as fused
    experts. It is listed once, with the outermost of them.
    """
    found: dict[str, LoraLayer] = {}
    for name, part in model.named_modules():
        if isinstance(part, LoraLayer) and not name.endswith(".base_layer"):
            found[plain_name(name)] = part
    return found


def factors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Every tensor of one adapter (A, B, DoRA's magnitudes), by name of layer, kind and parameter.

    They are read from the layers, so that none is missed because of its name.
    """
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for kind in layer.adapter_layer_names:
            held = getattr(layer, kind)
            if adapter not in held:
                continue
            values = [("", held[adapter])]
            if isinstance(held[adapter], nn.Module):
                values = list(held[adapter].named_parameters())
            found |= {f"{name}.{kind}.{inner}": value for inner, value in values}
    return found


@torch.no_grad()
def merged_layer(layer: LoraLayer) -> nn.Module:
    """A copy of `layer` with the student's adapter merged into its weights.

    They are W + scale B A in float32, or in W's dtype if that is wider. W in 4 bits is dequantised.
    If weights are sharded, this is a collective that gathers them.
    """
    base = layer.get_base_layer()
    quantized = is_quantized(base)
    # The copy gets the dequantised base as its base layer.
    alone: Any = copy.deepcopy(layer, {id(base): plain_layer(base)} if quantized else {})
    for module in alone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = whole_weight(parameter)
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    if isinstance(alone, ParamWrapper):  # several may be nested
        return alone.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=[STUDENT]
        )
    # The merge of peft's 4-bit layers would quantise the sum again.
    merge = Linear.merge if quantized else type(alone).merge
    merge(alone, adapter_names=[STUDENT])
    return alone.get_base_layer()


class WideHead(nn.Linear):
    """A head with D + r inputs [h, A h], which equals a head with an adapter.

    Its tensors are made in each forward, from the factors and with their graph. Logits and
    gradients are those of W h + scale B A h. The rounding of W does not affect the small product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.__dict__["weight"], self.__dict__["bias"] = weight, bias


def with_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, nn.Linear]:
    """Hidden states h and a head with z = W h + b, the logits.

    If the head has an active adapter, W = [W, scale B] and h = [h, A h].

    Shapes:
        hidden [..., D] -> [..., D] or [..., D + r].
    """
    head = model.get_output_embeddings()
    if not isinstance(head, LoraLayer):
        return hidden, head
    base, adapter = head.get_base_layer(), head.active_adapters[0]
    if head.disable_adapters:
        return hidden, base
    a, b, scale = head.lora_A[adapter].weight, head.lora_B[adapter].weight, head.scaling[adapter]
    dropped = head.lora_dropout[adapter](hidden)
    low = nn.functional.linear(dropped.to(a.dtype), a).to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = torch.cat([base.weight, (b * scale).to(base.weight.dtype)], dim=1)
    return torch.cat([hidden, low], dim=-1), WideHead(weight, base.bias)


def is_tied(model: PreTrainedModel) -> bool:
    """True if embedding and head share one weight."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = [e.get_base_layer() if isinstance(e, LoraLayer) else e for e in ends]
    return tables[0].weight is tables[1].weight


def adapted_ends(model: PreTrainedModel) -> list[str]:
    """Names, in the model without adapters, of embedding and head if they have an adapter."""
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return [name for name, layer in adapted_layers(model).items() if id(layer) in ends]


def untie(model: PreTrainedModel) -> None:
    """Give the head its own copy of the embedding's weight, and set the config accordingly."""
    head = model.get_output_embeddings()
    table = head.get_base_layer() if isinstance(head, LoraLayer) else head
    table.weight = nn.Parameter(
        table.weight.detach().clone(), requires_grad=table.weight.requires_grad
    )
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


class Adapter(ABC):
    """Which weights are trained: all (`FullFineTune`) or low-rank factors (`Lora`)."""

    @abstractmethod
    def dtype(self, device_is_gpu: bool) -> torch.dtype:
        """Dtype in which the checkpoint is loaded if `model.policy.dtype` is `auto`."""

    @abstractmethod
    def wrap(self, model: PreTrainedModel) -> nn.Module:
        """The trainable module around a freshly loaded model."""

    def draw(self, model: nn.Module) -> None:  # noqa: B027 - only `Lora` adds parameters
        """Initialise the parameters that `wrap` added to the model."""

    @abstractmethod
    def language_model(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model inside the wrapped one, with its adapters."""

    def current(self) -> Weights:
        """The student's own weights, which move with every step."""
        return _Student(self)

    @abstractmethod
    def initial(self, model: nn.Module, stored: Stored = Stored()) -> Weights:
        """The weights before any training, frozen; not part of checkpoints."""

    @abstractmethod
    def moving(self, model: nn.Module, name: str, stored: Stored = Stored()) -> Weights:
        """A copy of the current student that a teacher may move; part of checkpoints."""

    def other(self, model: nn.Module, source: OtherModel) -> Weights:
        """Another model, frozen; not part of checkpoints."""
        return OtherWeights(source, on_meta=next(model.parameters()).device.type == "meta")

    @abstractmethod
    def is_saved(self, key: str) -> bool:
        """True if checkpoints hold the wrapped model's parameter `key`."""


@dataclass(frozen=True)
class FullFineTune(Adapter):
    """Train every parameter, in float32 (with `bf16-mixed` the arithmetic is bf16).

    Weights are float32 because a bf16 weight of 0.02 does not move at lr 1e-5 with AdamW. A second
    set of weights is a whole copy of the model.
    """

    def dtype(self, device_is_gpu: bool) -> torch.dtype:
        return torch.float32

    def wrap(self, model: PreTrainedModel) -> nn.Module:
        return model

    def language_model(self, model: nn.Module) -> PreTrainedModel:
        assert isinstance(model, PreTrainedModel)
        return model

    def initial(self, model: nn.Module, stored: Stored = Stored()) -> Weights:
        return _Copy(self.language_model(model), stored, saved=False)

    def moving(self, model: nn.Module, name: str, stored: Stored = Stored()) -> Weights:
        return _Copy(self.language_model(model), stored, saved=True)

    def is_saved(self, key: str) -> bool:
        return True


def refuse_full(adapter: Adapter, quantization: Quantization) -> None:
    """Refuse a full fine-tune of weights in 4 bits, which have no gradient.

    Raises:
        ConfigurationError: if the base is in 4 bits and `adapter` is `FullFineTune`.
    """
    if isinstance(adapter, FullFineTune) and not isinstance(quantization, Unquantized):
        raise ConfigurationError(
            "model.policy.adapter: FullFineTune cannot train weights in 4 bits: set it to Lora, or "
            "model.policy.quantization to Unquantized and name a checkpoint that is not in 4 bits"
        )


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """Train low-rank factors: W + (alpha / r) B A, with B = 0 at the start.

    The base stays frozen in the checkpoint's dtype (bf16 on GPU); the factors are float32. Frozen
    weights are the base with adapters off. A moving teacher is a second pair of factors, which
    starts as a copy of the student's. The average of the factors is not the average of their
    product: EMA with LoRA is this approximation.

    `target_modules` may name the embedding and the head. If they are tied, an adapter of one does
    not change the other, as in peft; merging unties them.

    Args:
        r: rank. Must be >= 1.
        lora_alpha: numerator of the scale.
        lora_dropout: in [0, 1); off for the teacher and while sampling.
        target_modules: names of layers, or `all-linear`: every linear layer but the head. Empty:
            only `target_parameters` are adapted. transformers has fused some projections that were
            layers (Qwen3-MoE, OLMoE, Mixtral). peft applies their old names, and `all-linear`, to
            the fused parameters: experts, whose gate and up share factors of rank 2 r, and router.
        target_parameters: names of parameters that are not layers, such as those of fused experts:
            `mlp.experts.gate_up_proj`, `mlp.experts.down_proj`. Each expert has factors of rank r.
            They take neither dropout nor DoRA.
        use_rslora: scale by alpha / sqrt(r) instead.
        use_dora: weight-decomposed LoRA; not for the head.
        exclude_modules: names to leave out of `target_modules`.
        layers_to_transform: indices of the only layers to adapt; empty adapts all.
        seed: seed of the factors' first values; `auto`: the run's (`seed_everything`).

    Raises:
        ValueError: if an argument is out of range, or two arguments contradict each other.
        ConfigurationError: from `wrap`, if the model has no such layer or parameter, or it cannot
            have an adapter.

    Source:
        Hu et al. 2021, arXiv:2106.09685; fields are those of `peft.LoraConfig`.
    """

    r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] = field(default_factory=list)
    use_rslora: bool = False
    use_dora: bool = False
    exclude_modules: list[str] = field(default_factory=list)
    layers_to_transform: list[int] = field(default_factory=list)
    seed: Seed = "auto"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"`Lora(r=...)` must be >= 1, got {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`Lora(lora_dropout=...)` must be in [0, 1), got {self.lora_dropout}")
        for name in ("lora_dropout", "use_dora"):
            if self.target_parameters and getattr(self, name):
                raise ValueError(
                    f"`Lora(target_parameters=...)` does not support {name}, got "
                    f"{getattr(self, name)}: leave {name} out"
                )
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                "`Lora(target_modules=...)` and target_parameters are both empty: name layers or "
                "parameters; `all-linear` adapts every linear layer"
            )

    def _config(self) -> LoraConfig:
        # peft wants None for an empty list, but [] for no modules beside parameters.
        settings = {name: value if value != [] else None for name, value in asdict(self).items()}
        del settings["seed"]
        if not self.target_modules:
            settings["target_modules"] = []
        return LoraConfig(task_type="CAUSAL_LM", **settings)

    def dtype(self, device_is_gpu: bool) -> torch.dtype:
        return torch.bfloat16 if device_is_gpu else torch.float32

    def wrap(self, model: PreTrainedModel) -> nn.Module:
        try:
            with torch.random.fork_rng(devices=[]), _quiet():  # `draw` replaces peft's values
                wrapped = get_peft_model(model, self._config(), adapter_name=STUDENT)
        except ValueError as error:
            line = str(error).splitlines()[0]
            if "ParamWrapper" in line:
                line = (
                    "parameters of experts and routers support neither lora_dropout nor use_dora: "
                    "set them to 0 and false, or name the layers to adapt in target_modules"
                )
            raise ConfigurationError(f"model.policy.adapter: {line}") from error
        self._refuse_unmatched(wrapped)
        self._refuse_ends(model)
        if model.device.type != "meta":
            self.draw(wrapped)
        elif self.use_dora:
            raise ConfigurationError(
                "model.policy.adapter.use_dora: DoRA needs the norms of whole weights, which are "
                "sharded: use DDP, or set use_dora to false"
            )
        return wrapped

    def _refuse_unmatched(self, wrapped: PeftModel) -> None:
        """Raise for a name that the model does not have; peft ignores it if another name fits."""
        config, layers = wrapped.peft_config[STUDENT], adapted_layers(wrapped.get_base_model())
        modules = {name for name, each in layers.items() if not isinstance(each, ParamWrapper)}
        parameters = {
            f"{name}.{part.parameter_name}".lstrip(".")
            for name, layer in layers.items()
            for part in layer.modules()
            if isinstance(part, ParamWrapper)
        }
        listed = [] if isinstance(config.target_modules, str) else config.target_modules or []
        wanted = {"target_modules": (listed, modules)}
        wanted["target_parameters"] = (config.target_parameters or [], parameters)
        for key, (names, found) in wanted.items():
            for name in names:
                if not any(each == name or each.endswith(f".{name}") for each in found):
                    raise ConfigurationError(
                        f"model.policy.adapter.{key}: the model has no layer or parameter named "
                        f"{name}: correct the name or leave it out"
                    )

    def _refuse_ends(self, model: PreTrainedModel) -> None:
        """Raise for adapters of embedding or head that the loss or the merge does not support."""
        for name in adapted_ends(model):
            if isinstance(adapted_layers(model)[name], ParamWrapper):
                raise ConfigurationError(
                    f"model.policy.adapter.target_parameters: {name} is a layer: name it in "
                    "target_modules"
                )
        if isinstance(model.get_output_embeddings(), LoraLayer) and self.use_dora:
            raise ConfigurationError(
                "model.policy.adapter.use_dora: DoRA divides by the norm of each row, which is 0 "
                "for padded rows of a head: leave the head out of target_modules, or set use_dora "
                "to false"
            )

    @torch.no_grad()
    def draw(self, model: nn.Module) -> None:
        """Draw A uniformly from +-1 / sqrt(number of inputs), and set B to 0.

        The seed includes the layer's name, so that all ranks draw the same. In an embedding, whose
        A has a column for each token, A is 0 and B is standard normal, as in peft.
        """
        for name, factor in model.named_parameters():
            if ".lora_B." in name or ".lora_embedding_A." in name:
                factor.zero_()
            elif ".lora_A." in name or ".lora_embedding_B." in name:
                generator = torch.Generator()
                generator.manual_seed(stable_hash("adapter", resolved(self.seed), name))
                # Lightning sets a default device; the generator is on the CPU.
                if ".lora_A." in name:
                    drawn = torch.rand(factor.shape, generator=generator, device="cpu")
                    drawn = drawn.mul_(2).sub_(1).div_(math.sqrt(factor.shape[1]))
                else:
                    drawn = torch.randn(factor.shape, generator=generator, device="cpu")
                local(factor).copy_(drawn[own_rows(factor)])

    def language_model(self, model: nn.Module) -> PreTrainedModel:
        assert isinstance(model, PeftModel)
        return model.get_base_model()

    def initial(self, model: nn.Module, stored: Stored = Stored()) -> Weights:
        _refuse(stored)
        return _Base()

    def moving(self, model: nn.Module, name: str, stored: Stored = Stored()) -> Weights:
        _refuse(stored)
        assert isinstance(model, PeftModel)
        on_meta = model.device.type == "meta"
        if name not in model.peft_config:
            with _quiet():
                model.add_adapter(name, self._config(), low_cpu_mem_usage=on_meta)
        for factor in factors(model, name).values():
            factor.requires_grad_(False)
        moving = _Factors(name)
        if not on_meta:  # peft draws another A for each adapter
            moving.follow(model, 1.0)
        return moving

    def is_saved(self, key: str) -> bool:
        return is_factor(key)


class _Student(Weights):
    """The weights that are being trained."""

    def same(self, other: Weights) -> bool:
        return isinstance(other, _Student)

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def active(self, model: nn.Module) -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(self.adapter.language_model(model))

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


class _Copy(Whole):
    """A whole frozen copy of the policy."""

    moves: Tensor
    """Number of times that a copy in bf16 moved; part of the seed of its rounding."""

    def __init__(self, model: PreTrainedModel, stored: Stored, *, saved: bool) -> None:
        kept = {id(p): stored.kept(p) for p in model.parameters()} if not stored.is_plain else {}
        super().__init__(copy.deepcopy(model, dict(kept)), stored, saved=saved)
        if stored.dtype == "bfloat16" and saved:
            self.register_buffer("moves", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def follow(self, model: nn.Module, rate: float) -> None:
        if self.stored.is_plain or rate == 1:
            super().follow(model, rate)
            return
        moves = 0
        if self.stored.dtype == "bfloat16":
            moves = int(self.moves.add_(1))
        reshard(self.copy)
        reshard(model)
        pairs = zip(self.copy.named_parameters(), model.parameters(), strict=True)
        for (name, own), student in pairs:
            seed = stable_hash("average", run_seed(), moves, name)
            start = own_rows(own).start * (own[0].numel() if own.dim() else 1)
            mix(local(own), local(student), rate, seed=seed, start=start)

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        reshard(self.copy)
        reshard(model)
        for own, student in zip(self.copy.parameters(), model.parameters(), strict=True):
            yield local(own), local(student)


def leave_out_of_ddp(module: nn.Module) -> None:
    """Tell DDP to ignore weights on the host and those of another model.

    DDP takes parameters of one type of device only, and broadcasts all of them. These weights are
    equal on all ranks without a broadcast: each rank copies the policy and follows it, or loads the
    other model itself.
    """
    own = [
        m
        for m in module.modules()
        if isinstance(m, Whole) and (m.stored.on_host or isinstance(m, OtherWeights))
    ]
    left_out = {id(p) for each in own for p in each.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    names = [name for name, p in named if id(p) in left_out]
    ignore_in_ddp(module, names)


def _refuse(stored: Stored) -> None:
    if not stored.is_plain:
        raise ConfigurationError(
            f"model.teacher: `stored` ({stored}) says how a teacher's full copy of the weights is "
            "kept. With Lora a teacher has no such copy: leave `stored` out"
        )


class _Base(Weights):
    """The frozen base of a LoRA policy: the model with adapters off."""

    def same(self, other: Weights) -> bool:
        return isinstance(other, _Base)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[PreTrainedModel]:
        assert isinstance(model, PeftModel)
        with _switched(model, None):
            yield model.get_base_model()

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())


class _Factors(Weights):
    """A second adapter on the shared base; its tensors are part of the policy and its state."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[PreTrainedModel]:
        assert isinstance(model, PeftModel)
        with _switched(model, self.name):
            yield model.get_base_model()

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        own, student = factors(model, self.name), factors(model, STUDENT)
        for key in student.keys() | own.keys():
            yield local(own[key]), local(student[key])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide peft's warnings of ties and unmatched names: `Lora` handles or refuses both itself.

    And that of transformers >= 5.23, which peft 0.21 asks by an old name.
    """
    with warnings.catch_warnings():
        for start in (
            "Model has `tie_word_embeddings=True`",
            "The following (rank|alpha)_pattern keys",
            "target_(modules|parameters)=.* were set but no",
            "Unsupported rank_pattern|.*`use_rslora=True`",
            "`is_gradient_checkpointing` is deprecated",
        ):
            warnings.filterwarnings("ignore", message=start)
        yield


@contextmanager
def _switched(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Activate another adapter than the student's; None turns adapters off.

    peft's own methods change requires_grad, which FSDP2 reads only before the first forward, and
    walk over every module more than once.
    """
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    for layer in layers:
        use_adapters(layer, [adapter or STUDENT], disabled=adapter is None)
    try:
        yield
    finally:
        for layer in layers:
            use_adapters(layer, [STUDENT])
