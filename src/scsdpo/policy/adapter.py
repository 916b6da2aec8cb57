"""What of the policy is trained, and how a second set of weights is kept beside it."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from scsdpo.errors import ConfigurationError
from scsdpo.policy.other_model import OtherModel, OtherWeights
from scsdpo.policy.sharding import local, own_rows, settle
from scsdpo.policy.stored import Stored, mix
from scsdpo.policy.weights import Weights, Whole
from scsdpo.prompt import stable_hash
from scsdpo.seeds import Seed, resolved, run_seed

STUDENT = "default"
"""Name of the trained LoRA adapter (peft's own default, so that exports load without a name)."""


class Adapter(ABC):
    """What is trained: everything (`FullFineTune`) or low-rank factors (`Lora`)."""

    @abstractmethod
    def dtype(self, device_is_gpu: bool) -> torch.dtype:
        """Dtype in which the checkpoint is loaded when the configuration says `auto`."""

    @abstractmethod
    def wrap(self, model: PreTrainedModel) -> nn.Module:
        """The trainable module around a freshly loaded model."""

    def draw(self, model: nn.Module) -> None:  # noqa: B027 - only factors have any
        """Write the first values of what `wrap` added to the model."""

    @abstractmethod
    def language_model(self, model: nn.Module) -> PreTrainedModel:
        """The transformers model inside a wrapped one, adapters in place."""

    def current(self) -> Weights:
        """The student's own weights, as they are at each moment."""
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
        """Whether the wrapped model's parameter `key` belongs into checkpoints."""


@dataclass(frozen=True)
class FullFineTune(Adapter):
    """Every parameter is trained, in float32 (under `bf16-mixed` the arithmetic is bf16).

    A bf16 weight of 0.02 does not move at lr 1e-5 with AdamW, hence the float32 masters. A second
    set of weights is a whole copy.
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


@dataclass(frozen=True, kw_only=True)
class Lora(Adapter):
    """Low-rank factors are trained: W + (alpha / r) B A, B = 0 at the start.

    The base stays frozen in the checkpoint's dtype (bf16 on GPU), the factors are float32. Frozen
    weights are the base with adapters off; a moving teacher is a second pair of factors that
    starts as a copy of the student's. The average of the factors is not the average of their
    product: EMA under LoRA is this approximation.

    Args:
        r: rank. Must be >= 1.
        lora_alpha: numerator of the scale.
        lora_dropout: in [0, 1); off for the teacher and while sampling.
        target_modules: names of linear layers, or `all-linear` (the head is never included).
        use_rslora: scale by alpha / sqrt(r) instead.
        use_dora: weight-decomposed variant.
        exclude_modules: names left out of `target_modules`.
        layers_to_transform: indices of the only layers to adapt; empty adapts all.
        seed: of the factors' first values; `auto`: the run's (`seed_everything`).

    Source:
        Hu et al. 2021, arXiv:2106.09685; fields are those of `peft.LoraConfig`.
    """

    r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
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
        if "lm_head" in self.target_modules:
            raise ValueError(
                "`Lora(target_modules=...)` must not name lm_head: the credit loss reads the "
                "head's plain weight; leave it out"
            )

    def _config(self) -> LoraConfig:
        # peft spells "none of them" as None.
        settings = {name: value if value != [] else None for name, value in asdict(self).items()}
        del settings["seed"]
        return LoraConfig(task_type="CAUSAL_LM", **settings)

    def dtype(self, device_is_gpu: bool) -> torch.dtype:
        return torch.bfloat16 if device_is_gpu else torch.float32

    def wrap(self, model: PreTrainedModel) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # peft's draw is written over
            wrapped = get_peft_model(model, self._config(), adapter_name=STUDENT)
        if model.device.type != "meta":
            self.draw(wrapped)
        elif self.use_dora:
            raise ConfigurationError(
                "model.policy.adapter: Lora(use_dora=true) begins at the norms of whole weights, "
                "and these are in shards: use DDP, or use_dora false"
            )
        return wrapped

    @torch.no_grad()
    def draw(self, model: nn.Module) -> None:
        """A uniform in +-1 / sqrt(its inputs), each layer by its name: the same on any rank."""
        for name, factor in model.named_parameters():
            if ".lora_B." in name:
                factor.zero_()
            elif ".lora_A." in name:
                generator = torch.Generator()
                generator.manual_seed(stable_hash("adapter", resolved(self.seed), name))
                # Lightning makes modules under a default device, where the generator is not.
                drawn = torch.rand(factor.shape, generator=generator, device="cpu")
                drawn = drawn.mul_(2).sub_(1)
                local(factor).copy_(drawn[own_rows(factor)] / math.sqrt(factor.shape[1]))

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
            model.add_adapter(name, self._config(), low_cpu_mem_usage=on_meta)
        for key, factor in model.named_parameters():
            if f".{name}." in key:
                factor.requires_grad_(False)
        factors = _Factors(name)
        if not on_meta:  # peft draws a fresh A for each adapter
            factors.follow(model, 1.0)
        return factors

    def is_saved(self, key: str) -> bool:
        return "lora_" in key


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
    """How often a copy in bf16 has followed."""

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
        settle(self.copy)
        settle(model)
        pairs = zip(self.copy.named_parameters(), model.parameters(), strict=True)
        for (name, own), student in pairs:
            seed = stable_hash("average", run_seed(), moves, name)
            start = own_rows(own).start * (own[0].numel() if own.dim() else 1)
            mix(local(own), local(student), rate, seed=seed, start=start)

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        settle(self.copy)
        settle(model)
        for own, student in zip(self.copy.parameters(), model.parameters(), strict=True):
            yield local(own), local(student)


def leave_out_of_ddp(module: nn.Module) -> None:
    """Weights on the host are not DDP's, which takes parameters of one kind of device only.

    Each rank makes the same of them by itself: it reads them as the policy's, and follows that.
    Those of another model it reads, too, and nothing moves them.
    """
    own = [
        m
        for m in module.modules()
        if isinstance(m, Whole) and (m.stored.on_host or isinstance(m, OtherWeights))
    ]
    left_out = {id(p) for each in own for p in each.parameters()}
    named = module.named_parameters(remove_duplicate=False)
    names = [name for name, p in named if id(p) in left_out]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def _refuse(stored: Stored) -> None:
    if not stored.is_plain:
        raise ConfigurationError(
            f"teacher: {stored} is for whole copies of the weights; under Lora a teacher has none "
            "of its own, or a second pair of factors: leave `stored` out"
        )


class _Base(Weights):
    """The frozen base of a LoRA policy: adapters off."""

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
    """A second adapter on the shared base; its tensors live in (and are saved with) the policy."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[PreTrainedModel]:
        assert isinstance(model, PeftModel)
        with _switched(model, self.name):
            yield model.get_base_model()

    def pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        named = dict(model.named_parameters())
        for key, own in named.items():
            if f".{self.name}." in key:
                yield local(own), local(named[key.replace(f".{self.name}.", f".{STUDENT}.")])


@contextmanager
def _switched(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Another adapter than the student's in force; None: none.

    peft's own switches flip requires_grad, which FSDP2 takes over from the first forward, and walk
    over every module more than once.
    """
    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [adapter or STUDENT], adapter is None
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [STUDENT], False
