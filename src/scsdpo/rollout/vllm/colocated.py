"""vLLM in every rank of the trainer: both share the device, and weights stay in memory."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from scsdpo import interrupt
from scsdpo.distributed import share_errors
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.policy import CausalLM
from scsdpo.policy.decoder import decoder_of
from scsdpo.policy.quantization import plain_elements
from scsdpo.rollout.vllm.contained import class_kept, contained, group_spared, launched, make_world
from scsdpo.rollout.vllm.rollout import (
    Engine,
    EngineAnswer,
    Request,
    answers_without_faults,
    check_length,
    not_quantised,
)
from scsdpo.rollout.vllm.tensor_parallel import TensorParallelQueue
from scsdpo.rollout.weights.files import folder_in_memory, write_adapter
from scsdpo.rollout.weights.hashing import StreamHash, refusal
from scsdpo.rollout.weights.stream import LoraTransport, Sink, WeightPass, WeightStream, rank_for

_GIB = 2**30
_WORK = _GIB
"""Rough number of bytes that vLLM takes in addition: activations, logits, CUDA graphs."""
_MISSING = (
    "model.rollout: VLLMRollout needs vLLM, which is not installed here: use HFRollout, or make an "
    "environment with it (docs/vllm.md, Installing)"
)
_ADAPTER = "policy"
"""Name of the adapter in vLLM."""


class Colocated(Engine):
    """vLLM in this process, on the trainer's device, in every rank.

    The engine starts without weights at the first sampling, and then gets the policy's, a layer at
    a time; shards are gathered. Each rank samples for its own prompts with its own engine. With
    `tensor_parallel` t each t neighbouring ranks share one engine. An error on one rank is raised
    on all. vLLM uses the trainer's process group and does not destroy it; if there is none, a group
    of one rank exists until the engine closes. The random states of torch and Python are restored
    after sampling.

    Args:
        dtype: dtype of vLLM's weights. `auto`: bfloat16 on GPU and float32 on CPU.
        max_model_len: most tokens of a prompt with its response.
        kv_cache_gib: memory for keys and values, in GiB for each rank. vLLM's own copy of the
            weights comes on top, 1 / `tensor_parallel` of them on each rank.
        enforce_eager: no compilation and no CUDA graphs: vLLM starts sooner and samples more
            slowly.
        sleep: free all of vLLM's memory between samplings; GPU only.
        tensor_parallel: number of ranks that share an engine. It must divide the number of ranks,
            which should be on one machine.
        adapter: how the LoRA of a policy is sent: `merged` into the weights, which are all sent at
            each step, or `alone`, beside the base. `auto`: alone if vLLM supports it.

    Raises:
        ValueError: if a number is not positive.
        ConfigurationError: from `generate`, if vLLM is not installed, `tensor_parallel` does not
            divide the number of ranks, memory does not suffice, `sleep` is set on CPU, or vLLM
            would compile the policy's own class.
        TrainingStopped: from `generate`, if ranks that share an engine have different requests.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        max_model_len: int = 4096,
        kv_cache_gib: float = 4.0,
        enforce_eager: bool = False,
        sleep: bool = False,
        tensor_parallel: int = 1,
        adapter: LoraTransport = "auto",
    ) -> None:
        numbers = {
            "max_model_len": max_model_len,
            "kv_cache_gib": kv_cache_gib,
            "tensor_parallel": tensor_parallel,
        }
        for name, value in numbers.items():
            if value <= 0:
                raise ValueError(f"`Colocated({name}=...)` must be > 0, got {value}")
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.kv_cache_gib = kv_cache_gib
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self.tensor_parallel = tensor_parallel
        self.adapter = adapter
        self._llm: Any = None
        self._sink: InProcess | None = None
        self._supported: list[str] | None = None
        """Last parts of the names of modules that vLLM can adapt; None: LoRA is merged."""
        self._queue: TensorParallelQueue | None = None
        self._version = ""
        self._held = self._begun = self._asleep = self._made_world = False

    def generate(
        self, policy: CausalLM, requests: Sequence[Request], version: str
    ) -> list[list[EngineAnswer]]:
        with self.hold_weights(policy, version), contained(policy.language_model.device):
            if self._queue is not None:
                return self._queue.answers(self._version, requests)
            self._refuse(requests)
            return self._answers(requests)

    @contextmanager
    def hold_weights(
        self, policy: CausalLM, version: str, *, barrier: bool = True
    ) -> Iterator[None]:
        if self._held:
            yield
            return
        device = policy.language_model.device
        self._held = True
        try:
            with contained(device):
                self._start(policy)
                self._synchronize(policy, version)
            with share_errors() if barrier else nullcontext():
                try:
                    yield
                except (Exception, interrupt.Interrupted):
                    if barrier:
                        self._leave(device)
                    raise
                self._leave(device)
        finally:
            self._held = False
            self._rest(device)

    def check(self, requests: Sequence[Request]) -> None:
        with share_errors():
            self._refuse(requests)

    def generate_nothing(self) -> None:
        if self._queue is not None:
            self._queue.answers(self._version, ())

    def check_installed(self) -> None:
        if "vllm" not in sys.modules and find_spec("vllm") is None:
            raise ConfigurationError(_MISSING)

    def max_length(self) -> int:
        return self.max_model_len

    def close(self) -> None:
        """Stop the engine, even if its start failed, and leave torch.distributed as it was."""
        if self._begun:
            from vllm.distributed import cleanup_dist_env_and_memory

            with group_spared():
                if self._llm is not None:
                    self._llm.llm_engine.engine_core.shutdown()
                cleanup_dist_env_and_memory()
        self._llm = self._sink = self._queue = None
        self._version = ""
        self._begun = self._asleep = False
        if self._made_world:
            self._made_world = False
            dist.destroy_process_group()

    def _start(self, policy: CausalLM) -> None:
        """Start the engine unless it runs; if it fails on one rank, it fails on all."""
        if self._llm is not None:
            return
        device = policy.language_model.device
        with share_errors():
            self._check(policy)
            kind = _vllm()
        self._made_world, self._begun = make_world(device), True
        with ExitStack() as undo:
            undo.callback(self.close)
            with share_errors():
                decoder = type(decoder_of(policy.language_model))
                kept = class_kept(decoder, self.enforce_eager)
                with launched(device), kept, _explained():
                    self._llm = kind(**self._settings(policy))
                self._llm.llm_engine.step = self._looking(self._llm.llm_engine.step)
                (described,) = self._llm.collective_rpc("scsdpo_describe")
                not_quantised(
                    described["quantization"], "vLLM, because of the checkpoint's config,"
                )
                self._sink = InProcess(self._llm)
                self._supported = (described["adapters"] or {}).get("modules")
            undo.pop_all()
        if self.tensor_parallel > 1:
            from vllm.distributed import get_tp_group

            self._queue = TensorParallelQueue(get_tp_group().cpu_group, self._refuse, self._answers)

    def _check(self, policy: CausalLM) -> None:
        """Raise for settings that cannot work, before anything starts."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % self.tensor_parallel:
            raise ConfigurationError(
                f"model.rollout.engine.tensor_parallel: {self.tensor_parallel} does not divide the "
                f"number of ranks, {world}: change it, or trainer.devices"
            )
        device = policy.language_model.device
        if device.type == "cuda":
            _check_memory(self._bytes(policy), device)
            return
        if self.sleep:
            raise ConfigurationError(
                "model.rollout.engine.sleep: vLLM frees no memory on CPU: set it to false"
            )
        _warn_of_spinning()

    def _settings(self, policy: CausalLM) -> dict[str, Any]:
        rank = rank_for(policy, self.adapter)
        return {
            "model": policy.chat.tokenizer.name_or_path,
            "load_format": "dummy",  # the policy's weights are sent before the first sampling
            "dtype": str(self._weight_dtype(policy)).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "kv_cache_memory_bytes": int(self.kv_cache_gib * _GIB),
            # vLLM wants this share of the device to be free, although the cache has its own size.
            "gpu_memory_utilization": self._share(policy),
            "enforce_eager": self.enforce_eager,
            "enable_sleep_mode": self.sleep,
            # By default log-probs are under the distribution before temperature and cuts.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "scsdpo.rollout.WeightReceiver",
            "disable_log_stats": True,
            # One engine in each process, which takes its rank from the trainer's group.
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": self.tensor_parallel,
            **({} if rank is None else {"enable_lora": True, "max_lora_rank": rank}),
        }

    def _weight_dtype(self, policy: CausalLM) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        on_gpu = policy.language_model.device.type == "cuda"
        return torch.bfloat16 if on_gpu else torch.float32

    def _bytes(self, policy: CausalLM) -> int:
        """Bytes that vLLM takes on a rank: weights, keys and values, and working memory."""
        elements = sum(plain_elements(p) for p in policy.language_model.parameters())
        weights = elements * self._weight_dtype(policy).itemsize / self.tensor_parallel
        return int(weights + self.kv_cache_gib * _GIB) + _WORK

    def _share(self, policy: CausalLM) -> float:
        device = policy.language_model.device
        if device.type != "cuda":
            return 0.01  # has no effect
        return self._bytes(policy) / torch.cuda.mem_get_info(device)[1]

    def _synchronize(self, policy: CausalLM, version: str) -> None:
        """Wake the engine and send weights that it lacks; an error is raised on all ranks."""
        if version == self._version:
            return
        sink, dtype = self._sink, self._weight_dtype(policy)
        assert sink is not None
        self._version = ""  # after an error the engine's weights are unknown
        try:
            with share_errors():
                if self._asleep:
                    self._llm.wake_up(tags=["weights"])
                with closing(WeightStream(policy, self.adapter, led=False)) as stream:
                    sink.send(stream, version, dtype, self._supported)
                if self._asleep:
                    self._llm.wake_up(tags=["kv_cache"])
                    self._asleep = False
                # The prefix cache holds keys and values of the old weights.
                if not self._llm.reset_prefix_cache():
                    raise RuntimeError("vLLM did not reset its prefix cache after new weights")
                self._llm.update_weight_version(version)
        except BaseException:
            sink.forget()  # on every rank, so that all make the same passes the next time
            raise
        self._version = version

    def _leave(self, device: torch.device) -> None:
        """Take part in the requests of the other ranks of the engine until they have none."""
        if self._queue is not None:
            with contained(device):
                self._queue.leave(self._version)

    def _rest(self, device: torch.device) -> None:
        """Put the engine to sleep if `sleep`; it drops the weights, which the next step changes."""
        if self.sleep and self._llm is not None and self._sink is not None:
            self._version, self._asleep = "", True
            self._sink.forget()
            with contained(device):
                self._llm.sleep(level=2)

    def _refuse(self, requests: Sequence[Request]) -> None:
        check_length(requests, self.max_model_len, "raise model.rollout.engine.max_model_len")

    def _answers(self, requests: Sequence[Request]) -> list[list[EngineAnswer]]:
        return answers_without_faults(self._ask, requests, self._version)

    def _ask(self, requests: Sequence[Request]) -> list[list[EngineAnswer]]:
        from vllm import SamplingParams

        if not requests:
            return []
        engine = self._llm.llm_engine
        adapter = None if self._supported is None else _lora_request(Path(self._version))
        try:
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(request.ids)} for request in requests],
                [SamplingParams(**request.parameters) for request in requests],
                use_tqdm=False,
                lora_request=adapter,
            )
        except BaseException:  # otherwise the next call would return these responses too
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        return [[_answer(completion) for completion in output.outputs] for output in outputs]

    def _looking(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """The engine's step, after a check if the run was asked to stop."""

        def looking() -> Any:
            if self._queue is None:
                interrupt.check()
            else:
                self._queue.check_interrupt()
            return step()

        return looking


class InProcess(Sink):
    """Loads weights into vLLM in this process, without a copy between processes.

    Args:
        llm: vLLM's `LLM`, with one worker in this process.
    """

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self._llm = llm

    def load(self, weights: WeightPass, version: str, dtype: torch.dtype) -> None:
        sent = StreamHash()
        passing = sent.over(weights(dtype))
        (receipt,) = self._llm.collective_rpc("scsdpo_load", args=(passing,))
        _check(refusal(receipt, sent.hexdigest()))

    def load_adapter(self, weights: dict[str, Tensor], version: str) -> None:
        with folder_in_memory(sum(value.nbytes for value in weights.values())) as folder:
            _, sent = write_adapter(weights, folder / version)
            self._llm.llm_engine.add_lora(_lora_request(folder / version, load_inplace=True))
        (receipt,) = self._llm.collective_rpc("scsdpo_held", args=(_ADAPTER,))
        _check(refusal(receipt, sent, adapter=True))


def _check(why: str) -> None:
    if why:
        raise TrainingStopped(
            f"vLLM in this process {why}, so it cannot sample from the policy: resume with "
            "--ckpt_path"
        )


def _lora_request(path: Path, load_inplace: bool = False) -> Any:
    """VLLM's request for the adapter; its path is read only when the adapter is loaded."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(_ADAPTER, 1, str(path), load_inplace=load_inplace)


def _vllm() -> Callable[..., Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights pass by reference
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A process group of one rank makes Lightning warn as on several devices.
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigurationError(f"{_MISSING} ({first_line(error)})") from error
    return LLM


@contextmanager
def _explained() -> Iterator[None]:
    """Turn vLLM's errors at its start into one line that names our settings."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        raise ConfigurationError(
            "model.rollout.engine: vLLM cannot start with these kv_cache_gib, max_model_len, dtype "
            f"and tensor_parallel: change them ({first_line(error)})"
        ) from error


def _answer(completion: Any) -> EngineAnswer:
    ids = list(completion.token_ids)
    return EngineAnswer(
        ids=ids,
        logprobs=[
            at[token].logprob for token, at in zip(ids, completion.logprobs or (), strict=True)
        ],
        finish_reason=completion.finish_reason,
        versions=frozenset(span.version for span in completion.weight_versions or ()),
    )


def _check_memory(needed: int, device: torch.device) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise ConfigurationError(
            f"model.rollout.engine.kv_cache_gib: vLLM needs {needed / _GIB:.1f} GiB on {device}, "
            f"with its weights, but beside the trainer only {free / _GIB:.1f} GiB are free: lower "
            "it, raise tensor_parallel, or shard the trainer's weights"
        )


def _warn_of_spinning() -> None:
    if "OMP_NUM_THREADS" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        warnings.warn(
            "vLLM and torch slow each other down, because their threads spin on the same cores: "
            "start with OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE",
            stacklevel=2,
        )
