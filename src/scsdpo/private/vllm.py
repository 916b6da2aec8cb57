"""Private names of vLLM, an extra: nothing of it is imported before a function is called."""

from typing import Any

CHECKED = ">=0.32,<0.33"


def adapter_manager(model_runner: Any) -> Any:
    """What holds the tensors of a worker's adapters; `lora_manager` shows their names only."""
    return model_runner.lora_manager._adapter_manager


def number_group(name: str, number: int) -> None:
    """Number the next process group of this name; vLLM counts from 0 in each process."""
    from vllm.distributed import parallel_state

    parallel_state._group_name_counter[name] = number


def drop_world() -> None:
    """Forget vLLM's group of all ranks and spare torch's, which the public function destroys."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
