"""What is not finite, named for what it is: weights of policy or teacher, logits, gradient."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scsdpo.distributed import all_gather, all_max
from scsdpo.errors import TrainingStopped
from scsdpo.loss import LossOutput
from scsdpo.policy.sharding import local
from scsdpo.types import Responses

LARGEST = 1e15
"""Of a weight; float32 squares overflow at 2e19, and norms with them."""
_OWNERS = ("policy", "teacher", "reference")


def non_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """In words, which of the model's weights are no finite numbers below `LARGEST`; '': none.

    Args:
        named: parameters or saved tensors of a `PolicyOptimizer`, by name.
    """
    kept = [(n, t) for n, t in named if n.split(".")[0] in _OWNERS and t.is_floating_point()]
    parts = [(name, local(tensor.detach())) for name, tensor in kept]
    weights = [(name, tensor) for name, tensor in parts if tensor.numel()]
    if not weights:
        return ""
    device = weights[0][1].device  # some may be on the host
    pairs = (torch.stack(tensor.aminmax()).double() for _, tensor in weights)
    extremes = torch.stack([pair.to(device) for pair in pairs])
    sound = (extremes.abs() < LARGEST).all(-1).tolist()
    bad = [name for (name, _), good in zip(weights, sound, strict=True) if not good]
    if not bad:
        return ""
    return (
        f"the {_owner(bad[0])}'s weights are not finite: {len(bad)} of {len(weights)} tensors, "
        f"e.g. {bad[0]}"
    )


def non_finite_anywhere(state: Mapping[str, Tensor]) -> str:
    """`non_finite` of a state to be saved; where it is in shards all ranks hear the same."""
    fault = non_finite(state.items())
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return fault
    return next(filter(None, all_gather([fault])), "")


def weight_norm(parameters: Sequence[nn.Parameter]) -> float:
    """The norm of all of them together; inf or nan where an entry is not finite."""
    return float(total_norm(parameters))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them together, all ranks' shards included."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_zero(tensors: Sequence[Tensor]) -> bool:
    """Whether every entry on every rank is exactly 0; a norm of 0 may be one that underflowed."""
    return not bool(all_max(torch.tensor(float(any(bool(local(t).any()) for t in tensors)))))


def check_sampled(responses: Responses, model: nn.Module) -> None:
    """Stop a run whose policy gave no distribution to draw from.

    Args:
        responses: what was sampled.
        model: has the policy and its teachers; looked at only then.

    Raises:
        TrainingStopped: saying whether the weights or the logits are at fault.
    """
    # The policy's own log-probs may be unknown: vLLM gives none of a cut distribution.
    if bool(responses.sampling_logprobs.where(responses.sampled, 0.0).isfinite().all()):
        return
    fault = non_finite(model.named_parameters()) or (
        "the policy's logits are not finite, though its weights are: they overflow on the way"
    )
    raise TrainingStopped(
        f"nothing can be sampled: {fault}. Go on from an older checkpoint with a lower learning "
        "rate, or check model.policy"
    )


def not_finite_because(
    outputs: Sequence[LossOutput], figures: dict[str, float], model: nn.Module
) -> tuple[str, bool]:
    """In words, what made a step's loss or gradient non-finite; and whether it is weights.

    Args:
        outputs: of this rank's micro-batches; all ranks ask together.
        figures: loss and gradient norm.
        model: has the policy and its teachers.
    """
    if fault := non_finite(model.named_parameters()):
        return fault, True
    kinds = {
        "the policy's logits": [output.logprob for output in outputs],
        "the objective, and so the teacher's logits or the advantage's credit": [
            output.objective for output in outputs
        ],
    }
    # Log-probs first: where they are not finite, neither is what is made of them.
    bad = torch.tensor(
        [float(any(not bool(t.isfinite().all()) for t in each)) for each in kinds.values()]
    )
    found = [name for name, flag in zip(kinds, all_max(bad).tolist(), strict=True) if flag]
    what = found[0] if found else "the gradient alone (its norm, or a micro-batch's backward)"
    return f"{what}: {figures}", False


def _owner(name: str) -> str:
    """policy, teacher or reference; under LoRA their factors lie inside the policy."""
    return next(owner for owner in reversed(_OWNERS) if owner in name.split("."))
