"""Private names of vLLM, an optional dependency; only the functions import it."""

from typing import Any

CHECKED = ">=0.32,<0.33"


def adapter_manager(model_runner: Any) -> Any:
    """The object with the tensors of a worker's adapters; `lora_manager` lists only their names."""
    return model_runner.lora_manager._adapter_manager


def number_group(name: str, number: int) -> None:
    """Set the number of the next process group of this name; vLLM counts from 0 in each process."""
    from vllm.distributed import parallel_state

    parallel_state._group_name_counter[name] = number


def drop_world() -> None:
    """Destroy vLLM's group of all ranks but not torch's, which the public function destroys too."""
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
