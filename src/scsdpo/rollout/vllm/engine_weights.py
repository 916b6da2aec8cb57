"""Weights of a vLLM engine in this process: all of them merged, or a base and an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scsdpo.errors import TrainingStopped
from scsdpo.policy import CausalLM
from scsdpo.rollout.vllm.rollout import refusal
from scsdpo.rollout.weights.lora_adapter import (
    MergeRounding,
    adapter_weights,
    base_digest,
    base_weights,
    check_targets,
    folder_in_memory,
    write_adapter,
)
from scsdpo.rollout.weights.weights import StreamHash, merged_weights

_ADAPTER = "policy"
"""Its name in vLLM."""


class EngineWeights:
    """What an engine holds, and how it gets what a policy has now.

    Args:
        llm: vLLM's, with one worker in this process.
        dtype: of its weights.
        adapters: what `WeightReceiver.scsdpo_describe` says of them; None: LoRA is merged.
    """

    def __init__(self, llm: Any, dtype: torch.dtype, adapters: dict[str, Any] | None) -> None:
        self._llm, self._dtype, self._adapters = llm, dtype, adapters
        self._base = ""
        self._rounding = MergeRounding()

    def bring(self, policy: CausalLM, version: str) -> None:
        """Load the policy's weights; under shards every rank must, in step.

        Raises:
            ConfigurationError: if the engine has no adapters for layers that have one.
            TrainingStopped: if other weights arrived, or not all that the engine's model has.
        """
        if self._adapters is None:
            self._rounding.look(policy, self._dtype)
            self._load(merged_weights(policy, self._dtype))
            return
        base = base_digest(policy)
        if base != self._base:
            self._base = ""
            self._load(base_weights(policy, self._dtype))
            self._base = base
        self._load_adapter(policy, version, self._adapters["modules"])

    def drop(self) -> None:
        """The engine has none any more."""
        self._base = ""

    def request(self, version: str) -> Any:
        """What generates with the adapter; None if there is none."""
        return None if self._adapters is None else _request(Path(version))

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        stream = StreamHash()
        passing = stream.over(weights)
        try:
            (received,) = self._llm.collective_rpc("scsdpo_load", args=(passing,))
        finally:
            # Other ranks may still gather theirs, for which this one is needed.
            for _ in passing:
                pass
        if why := refusal(received, stream.hexdigest()):
            raise TrainingStopped(f"vLLM in this process {why}: it is not sampled from")

    def _load_adapter(self, policy: CausalLM, version: str, supported: list[str]) -> None:
        weights = dict(adapter_weights(policy, self._dtype))
        check_targets(weights, supported)
        with folder_in_memory(sum(value.nbytes for value in weights.values())) as folder:
            sent = write_adapter(weights, folder / version)
            self._llm.llm_engine.add_lora(_request(folder / version, load_inplace=True))
        (held,) = self._llm.collective_rpc("scsdpo_held", args=(_ADAPTER,))
        if held != sent:
            raise TrainingStopped(
                f"vLLM in this process holds another adapter ({held}) than was sent ({sent}): it "
                "is not sampled from"
            )


def _request(path: Path, load_inplace: bool = False) -> Any:
    """The adapter, with a path that is read when it is loaded and only then."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(_ADAPTER, 1, str(path), load_inplace=load_inplace)
