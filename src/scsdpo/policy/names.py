"""Names of parameters, with and without an adapter."""

import re

_FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")


def is_factor(name: str) -> bool:
    """True if the parameter belongs to an adapter and not to the base model."""
    return bool(_FACTOR.search(name))


def plain_name(name: str) -> str:
    """Name that a parameter of the base has in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
