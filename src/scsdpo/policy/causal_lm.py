"""The policy: a causal language model with its tokenizer and adapter."""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from scsdpo.distributed import all_max
from scsdpo.errors import ConfigurationError, blamed_on
from scsdpo.policy.adapter import Adapter, FullFineTune, refuse_full
from scsdpo.policy.budget import free_bytes, memory_line
from scsdpo.policy.chat import Chat
from scsdpo.policy.decoder import decoder_of
from scsdpo.policy.experts import routers
from scsdpo.policy.loading import load_model
from scsdpo.policy.location import located
from scsdpo.policy.quantization import Quantization, Unquantized, quantization_of
from scsdpo.policy.row_path import RowPath, known_path
from scsdpo.policy.rows import Rows
from scsdpo.policy.runner import Runner, SeparateRows, SharedPrompts
from scsdpo.policy.shard_loading import load_shards
from scsdpo.policy.sharding import in_root_forward, is_sharded, shard, whole
from scsdpo.policy.weights import Weights
from scsdpo.private.torch import compiled_graphs
from scsdpo.private.transformers import forward_in_checkpoint

T = TypeVar("T")


class CausalLM(nn.Module):
    """A Hugging Face causal language model as the policy pi(y | x).

    The constructor loads the tokenizer. `configure_model` loads the weights, after the whole
    configuration was checked.

    Args:
        name_or_path: hub name or local folder; `tiny` and `tiny-tools` ship with the package.
        dtype: dtype of the loaded weights. `auto`: float32 for `FullFineTune`; for `Lora`
            bfloat16 on GPU and float32 on CPU.
        attn_implementation: as in transformers; with `sdpa` rollouts share the forward of common
            prefixes, if the architecture allows it (docs/models.md).
        adapter: `FullFineTune()` or `Lora(...)`.
        quantization: how the frozen base of a `Lora` is kept: `Unquantized()`, or `NF4()` in 4 bits
            (QLoRA). A checkpoint that is in 4 bits already stays as it is.
        gradient_checkpointing: recompute activations in the backward; less memory, same numbers.
        gathered_dtype: dtype in which FSDP gathers a layer's weights to run it. `auto`: the dtype
            of the weights. `bfloat16` halves the traffic. It also rounds norms and embedding, which
            autocast would not; shards and summed gradients stay float32.
        compile_layers: `torch.compile` each decoder layer around its attention, for the update;
            faster on GPU after a slow first step, numbers equal up to rounding. Sampling stays
            eager. A warning tells if torch compiled nothing.
        self_check: before the first step of a run, compare a few made-up rows, run as the run will
            run them, with the same rows run one at a time (docs/models.md).
        expert_balance: weight of the load-balancing loss of a mixture of experts (`balance_loss`:
            f_e P_e summed over experts, a mean over layers, sampled tokens of a response, and the
            responses of an optimizer step), which is added to the step's loss. 0 turns it off.
            Otherwise layers x E numbers for each token are kept for the backward.
        chat_template_kwargs: passed to the chat template, e.g. `enable_thinking: false`.
            `strftime_now: 2026-01-31` fixes the date that a template writes.

    Raises:
        ValueError: if there is no such checkpoint, or it is incomplete; if the hub cannot be
            reached and no copy is in the cache; if there is no chat template or no end-of-sequence
            token; if a full fine-tune would train weights in 4 bits; from `configure_model`, if the
            checkpoint lacks weights, or the architecture changes its logits after the head by more
            than a constant.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        attn_implementation: str = "sdpa",
        adapter: Adapter = FullFineTune(),
        quantization: Quantization = Unquantized(),
        gradient_checkpointing: bool = False,
        gathered_dtype: Literal["auto", "bfloat16"] = "auto",
        compile_layers: bool = False,
        self_check: bool = True,
        expert_balance: float = 0.0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name_or_path = name_or_path
        self.adapter = adapter
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.gathered_dtype = gathered_dtype
        if gathered_dtype != "auto" and not isinstance(adapter, FullFineTune):
            raise ValueError(
                "`CausalLM(gathered_dtype='bfloat16')` would round LoRA's float32 factors: set "
                "model.policy.gathered_dtype to auto"
            )
        self.compile_layers = compile_layers
        self.self_check = self_check
        if expert_balance < 0:
            raise ValueError(f"`CausalLM(expert_balance=...)` must be >= 0, got {expert_balance}")
        self.expert_balance = expert_balance
        self._compiled: WeakSet[nn.Module] = WeakSet()
        self._graphs_before = 0
        self._memory_lines: dict[torch.dtype | None, tuple[float, float]] = {}
        self._dtype = dtype
        try:
            self._path = located(name_or_path)
        except ValueError as error:
            raise ValueError(f"`CausalLM(name_or_path={name_or_path!r})`: {error}") from error
        self.chat = _load_chat(self._path, name_or_path, chat_template_kwargs or {})
        with blamed_on("model.policy.name_or_path"):
            config = AutoConfig.from_pretrained(self._path)
            self.known = known_path(config, attn_implementation)
            """How rows run, from the architecture alone; the self-check may change it."""
            self.quantization = quantization_of(config, quantization)
            """How matrices are kept: as `quantization` says, or as the checkpoint has them."""
        refuse_full(adapter, self.quantization)
        self.model: nn.Module | None = None
        self._skeleton: list[PreTrainedModel] = []  # in lists, so that they are no submodules
        self._held: list[PreTrainedModel] = []
        self._in_force: tuple[Weights, PreTrainedModel] | None = None
        self.register_state_dict_post_hook(_drop_unsaved)

    def configure_model(self, *, to_shard: bool = False) -> None:
        """Load the weights; a second call does nothing.

        Args:
            to_shard: build the model on `meta`, without values; `fill_shards` loads it.
        """
        if self.model is not None:
            return
        dtype = self.loaded_dtype(torch.cuda.is_available())
        with blamed_on("model.policy.name_or_path"):
            loaded = load_model(
                self._path,
                dtype=dtype,
                known=self.known,
                quantization=self.quantization,
                on_meta=to_shard,
            )
        if self.expert_balance and not routers(loaded):
            raise ConfigurationError(
                f"model.policy.expert_balance: {type(loaded).__name__} has no experts with routers "
                "that transformers records: set it to 0"
            )
        if self.gradient_checkpointing:
            if hasattr(loaded, "activation_checkpointing_enable"):  # transformers >= 5.23
                loaded.activation_checkpointing_enable({"use_reentrant": False})
            else:
                loaded.gradient_checkpointing_enable({"use_reentrant": False})
            loaded.enable_input_require_grads()
        # Loaded in eval mode; dropout, if there is any, belongs to training.
        self.model = self.adapter.wrap(loaded).train()

    def fill_shards(self, mesh: DeviceMesh, modules: Iterable[nn.Module]) -> None:
        """Shard the model that `configure_model` built on `meta`; each rank loads its own part.

        Args:
            mesh: one-dimensional (`flat_mesh`).
            modules: those among them that are `Weights` are sharded too, and get their first values
                after the policy.
        """
        others = [module for module in modules if isinstance(module, Weights)]
        self._skeleton = [copy.deepcopy(self.language_model)]
        gathered = None if self.gathered_dtype == "auto" else torch.bfloat16
        shard(self.language_model, mesh, gathered)
        for weights in others:
            for model in weights.models():
                runs_in = weights.runs_in(gathered or self.language_model.dtype)
                shard(model, mesh, runs_in, on_host=weights.stored.on_host)
        load_shards(self.language_model, self._path)
        self.adapter.draw(self.wrapped)
        for weights in others:
            weights.begin(self.wrapped)

    def loaded_dtype(self, device_is_gpu: bool) -> torch.dtype:
        """Dtype in which the checkpoint's weights are loaded."""
        if self._dtype == "auto":
            return self.adapter.dtype(device_is_gpu)
        return getattr(torch, self._dtype)

    @property
    def wrapped(self) -> nn.Module:
        """The trainable module (for LoRA: peft's `PeftModel`)."""
        if self.model is None:
            raise RuntimeError("the policy has no weights yet: call `configure_model()` first")
        return self.model

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, with its adapters."""
        return self.adapter.language_model(self.wrapped)

    @property
    def vocabulary(self) -> int:
        """V, the rows of the head; a padded head has more rows than the tokenizer has tokens."""
        return self.language_model.get_output_embeddings().weight.shape[0]

    @property
    def share_prefixes(self) -> bool:
        """True if every common start of prompts runs once."""
        return self.known.path is RowPath.SHARED

    def run_rows(self, path: RowPath, reason: str) -> None:
        """Let rows run by `path` from now on, because of `reason`; all ranks must call it."""
        self.known = replace(self.known, path=path, reason=reason)
        self._memory_lines.clear()

    def sample_rows(self, path: RowPath) -> None:
        """Let `HFRollout` draw by `path` from now on; all ranks must call it."""
        self.known = replace(self.known, sampled=path)

    def token_budget(self) -> int:
        """Number of tokens whose activations fit in half of the free memory, measured once.

        The other half is for chunks of logits, the head's gradient, and keys and values of prompts.
        At most 1024 on CPU, where more tokens at a time are not faster.
        """
        device = self.language_model.device
        most = 2**17 if device.type == "cuda" else 2**10
        fixed, a_token = self.memory_line()
        return max(min(int((free_bytes(device) // 2 - fixed) / a_token), most), 1)

    def memory_line(self) -> tuple[float, float]:
        """(bytes of gradients and casts, bytes of activations for each token) of an update now."""
        device = self.language_model.device
        narrow = torch.is_autocast_enabled(device.type)
        key = torch.get_autocast_dtype(device.type) if narrow else None
        if key not in self._memory_lines:
            embedding = self.language_model.get_input_embeddings()
            self._memory_lines[key] = memory_line(self._probe, embedding, device)
        fixed, a_token = self._memory_lines[key]
        learned = [p for p in self.parameters() if p.requires_grad]
        return fixed + sum(p.numel() * p.element_size() for p in learned), a_token

    def _probe(self, tokens: int) -> Tensor:
        """Hidden states of one response of `tokens` padding tokens."""
        pad = self.chat.pad_id
        ids = torch.full((1, tokens), pad)
        every = torch.ones_like(ids).bool()
        rows = Rows(prompts=[(pad,)], ids=ids, present=every, sampled=every, pad_id=pad)
        return self.runner(rows, [0], tokens).run([0], lambda hidden, head: hidden)

    def runner(
        self,
        rows: Rows,
        chosen: Sequence[int],
        max_tokens: int,
        weights: Weights | None = None,
        *,
        watches: bool = False,
    ) -> Runner:
        """A runner of the `chosen` rows in micro-batches.

        Args:
            rows: responses of an optimizer step.
            chosen: indices of the rows that will run.
            max_tokens: tokens whose activations are alive at a time.
            weights: run with these, without gradient; None: with the trained weights.
            watches: record the logits of the routers of experts (`Runner.routes`).
        """
        within = self if weights is None else partial(self.run, weights)
        together = is_sharded(self)
        known = self.known if weights is None else weights.known(self.known)
        lengths = rows.present.sum(-1).tolist()
        longest = max((len(rows.prompts[row]) + lengths[row] - 1 for row in chosen), default=0)
        if together and known.is_length_dependent:  # all ranks must take the same path
            longest = int(all_max(torch.tensor(longest)))
        path = known.of(longest)
        if path is RowPath.SHARED and (self.share_prefixes or known is not self.known):
            return SharedPrompts(
                within,
                rows,
                chosen,
                max_tokens,
                lockstep=together,
                learns=weights is None,
                watches=watches,
            )
        return SeparateRows(
            within,
            rows,
            chosen,
            max_tokens,
            lockstep=together,
            alone=path is RowPath.ALONE,
            watches=watches,
        )

    def forward(self, work: Callable[[PreTrainedModel], T]) -> T:
        """Do `work` on the language model, in one root forward.

        Under FSDP2 weights are gathered only during a forward, so `work` must do both the decoder's
        forward and the loss.
        """
        return in_root_forward(self._ready(self.language_model), work)

    @contextmanager
    def sampling_mode(self) -> Iterator[PreTrainedModel]:
        """The student for inference: not compiled, eval mode, no gradients; exit restores all.

        Autocast would cast the weights of linear layers for each token. They are cast once instead,
        if that takes at most half of the free memory.
        """
        with self.held_whole() as model:
            ready = self._cast_once(model)
            # Shapes change at every decoding step, and torch would compile each.
            with torch.compiler.set_stance("force_eager"), _inference(ready):
                yield ready

    @contextmanager
    def held_whole(self) -> Iterator[PreTrainedModel]:
        """The student with gathered weights. No step may change them while the context is open.

        If weights are sharded, the outermost entry is a collective that gathers a copy, with linear
        layers in autocast's dtype. Work with the copy needs no other rank.
        """
        if self._held or not self._skeleton:
            yield self._held[0] if self._held else self.language_model
            return
        device = self.language_model.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._held = [whole(self.language_model, self._skeleton[0], narrow)]
        try:
            yield self._held[0]
        finally:
            self._held = []

    def _cast_once(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model`, or a copy with linear layers in autocast's dtype; other tensors are shared."""
        kind = model.device.type
        if not (torch.is_autocast_enabled(kind) and isinstance(self.adapter, FullFineTune)):
            return model
        narrow = torch.get_autocast_dtype(kind)
        linear = [name for name, part in model.named_modules() if type(part) is nn.Linear]
        wide = [name for name in linear if model.get_submodule(name).weight.dtype != narrow]
        taken = narrow.itemsize * sum(model.get_submodule(name).weight.numel() for name in wide)
        if not wide or 2 * taken > free_bytes(model.device):
            return model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        plain = copy.deepcopy(model, shared)
        for name in wide:
            part = plain.get_submodule(name)
            part.weight = nn.Parameter(part.weight.detach().to(narrow), requires_grad=False)
        return plain

    @contextmanager
    def in_force(self, weights: Weights) -> Iterator[PreTrainedModel]:
        """The model with another set of weights, for inference; no third set may run meanwhile.

        Switching to other weights and back walks over all modules. Calls of `run` with the same
        weights inside this context do not switch again.
        """
        if self._in_force and self._in_force[0] is weights:
            yield self._in_force[1]
            return
        assert self._in_force is None, "another set of weights is in force"
        with weights.active(self.wrapped) as model, _inference(model):
            self._in_force = weights, model
            try:
                yield model
            finally:
                self._in_force = None

    def run(self, weights: Weights, work: Callable[[PreTrainedModel], T]) -> T:
        """Do `work` with another set of weights, without gradient."""
        with self.in_force(weights) as model:
            return in_root_forward(self._ready(model) if weights.stored.is_plain else model, work)

    def _ready(self, model: PreTrainedModel) -> PreTrainedModel:
        """Compile the layers of `model` on its first use if `compile_layers`; return `model`."""
        if not self.compile_layers:
            return model
        if model not in self._compiled:
            if not self._compiled:
                self._graphs_before = compiled_graphs()
            self._compiled.add(model)
            for layer in decoder_of(model).layers:
                if not isinstance(layer, _Compiled):  # a copy of a compiled layer is compiled
                    layer.__class__ = _compiled(type(layer))  # type: ignore[arg-type]  # of __hash__
        elif compiled_graphs() == self._graphs_before:
            self._graphs_before = -1  # said once
            rank_zero_warn(
                "model.policy.compile_layers: torch compiled nothing in the first forward, so "
                "layers run uncompiled: set it to false, or unset TORCH_COMPILE_DISABLE and "
                "TORCHDYNAMO_DISABLE in the environment"
            )
        return model


class _Compiled:
    """Marks a layer whose forward is compiled."""


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with a compiled forward, within its checkpoint if there is one.

    torch compiles nothing around a checkpoint in which a graph breaks, as it does at attention.
    """
    forward = torch.compile(forward_in_checkpoint(kind), dynamic=True)
    return type(f"Compiled{kind.__name__}", (_Compiled, kind), {"forward": forward})


@contextmanager
def _inference(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    training = model.training
    if training:  # `eval` and `train` walk over all modules
        model.eval()  # turns dropout off
    try:
        with torch.no_grad():
            yield model
    finally:
        if training:
            model.train()


def _drop_unsaved(module: CausalLM, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Leave the frozen base of a LoRA policy out of checkpoints; it is loaded by its name."""
    start = f"{prefix}model."
    for key in [k for k in state if k.startswith(start) and not module.adapter.is_saved(k)]:
        del state[key]


def _load_chat(path: str, name: str, template_kwargs: dict[str, Any]) -> Chat:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path).get_text_config()
        try:
            ends = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # no generation_config.json
            ends = config.eos_token_id
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"`CausalLM(name_or_path={name!r})` cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    listed = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.eos_token_id is not None:
        listed.append(tokenizer.eos_token_id)
    return Chat(
        tokenizer=tokenizer,
        eos_ids=tuple(dict.fromkeys(listed)),
        template_kwargs=template_kwargs,
        rows=config.vocab_size,
        positions=_positions(config),
    )


def _positions(config: PreTrainedConfig) -> int:
    """Number of positions that a model was made for, with scaled rotary frequencies counted."""
    settings = config.to_dict()
    positions = settings.get("max_position_embeddings") or settings.get("n_positions")
    rope = settings.get("rope_parameters") or {}
    scaled = rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or 0)
    return max(positions, int(scaled)) if positions else sys.maxsize
