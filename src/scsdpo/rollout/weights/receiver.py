"""A mixin of vLLM's worker class, which receives the policy's weights.

vLLM imports it by name (`--worker-extension-cls scsdpo.rollout.WeightReceiver`) and calls its
methods on every worker (`collective_rpc`). Only its methods import vLLM.
"""

import logging
import shutil
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

from scsdpo.private.vllm import adapter_manager
from scsdpo.rollout.weights.files import adapter_hash, memory_or_disk
from scsdpo.rollout.weights.hashing import Receipt, StreamHash

TIMEOUT = 60.0
"""Seconds without a byte after which a download of weights fails."""

Take = Callable[[Iterable[tuple[str, Tensor]]], Any]
"""Loads some (name, value) pairs into the model."""


class WeightReceiver:
    """Methods for each vLLM worker; `self` is the worker."""

    if TYPE_CHECKING:
        vllm_config: Any
        model_runner: Any
        weight_transfer_engine: Any

    _scsdpo_loaded = ""
    """`StreamHash` of the weights of the last complete load."""
    _scsdpo_adapter = ""
    """Name of the adapter beside them; '': none."""
    _scsdpo_folder = ""
    """Folder with the downloaded files of an adapter, until they are read; '': none."""

    def scsdpo_describe(self) -> dict[str, Any]:
        """Settings of the engine that decide whether its rollouts can be trained on."""
        model = self.vllm_config.model_config
        return {
            "logprobs_mode": model.logprobs_mode,
            "quantization": model.quantization,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "max_num_seqs": self.vllm_config.scheduler_config.max_num_seqs,
            "loaded": self._scsdpo_loaded,
            "adapters": self._scsdpo_adapters(),
            "adapter": self._scsdpo_adapter,
        }

    def _scsdpo_adapters(self) -> dict[str, Any] | None:
        """The adapters that the worker accepts; None if it was started without LoRA.

        `rank` is the largest rank. `modules` are the last parts of the names of modules that can be
        adapted. `updates` is true if its server has the endpoints that load adapters.
        """
        from vllm.envs import VLLM_ALLOW_RUNTIME_LORA_UPDATING

        if self.vllm_config.lora_config is None:
            return None
        manager = adapter_manager(self.model_runner)
        packed = manager.packed_modules_mapping
        return {
            "rank": self.vllm_config.lora_config.max_lora_rank,
            "modules": sorted(
                p for m in manager.supported_lora_modules for p in packed.get(m, [m])
            ),
            "updates": bool(VLLM_ALLOW_RUNTIME_LORA_UPDATING),
        }

    def scsdpo_fetch_adapter(self, locations: Sequence[str], place: str) -> str:
        """Download the files of an adapter if they are URLs; return the folder that holds them.

        Args:
            locations: paths or URLs of the files.
            place: a random name for the folder, the same for all workers of a server.
        """
        self._scsdpo_adapter = ""
        self._scsdpo_tidy()
        if not locations[0].startswith("http"):
            return str(Path(locations[0]).parent)
        folder = memory_or_disk(2**30) / f"scsdpo-adapter-{place}"
        self._scsdpo_folder = str(folder)
        folder.mkdir(exist_ok=True, mode=0o700)
        for location in locations:
            file_place = folder / Path(location).name
            with (
                urllib.request.urlopen(location, timeout=TIMEOUT) as body,
                tempfile.NamedTemporaryFile(dir=folder, delete=False) as file,
            ):
                shutil.copyfileobj(body, file, 2**20)
            Path(file.name).replace(file_place)  # atomic: other workers may read it
        return str(folder)

    def _scsdpo_tidy(self) -> None:
        """Remove the downloaded files of an adapter."""
        if self._scsdpo_folder:
            shutil.rmtree(self._scsdpo_folder, ignore_errors=True)
            self._scsdpo_folder = ""

    def scsdpo_held(self, name: str) -> Receipt:
        """Receipt of the adapter that was loaded last; its hash is '' if it is not active.

        Args:
            name: name to give to the adapter.
        """
        self._scsdpo_adapter = name
        self._scsdpo_tidy()
        manager = adapter_manager(self.model_runner)
        last = max(manager.list_adapters(), default=0)
        if last not in manager.lora_index_to_id:
            return {"hash": "", "missing": []}
        found: dict[str, Tensor] = {}
        for module, lora in manager.get_adapter(last).loras.items():
            # vLLM stacks the factors of what it fuses, such as q, k and v.
            parts = manager.packed_modules.get(module) if lora.is_packed else None
            a, b = (lora.lora_a, lora.lora_b) if parts else ([lora.lora_a], [lora.lora_b])
            for part, own_a, own_b in zip(parts or [module], a, b, strict=True):
                if own_a is not None:
                    found |= {f"{part}.lora_A.weight": own_a, f"{part}.lora_B.weight": own_b}
        return {"hash": adapter_hash(found), "missing": []}

    def scsdpo_fetch(self, locations: Sequence[str]) -> Receipt:
        """Load safetensors files.

        Args:
            locations: paths or URLs of files that together hold every weight, under the
                checkpoint's names.
        """
        return self.scsdpo_load(pair for location in locations for pair in _read(location))

    def scsdpo_receive(self, update_info: dict[str, Any], timeout: float) -> Receipt:
        """Load the weights that the trainer sends by vLLM's weight transfer engine.

        Args:
            update_info: vLLM's description of the weights: names, dtypes and shapes.
            timeout: seconds after which the worker leaves the group. Otherwise it would wait
                forever for a trainer that is gone, and answer no other call.
        """
        engine = self.weight_transfer_engine
        watchdog = threading.Timer(timeout, engine.shutdown)
        watchdog.daemon = True

        def receive(take: Take) -> None:
            into = SimpleNamespace(load_weights=take)
            engine.set_weight_update_target(into, engine.model_config)
            watchdog.start()
            try:
                engine.update_weights(update_info)
            finally:
                watchdog.cancel()
                engine.reset_weight_update_target()

        return self._reload(receive)

    def scsdpo_load(self, weights: Iterable[tuple[str, Tensor]]) -> Receipt:
        """Load (name, value) pairs; names are the checkpoint's."""
        return self._reload(lambda take: take(weights))

    def _reload(self, load: Callable[[Take], None]) -> Receipt:
        """Reload the weights; `load` calls its argument with pairs, once or several times."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        # vLLM warns at each reload of modules without weights (rotary positions) and with shared
        # ones (tied heads, which `_shared` handles).
        noisy = "vllm.model_executor.model_loader.reload.layerwise"
        logging.getLogger(noisy).setLevel(logging.ERROR)
        self._scsdpo_loaded = self._scsdpo_adapter = ""
        stream, model = StreamHash(), self.model_runner.get_model()
        shared = _shared(model)
        # As the worker's own reload_weights, which does not report what it loaded.
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            try:
                load(lambda pairs: model.load_weights(stream.over(pairs)))
                missing = [name for name in _unfilled(model) if name not in shared]
            finally:  # otherwise the next load would count the parts of this one
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            self.model_runner.reset_lora_state()
        _repack_heads(model)
        if not missing:
            self._scsdpo_loaded = stream.hexdigest()
        return {"hash": stream.hexdigest(), "missing": missing}


def _shared(model: nn.Module) -> set[str]:
    """Names of modules that share all their parameters with another: tied heads."""
    owners: dict[int, str] = {}
    found = set()
    for name, module in model.named_modules():
        own = [owners.setdefault(id(p), name) for p in module.parameters(recurse=False)]
        if own and name not in own:
            found.add(name)
    return found


def _unfilled(model: nn.Module) -> Iterator[str]:
    """Names of modules that did not get all elements of their parameters; ask before finalizing.

    vLLM counts elements as they come, and puts a module in place when the last one came. A fused
    parameter (q, k and v in one) is complete only with all of its parts.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if not info.can_load():
            continue  # complete
        wanted = sum(
            get_tensor_load_numel(parameter)
            for leaf, parameter in module.named_parameters(recurse=False)
            if leaf not in SKIP_LOAD_TENSORS
        )
        if isinstance(module, VocabParallelEmbedding):  # padded rows are not loaded
            places = module.shard_indices
            rows = places.org_vocab_end_index - places.org_vocab_start_index
            wanted = wanted // module.num_embeddings_per_partition * rows
        if info.load_numel < wanted:
            yield name


def _repack_heads(model: nn.Module) -> None:
    """Update the packed copies of heads' weights, with which vLLM's CPU build multiplies.

    A reload renews the copies of layers that got a weight. A tied head gets none, because its
    weight is the embedding's; without this its logits would stay those of the first weights.
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
