"""Whether the tensors of a checkpoint have a place in the module."""

from collections.abc import Mapping

from torch import Tensor

from scsdpo.checkpoints.saying import say
from scsdpo.errors import ConfigurationError

_SLOTS = {"teacher", "reference"}
"""Under LoRA also names of adapters inside the policy."""


def fit_weights(
    saved: dict[str, Tensor], own: Mapping[str, Tensor], *, policy_only: bool = False
) -> None:
    """Compare names and shapes.

    Args:
        saved: of the checkpoint; what has no place and need not have one is removed.
        own: the module's.
        policy_only: teachers and what strategies keep may be others; those that are not in the
            checkpoint stay as they were made.

    Raises:
        ConfigurationError: if the module is of another configuration.
    """
    missing = {key for key in own if key not in saved}
    odd = {key for key, value in saved.items() if key not in own or own[key].shape != value.shape}
    if policy_only:
        for key in [key for key in odd if not _is_policys(key)]:
            del saved[key]
        teachers = {part for key in missing for part in key.split(".")[:-1] if part in _SLOTS}
        for slot in sorted(teachers):
            say(
                f"model.{slot} is not in the checkpoint: it starts from the weights of "
                "model.policy.name_or_path"
            )
        missing, odd = ({key for key in keys if _is_policys(key)} for keys in (missing, odd))
    if missing or odd:
        raise ConfigurationError(
            f"the checkpoint does not fit this configuration: {len(odd)} of its tensors have no "
            f"place here and {len(missing)} are missing from it, e.g. {min(missing | odd)!r}; use "
            "the run's own config.yaml"
        )


def _is_policys(key: str) -> bool:
    first, *rest = key.split(".")
    return first == "policy" and not _SLOTS & set(rest)
