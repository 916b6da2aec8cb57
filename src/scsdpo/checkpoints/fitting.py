"""Check that a checkpoint's tensors fit the module."""

from collections.abc import Mapping

from torch import Tensor

from scsdpo.checkpoints.saying import say
from scsdpo.errors import ConfigurationError

_SLOTS = {"teacher", "reference"}
"""Slots of models; under LoRA these are also names of adapters inside the policy."""


def fit_weights(
    saved: dict[str, Tensor], own: Mapping[str, Tensor], *, policy_only: bool = False
) -> None:
    """Compare names and shapes of tensors.

    Args:
        saved: the checkpoint's tensors; those that are not needed are removed from it.
        own: the module's tensors.
        policy_only: teachers and strategy states may differ; those that are not in the checkpoint
            keep their initial values.

    Raises:
        ConfigurationError: if the tensors do not fit the module.
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
            f"the checkpoint does not fit this configuration: {len(odd)} of its tensors are not "
            f"needed and {len(missing)} are missing from it, e.g. {min(missing | odd)!r}; use "
            "the run's own config.yaml"
        )


def _is_policys(key: str) -> bool:
    first, *rest = key.split(".")
    return first == "policy" and not _SLOTS & set(rest)
