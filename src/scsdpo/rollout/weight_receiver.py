"""What a vLLM worker needs to take the policy's weights: a mixin of its class.

vLLM finds it by name (`--worker-extension-cls scsdpo.rollout.WeightReceiver`) and calls its methods
on every worker (`collective_rpc`). Nothing of vLLM is imported until one is called.
"""

import logging
import shutil
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

TIMEOUT = 60.0
"""Seconds without a byte after which a download of weights is given up."""


class WeightReceiver:
    """Methods of each vLLM worker; `self` is the worker."""

    if TYPE_CHECKING:
        vllm_config: Any
        model_runner: Any

        def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
            """The worker's own."""

    def scsdpo_describe(self) -> dict[str, Any]:
        """What of the engine's settings decides whether its rollouts can be trained on."""
        model = self.vllm_config.model_config
        return {
            "logprobs_mode": model.logprobs_mode,
            "quantization": model.quantization,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
        }

    def scsdpo_fetch(self, locations: Sequence[str]) -> dict[str, int]:
        """Load safetensors files, by path or URL; says how many tensors came.

        Args:
            locations: files that hold, together, every weight by its checkpoint's name.
        """
        count = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal count
            for location in locations:
                for pair in _read(location):
                    count += 1
                    yield pair

        self.scsdpo_load(counted())
        return {"tensors": count}

    def scsdpo_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load (name, value) pairs in the checkpoint's names."""
        # It warns at each reload of what has no weights (rotary positions) or shares them (the
        # tied head, next line).
        noisy = "vllm.model_executor.model_loader.reload.layerwise"
        logging.getLogger(noisy).setLevel(logging.ERROR)
        self.reload_weights(weights_iterator=weights)
        _repack_heads(self.model_runner.get_model())


def _repack_heads(model: nn.Module) -> None:
    """Let heads follow their weight: the CPU build multiplies with a packed copy of it.

    Reloading makes that copy anew for layers that got a weight, and a tied head gets none: its
    weight is the embedding's. Without this its logits stay those of the first weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _read(location: str) -> Iterator[tuple[str, Tensor]]:
    if not location.startswith("http"):
        yield from _read_file(location)
        return
    with tempfile.TemporaryDirectory(prefix="scsdpo-") as folder:
        path = Path(folder, "weights.safetensors")
        with urllib.request.urlopen(location, timeout=TIMEOUT) as body, path.open("wb") as file:
            shutil.copyfileobj(body, file, 2**20)
        yield from _read_file(str(path))


def _read_file(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield name, file.get_tensor(name)
