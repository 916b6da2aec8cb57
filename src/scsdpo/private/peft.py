"""Private names of peft."""

from collections.abc import Sequence

from peft.tuners.lora import LoraLayer

CHECKED = ">=0.21,<0.22"


def use_adapters(layer: LoraLayer, names: Sequence[str], *, disabled: bool = False) -> None:
    """Name the adapters of a layer that are in force, or have none in force.

    The public switches also set `requires_grad`, which FSDP2 takes over from the first forward.
    """
    layer._active_adapter, layer._disable_adapters = list(names), disabled
