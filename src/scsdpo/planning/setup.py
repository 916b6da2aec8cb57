"""The parts of a configuration that decide how much memory and time a step takes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from scsdpo.errors import ConfigurationError, blamed_on
from scsdpo.planning.architecture import (
    Architecture,
    Counted,
    matrices_in_4_bits,
    read_model_config,
    skeleton,
)
from scsdpo.planning.layer_probe import Measured, measured_layers
from scsdpo.policy import NF4, CausalLM, OtherModel, Stored, Unquantized
from scsdpo.policy.adapter import refuse_full
from scsdpo.policy.quantization import IN_SHARDS, quantization_of
from scsdpo.policy.weights import Weights
from scsdpo.rollout import Colocated, HFRollout, Rollout, VLLMRollout

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of an element."""
GIB = 2**30
LATE_BYTES = 90 * 2**20
"""Bytes by which a process on a CPU grows in its first step, however small the policy: late imports
and buffers (`benchmarks/plan.py --cases tiny`)."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of a run."""

    ranks: int = 1
    kind: Literal["cuda", "cpu"] = "cuda"
    memory: int = 80 * GIB
    """Bytes of memory of a rank."""
    sharded: bool = False
    """True: weights are sharded over all ranks (FullySharded). False: each rank has all."""
    process: int = GIB
    """Bytes that a rank takes without a model: libraries, the device's context."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths in tokens."""

    prompt: int
    teacher_prompt: int
    response: int


@dataclass(frozen=True, kw_only=True)
class SecondWeights:
    """The weights that the teacher or the reference keeps beside the policy's."""

    slot: str
    """`teacher` or `reference`."""
    kind: Literal["none", "moving", "frozen", "external"]
    """`none`: it runs with weights that are there anyway."""
    forwards: int
    """Forwards of the decoder for each token."""
    shapes: Architecture
    """Sizes of the model that it runs."""
    another: bool = False
    """True if this is another model than the policy."""
    width: int = FLOAT32
    """Bytes of an element of another model."""
    stored: Stored = Stored()
    """How its copy of the weights is kept."""
    saved: int = 0
    """Bytes that 4 bits save in another model."""


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Bytes of the optimizer for each trained element."""

    state: float
    """Bytes of its state."""
    temporary: float
    """Bytes during a step that works on all tensors at once (foreach); 0: another way."""
    of_largest: float = 0.0
    """Bytes for each element of the largest tensor, if a step works tensor by tensor; else 0."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The rollout engine."""

    kind: Literal["hf", "colocated", "remote"]
    max_tokens: int = 0
    """Room for keys and values of `hf`, in tokens."""
    max_rows: int = 0
    """Most responses in flight of `hf`."""
    merges: bool = False
    """True: `hf` samples from a merged copy of the weights that LoRA adapts, if it fits."""
    cache_bytes: int = 0
    """Bytes of keys and values of a colocated vLLM."""
    weight_bytes: int = BFLOAT16
    """Bytes of an element of a colocated vLLM's own weights."""
    sharing: int = 1
    """Number of ranks over which these weights are split."""
    sleeps: bool = False
    """True: vLLM frees its memory between samplings."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All inputs of the estimate. Change one with `dataclasses.replace`."""

    shapes: Architecture
    counted: Counted
    base: int
    """Bytes of a frozen element that is not in 4 bits; trained elements are float32."""
    autocast: bool
    """True: products in bf16 from float32 weights."""
    checkpointing: bool
    shared_prefixes: bool
    seconds: tuple[SecondWeights, ...]
    """Weights of the teacher and of the reference, if they exist."""
    optimizer: OptimizerBytes
    sampler: Sampler
    devices: Devices
    lengths: Lengths
    questions: int
    """Questions of a batch, over all ranks."""
    group: int
    """Responses to a question."""
    updates: int
    """Optimizer steps for each batch."""
    in_flight: int
    """Most responses requested at once on a rank, in training or validation."""
    max_tokens: int | Literal["auto"]
    """Token budget of a micro-batch."""
    measured: Measured = Measured()
    """Measured bytes of layers that no formula describes."""

    @property
    def others(self) -> tuple[SecondWeights, ...]:
        """Those of `seconds` that run another model than the policy."""
        return tuple(second for second in self.seconds if second.another)

    def narrow_of(self, second: SecondWeights) -> int:
        """Bytes of an element of the inputs and outputs of linear layers of `second`."""
        if not second.another:
            return self.narrow
        return BFLOAT16 if self.autocast else second.width

    @property
    def narrow(self) -> int:
        """Bytes of an element of the inputs and outputs of the policy's linear layers."""
        return BFLOAT16 if self.autocast else self.wide

    @property
    def wide(self) -> int:
        """Bytes of an element of the residual stream, whose dtype is the embedding's."""
        return FLOAT32 if self.counted.whole else self.base

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen base."""
        counted = self.counted
        packed = int(counted.packed * counted.quantized)
        return self.base * (counted.frozen - counted.quantized) + packed

    @property
    def shards(self) -> int:
        """Number of shards of weights, gradients and optimizer states."""
        return self.devices.ranks if self.devices.sharded else 1

    @property
    def responses(self) -> int:
        """Responses on a rank in an optimizer step."""
        return max(self.questions * self.group // (self.devices.ranks * self.updates), 1)

    @property
    def prompts(self) -> int:
        """Distinct prompts on a rank in an optimizer step."""
        return max(self.questions // (self.devices.ranks * self.updates), 1)

    def on(self, **changes: Any) -> "Setup":
        """A copy with changes of `devices`."""
        return replace(self, devices=replace(self.devices, **changes))


def setup_of(
    module: Any,
    *,
    devices: Devices,
    autocast: bool,
    questions: int,
    validation: int,
    lengths: Lengths,
    architecture: str | None = None,
    names: Mapping[str, str] | None = None,
) -> Setup:
    """Read the setup from a constructed module, which needs no weights.

    Args:
        module: a `PolicyOptimizer`.
        devices: the run's.
        autocast: True if `trainer.precision` is mixed.
        questions: `data.questions_per_batch`.
        validation: `data.val_questions_per_batch`.
        lengths: lengths to count with.
        architecture: a config.json to read instead of the policy's own.
        names: slot (`policy`, `teacher`, `reference`) -> name of its model, where the module was
            constructed with other names.

    Raises:
        ConfigurationError: if the estimate does not support the configuration.
    """
    policy: CausalLM = module.policy
    names = names or {}
    config = read_model_config(names.get("policy", policy.name_or_path), architecture)
    model = skeleton(config)
    shapes = Architecture.of(model)
    dtype = policy.loaded_dtype(devices.kind == "cuda")
    measured = Measured()
    if not shapes.is_plain:
        measured = measured_layers(config, shapes, policy.adapter, dtype, autocast=autocast)
    quantization = policy.quantization
    if "policy" in names:  # the policy was constructed with another config.json
        with blamed_on("model.policy.name_or_path"):
            quantization = quantization_of(config, quantization)
    refuse_full(policy.adapter, quantization)
    if devices.sharded and not isinstance(quantization, Unquantized):
        raise ConfigurationError(IN_SHARDS)
    in_flight = max(questions * module.sampling.n, validation * module.val_sampling.n)
    return Setup(
        shapes=shapes,
        counted=Counted.of(model, policy.adapter, quantization),
        base=dtype.itemsize,
        autocast=autocast,
        checkpointing=policy.gradient_checkpointing,
        shared_prefixes=policy.share_prefixes,
        seconds=_seconds(module, shapes, names, devices.kind),
        optimizer=_optimizer(module.optimizer, devices.kind),
        sampler=_sampler(module.rollout, devices.kind),
        devices=devices,
        lengths=lengths,
        questions=questions,
        group=module.sampling.n,
        updates=module.updates_per_rollout,
        in_flight=max(in_flight // devices.ranks, 1),
        max_tokens=module.limits.max_tokens,
        measured=measured,
    )


def sharding(strategy: object) -> bool:
    """True if `trainer.strategy` shards weights.

    Raises:
        ConfigurationError: if plan does not support the strategy.
    """
    if isinstance(strategy, ModelParallelStrategy):
        return True
    if isinstance(strategy, Mapping):
        strategy = strategy.get("class_path", "")
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    name = name.rpartition(".")[2].lower()
    if name in ("fullysharded", "modelparallelstrategy"):
        return True
    if name == "auto" or name.startswith(("ddp", "singledevice")):
        return False
    raise ConfigurationError(
        f"trainer.strategy: plan supports one device, DDP and FullySharded, got {name}"
    )


class _Own(Weights):
    """A second set of weights without tensors."""

    def __init__(
        self,
        shapes: Architecture,
        *,
        another: bool = False,
        width: int = FLOAT32,
        saved: int = 0,
    ) -> None:
        super().__init__()
        self.shapes, self.another, self.width, self.saved = shapes, another, width, saved

    def active(self, model: nn.Module) -> Any:
        raise NotImplementedError

    def pairs(self, model: nn.Module) -> Any:
        raise NotImplementedError


class _RecordingAdapter:
    """An adapter that records which weights a teacher asks for, and makes none."""

    def __init__(self, shapes: Architecture, key: str, name: str | None, kind: str) -> None:
        self.kind: Literal["none", "moving", "frozen", "external"] = "none"
        self.stored = Stored()
        self._shapes, self._key, self._name, self._device = shapes, key, name, kind

    def current(self) -> Weights:
        return _Own(self._shapes)

    def initial(self, model: object, stored: Stored = Stored()) -> Weights:
        self.kind, self.stored = "frozen", stored
        return _Own(self._shapes)

    def moving(self, model: object, name: str, stored: Stored = Stored()) -> Weights:
        self.kind, self.stored = "moving", stored
        return _Own(self._shapes)

    def other(self, model: object, source: OtherModel) -> Weights:
        self.kind, self.stored = "external", Stored(on_host=source.on_host)
        config = read_model_config(
            self._name or source.name_or_path, key=f"{self._key}.name_or_path"
        )
        width = source.loaded_dtype(self._device == "cuda").itemsize
        with blamed_on(self._key):
            quantization = quantization_of(config, Unquantized())
        model = skeleton(config)
        matrices = sum(matrices_in_4_bits(model, quantization))
        saved = int((width - quantization.bytes_each(torch.float32)) * matrices)
        return _Own(Architecture.of(model), another=True, width=width, saved=saved)


def _seconds(
    module: Any, shapes: Architecture, names: Mapping[str, str], kind: str
) -> tuple[SecondWeights, ...]:
    """Ask copies of the teachers for their weights, so that user-defined ones count too."""
    found: list[SecondWeights] = []
    teacher, reference = (copy.deepcopy(each) for each in (module.teacher, module.reference))
    for slot, made in (("teacher", teacher), ("reference", reference)):
        if not made.exists:
            continue
        noted = _RecordingAdapter(shapes, f"model.{slot}", names.get(slot), kind)
        policy: Any = SimpleNamespace(adapter=noted, wrapped=None)
        made.configure(policy, slot)
        reference.share(teacher)
        trunks = made.weights_to_run(policy)
        own = next((each for each in trunks if isinstance(each, _Own)), _Own(shapes))
        found.append(
            SecondWeights(
                slot=slot,
                kind=noted.kind,
                forwards=len(trunks) * len(made.context.named),
                shapes=own.shapes,
                another=own.another,
                width=own.width,
                stored=noted.stored,
                saved=own.saved,
            )
        )
    return tuple(found)


def _optimizer(make: Callable[..., torch.optim.Optimizer], kind: str) -> OptimizerBytes:
    """Measure the optimizer in a step on a small matrix; bytes an element hardly depend on size."""
    probe = nn.Parameter(torch.zeros(256, 256))
    optimizer = make([probe])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    kept = [v for v in optimizer.state[probe].values() if isinstance(v, torch.Tensor)]
    state = sum(tensor.nbytes for tensor in kept if tensor.dim())
    settings = optimizer.defaults
    foreach = settings.get("foreach")
    in_lists = kind == "cuda" if foreach is None and "foreach" in settings else bool(foreach)
    plain = state > 0 and not settings.get("fused")
    return OptimizerBytes(
        state=state / probe.numel(),
        temporary=FLOAT32 * float(plain and in_lists),
        of_largest=2 * FLOAT32 * float(plain and not in_lists),
    )


def _sampler(rollout: Rollout, kind: str) -> Sampler:
    if isinstance(rollout, HFRollout):
        return Sampler(
            kind="hf",
            max_tokens=rollout.max_tokens,
            max_rows=rollout.max_rows,
            merges=rollout.merged,
        )
    engine = rollout.engine if isinstance(rollout, VLLMRollout) else None
    if not isinstance(engine, Colocated):
        return Sampler(kind="remote")
    auto = {"cuda": "bfloat16"}.get(kind, "float32")
    dtype = getattr(torch, auto if engine.dtype == "auto" else engine.dtype)
    return Sampler(
        kind="colocated",
        cache_bytes=int(engine.kv_cache_gib * GIB),
        weight_bytes=dtype.itemsize,
        sharing=engine.tensor_parallel,
        sleeps=engine.sleep,
    )


def with_lora(setup: Setup, rank: int = 32) -> Setup:
    """A copy of `setup` with LoRA on every linear layer but the head; on GPU the base is bf16."""
    counted = Counted.all_linear(setup.shapes, rank)
    base = BFLOAT16 if setup.devices.kind == "cuda" else FLOAT32
    return replace(setup, counted=counted, base=base)


def with_nf4(setup: Setup) -> Setup:
    """A copy of `setup`, whose layers must be plain, with their matrices in 4 bits."""
    shapes = setup.shapes
    counted = replace(
        setup.counted,
        quantized=shapes.multiplied,
        packed=NF4().bytes_each(torch.float32),
        widest=shapes.hidden * max(shapes.intermediate, shapes.queries),
    )
    return replace(setup, counted=counted)
