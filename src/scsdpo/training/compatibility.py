"""Which strategies cannot work together, and what to do about it."""

from typing import TYPE_CHECKING

from scsdpo.advantage import Advantage
from scsdpo.errors import ConfigurationError
from scsdpo.selection import Selection
from scsdpo.weighting import TokenWeighting, Weighting

if TYPE_CHECKING:
    from scsdpo.training import PolicyOptimizer


def check_axes(module: "PolicyOptimizer", token_weighting: TokenWeighting) -> None:
    """Check the strategies against each other, before any weight is loaded.

    Raises:
        ConfigurationError: naming the keys and the remedy.
    """
    _check_voices(module, token_weighting)
    compared: dict[str, Advantage | Weighting | Selection] = {
        "advantage": module.advantage,
        "weighting": module.weighting,
        "selection": module.selection,
    }
    for key, strategy in compared.items():
        if strategy.needs_group and module.sampling.n == 1:
            raise ConfigurationError(
                f"model.{key}: {type(strategy).__name__} compares the rollouts of a question: "
                "set model.sampling.n above 1"
            )
    bounds = {
        "updates_per_rollout": (module.updates_per_rollout, 1),
        "max_bad_steps": (module.max_bad_steps, 1),
        "max_idle_batches": (module.max_idle_batches, 1),
    }
    for name, (value, least) in bounds.items():
        if value < least:
            raise ConfigurationError(f"model.{name} must be >= {least}, got {value}")
    if not module.max_grad_norm > 0:
        raise ConfigurationError(
            f"model.max_grad_norm must be > 0 (.inf: no clipping), got {module.max_grad_norm}"
        )


def _check_voices(module: "PolicyOptimizer", token_weighting: TokenWeighting) -> None:
    advantage = type(module.advantage).__name__
    entropy = any(name.startswith("teacher") for name in token_weighting.needs)
    if entropy and not module.teacher.exists:
        raise ConfigurationError(
            f"model.token_weighting: {type(token_weighting).__name__} reads the teacher, but "
            "model.teacher is NoTeacher: choose EMA, Frozen, Live or TrustRegion"
        )
    if module.advantage.needs_teacher and not module.teacher.exists:
        raise ConfigurationError(
            f"model.advantage: {advantage} needs a teacher, but model.teacher is NoTeacher: "
            "choose EMA, Frozen, Live or TrustRegion"
        )
    if module.teacher.exists and not (module.advantage.needs_teacher or entropy):
        raise ConfigurationError(
            f"model.teacher: {type(module.teacher).__name__} is never asked, because "
            f"model.advantage is {advantage}: set model.teacher to NoTeacher"
        )
    if module.advantage.needs_reference and not module.reference.exists:
        raise ConfigurationError(
            f"model.advantage: {advantage} needs a reference, but model.reference is NoTeacher: "
            "set it to Frozen with the context PlainPrompt"
        )
    if module.reference.exists and not module.advantage.needs_reference:
        raise ConfigurationError(
            f"model.reference: {type(module.reference).__name__} is never asked, because "
            f"model.advantage is {advantage}: set model.reference to NoTeacher, or Blend the "
            "advantage with a ReferenceAnchor"
        )
