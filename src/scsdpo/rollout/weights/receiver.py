"""A mixin of vLLM's worker class, which takes the policy's weights.

vLLM finds it by name (`--worker-extension-cls scsdpo.rollout.WeightReceiver`) and calls its methods
on every worker (`collective_rpc`). Nothing of vLLM is imported until one is called.
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
"""Seconds without a byte after which a download of weights is given up."""

Take = Callable[[Iterable[tuple[str, Tensor]]], Any]
"""Takes some of the (name, value) pairs of a load."""


class WeightReceiver:
    """Methods of each vLLM worker; `self` is the worker."""

    if TYPE_CHECKING:
        vllm_config: Any
        model_runner: Any
        weight_transfer_engine: Any

    _scsdpo_loaded = ""
    """`StreamHash` of the weights of the last whole load."""
    _scsdpo_adapter = ""
    """Name of the adapter beside them."""
    _scsdpo_folder = ""
    """Where its files were fetched to, until they are read."""

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
        """The adapters that it has room for; None if it takes none.

        `rank`: the largest; `modules`: last parts of names of what can be adapted; `updates`:
        whether a server that this worker is of has the endpoint for them.
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
        """Put the files of an adapter where this machine's workers can read them; says where.

        Args:
            locations: paths, which are read where they are, or URLs.
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
            Path(file.name).replace(file_place)  # whole at once: other workers may read it
        return str(folder)

    def _scsdpo_tidy(self) -> None:
        """Remove the files of an adapter that were fetched."""
        if self._scsdpo_folder:
            shutil.rmtree(self._scsdpo_folder, ignore_errors=True)
            self._scsdpo_folder = ""

    def scsdpo_held(self, name: str) -> Receipt:
        """Receipt of the adapter that was loaded last; its hash is '' if it is not in force.

        Args:
            name: what it is called from now on.
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
        """Load safetensors files, by path or URL.

        Args:
            locations: files that hold, together, every weight by its checkpoint's name.
        """
        return self.scsdpo_load(pair for location in locations for pair in _read(location))

    def scsdpo_receive(self, update_info: dict[str, Any], timeout: float) -> Receipt:
        """Load what the trainer sends by vLLM's weight transfer engine.

        Args:
            update_info: vLLM's: names, dtypes and shapes.
            timeout: seconds after which the group is left: a worker that waits for a trainer that
                is gone would be deaf for ever.
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
        """Load (name, value) pairs in the checkpoint's names."""
        return self._reload(lambda take: take(weights))

    def _reload(self, load: Callable[[Take], None]) -> Receipt:
        """`load` gives its pairs to the function that it gets, at once or in parts."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        # It warns at each reload of what has no weights (rotary positions) or shares them (the
        # tied head, below).
        noisy = "vllm.model_executor.model_loader.reload.layerwise"
        logging.getLogger(noisy).setLevel(logging.ERROR)
        self._scsdpo_loaded = self._scsdpo_adapter = ""
        stream, model = StreamHash(), self.model_runner.get_model()
        shared = _shared(model)
        # What the worker's reload_weights does, which does not tell what was loaded.
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            try:
                load(lambda pairs: model.load_weights(stream.over(pairs)))
                missing = [name for name in _unfilled(model) if name not in shared]
            finally:  # or the next load would count this one's parts as its own
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            self.model_runner.reset_lora_state()
        _repack_heads(model)
        if not missing:
            self._scsdpo_loaded = stream.hexdigest()
        return {"hash": stream.hexdigest(), "missing": missing}


def _shared(model: nn.Module) -> set[str]:
    """Modules whose parameters are all another's: tied heads."""
    owners: dict[int, str] = {}
    found = set()
    for name, module in model.named_modules():
        own = [owners.setdefault(id(p), name) for p in module.parameters(recurse=False)]
        if own and name not in own:
            found.add(name)
    return found


def _unfilled(model: nn.Module) -> Iterator[str]:
    """Modules that have not got every element of their parameters, before the load is finalized.

    vLLM counts elements as they come and puts a module in place with its last one; fused
    parameters (q, k and v in one) are full only with all of their parts.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if not info.can_load():
            continue  # in place
        wanted = sum(
            get_tensor_load_numel(parameter)
            for leaf, parameter in module.named_parameters(recurse=False)
            if leaf not in SKIP_LOAD_TENSORS
        )
        if isinstance(module, VocabParallelEmbedding):  # its rows are padded
            places = module.shard_indices
            rows = places.org_vocab_end_index - places.org_vocab_start_index
            wanted = wanted // module.num_embeddings_per_partition * rows
        if info.load_numel < wanted:
            yield name


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
