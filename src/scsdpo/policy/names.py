"""Names of parameters, with and without an adapter."""

import re

_FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")


def is_factor(name: str) -> bool:
    """Whether the parameter of that name is an adapter's, and not the base's."""
    return bool(_FACTOR.search(name))


def plain_name(name: str) -> str:
    """Name of a base's parameter in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
