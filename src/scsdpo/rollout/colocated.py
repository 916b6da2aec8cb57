"""vLLM in the trainer's own process: weights pass by reference, the memory is shared."""

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.rollout.vllm_rollout import (
    Answer,
    Engine,
    Request,
    check_length,
    not_quantised,
    refusal,
    sampled,
)
from scsdpo.rollout.weights import StreamHash, merged_weights


class Colocated(Engine):
    """vLLM in this process, on the trainer's device. One process only.

    The engine starts empty at the first sampling and gets the policy's weights then. Torch's and
    Python's random state are those from before; torch.distributed is initialised by vLLM, with a
    world of one, until the engine closes.

    Args:
        dtype: of its weights. `auto`: bfloat16 on GPU and float32 on CPU.
        max_model_len: room for a prompt and its response, in tokens.
        kv_cache_gib: memory for keys and values, in GiB; beside it come the weights once more.
        enforce_eager: no compilation and no CUDA graphs: starts sooner, samples more slowly.
        sleep: give the memory back between samplings; GPU only.

    Raises:
        ValueError: if a number is not positive.
        ConfigurationError: from `generate`, if vLLM is not installed, torch.distributed is in
            use, there is nothing to put to sleep, or vLLM would compile the policy's own class.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        max_model_len: int = 4096,
        kv_cache_gib: float = 4.0,
        enforce_eager: bool = False,
        sleep: bool = False,
    ) -> None:
        for name, value in (("max_model_len", max_model_len), ("kv_cache_gib", kv_cache_gib)):
            if value <= 0:
                raise ValueError(f"`Colocated({name}=...)` must be > 0, got {value}")
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.kv_cache_gib = kv_cache_gib
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self._llm: Any = None
        self._version = ""
        self._weights_dtype = torch.float32

    def generate(
        self, policy: CausalLM, requests: Sequence[Request], version: str
    ) -> list[list[Answer]]:
        check_length(requests, self.max_model_len, "raise model.rollout.engine.max_model_len")
        with _contained():
            if self._llm is None:
                self._llm = self._start(policy)
            elif self.sleep:
                self._llm.wake_up()
            self._synchronize(policy, version)
            answers = sampled(self._ask, requests, version)
            if self.sleep:
                self._llm.sleep(level=1)  # weights to the host, keys and values dropped
        return answers

    def close(self) -> None:
        """Stop the engine, and undo its initialisation of torch.distributed."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._version = None, ""
        cleanup_dist_env_and_memory()

    def _start(self, policy: CausalLM) -> Any:
        device = policy.language_model.device.type
        _check_place(device, self.sleep)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights pass by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        # Lightning takes vLLM's world of one for several devices.
        warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigurationError(
                f"model.rollout: VLLMRollout needs vLLM ({error}): pip install 'scsdpo[vllm]', or "
                "use HFRollout"
            ) from error
        chosen = {"cuda": "bfloat16"}.get(device, "float32") if self.dtype == "auto" else self.dtype
        with _class_kept(type(policy.language_model.get_decoder()), self.enforce_eager):
            llm = self._make(LLM, policy.chat.tokenizer.name_or_path, chosen)
        llm.llm_engine.step = _looking(llm.llm_engine.step)
        (described,) = llm.collective_rpc("scsdpo_describe")
        not_quantised(described["quantization"], "vLLM, told so by the checkpoint's config,")
        self._weights_dtype = getattr(torch, described["dtype"])
        return llm

    def _make(self, kind: Callable[..., Any], path: str, dtype: str) -> Any:
        return kind(
            model=path,
            load_format="dummy",  # the policy's come before anything is sampled
            dtype=dtype,
            max_model_len=self.max_model_len,
            kv_cache_memory_bytes=int(self.kv_cache_gib * 2**30),
            enforce_eager=self.enforce_eager,
            enable_sleep_mode=self.sleep,
            # vLLM's default is of the logits before temperature and cuts.
            logprobs_mode="processed_logprobs",
            worker_extension_cls="scsdpo.rollout.WeightReceiver",
            disable_log_stats=True,
        )

    def _synchronize(self, policy: CausalLM, version: str) -> None:
        """Bring the weights if they changed."""
        if version != self._version:
            self._version = ""  # if it fails midway, nothing is known of the engine's weights
            stream = StreamHash()
            weights = stream.over(merged_weights(policy, self._weights_dtype))
            (received,) = self._llm.collective_rpc("scsdpo_load", args=(weights,))
            if why := refusal(received, stream.hexdigest()):
                raise TrainingStopped(f"vLLM in this process {why}: it is not sampled from")
            # Keys and values of prompts are those of the old weights.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache after new weights")
            self._llm.update_weight_version(version)
            self._version = version

    def _ask(self, requests: Sequence[Request]) -> list[list[Answer]]:
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.ids)} for request in requests],
            [SamplingParams(**request.parameters) for request in requests],
            use_tqdm=False,
        )
        return [[_answer(completion) for completion in output.outputs] for output in outputs]


def _looking(step: Callable[[], Any]) -> Callable[[], Any]:
    """The engine's step, which looks first whether the run was asked to stop."""

    def looking() -> Any:
        interrupt.check()
        return step()

    return looking


def _answer(completion: Any) -> Answer:
    ids = list(completion.token_ids)
    return Answer(
        ids=ids,
        logprobs=[
            at[token].logprob for token, at in zip(ids, completion.logprobs or (), strict=True)
        ],
        finish_reason=completion.finish_reason,
        versions=frozenset(span.version for span in completion.weight_versions or ()),
    )


def _check_place(device: str, sleep: bool) -> None:
    if dist.is_available() and dist.is_initialized():
        raise ConfigurationError(
            "model.rollout.engine: Colocated initialises torch.distributed for itself, and here is "
            f"a group of {dist.get_world_size()} already: use the engine Servers, or "
            "trainer.devices=1 with trainer.strategy=auto"
        )
    if device == "cuda":
        return
    if sleep:
        raise ConfigurationError(
            "model.rollout.engine.sleep: vLLM ignores it on CPU, nothing would be given back: set "
            "it to false"
        )
    if "OMP_NUM_THREADS" not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
        warnings.warn(
            "vLLM and torch wait for each other's threads by spinning when they share cores: start "
            "with OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE",
            stacklevel=2,
        )


@contextmanager
def _contained() -> Iterator[None]:
    """Undo what the engine does to its process: it seeds every generator and, on CPU, replaces
    `torch.set_num_threads` with a function that does nothing.
    """
    before = random.getstate(), np.random.get_state(), torch.set_num_threads
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_num_threads = before[2]


@contextmanager
def _class_kept(decoder: type, enforce_eager: bool) -> Iterator[None]:
    """Give the policy's class back as it was.

    An architecture that vLLM has no code of its own for (OLMo-3 in 0.32) runs from transformers'
    class, which vLLM changes in place for its compiler: objects made before, such as the policy,
    can then not be called any more. Without compilation the unchanged class does as well.
    """
    bases, own = decoder.__bases__, dict(vars(decoder))
    try:
        yield
    finally:
        changed = decoder.__bases__ != bases
        if changed:
            decoder.__bases__ = bases
            for name in ("__init__", "__call__"):
                if name in own:
                    setattr(decoder, name, own[name])
                elif name in vars(decoder):
                    delattr(decoder, name)
    if changed and not enforce_eager:
        raise ConfigurationError(
            f"model.rollout.engine.enforce_eager: vLLM compiles {decoder.__name__} in place, the "
            "policy's own class: set it to true, or use the engine Servers"
        )
