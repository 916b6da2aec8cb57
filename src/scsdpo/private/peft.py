"""Private names of peft."""

from collections.abc import Sequence

from peft.tuners.lora import LoraLayer

CHECKED = ">=0.21,<0.22"


def use_adapters(layer: LoraLayer, names: Sequence[str], *, disabled: bool = False) -> None:
    """Set the active adapters of a layer, or turn adapters off.

    The public methods also set `requires_grad`, which FSDP2 reads only before the first forward.
    """
    layer._active_adapter, layer._disable_adapters = list(names), disabled
