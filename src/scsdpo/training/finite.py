"""Finds what is not finite: weights of the policy or a teacher, logits, or the gradient."""

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
"""Largest sound weight. Squares of float32 overflow at 2e19, and norms with them."""
_OWNERS = ("policy", "teacher", "reference")


def non_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Say in words which of the model's weights are not finite or above `LARGEST`; '': none.

    Args:
        named: (name, parameter or saved tensor) of a `PolicyOptimizer`.
    """
    kept = [(n, t) for n, t in named if n.split(".")[0] in _OWNERS and t.is_floating_point()]
    parts = [(name, local(tensor.detach())) for name, tensor in kept]
    weights = [(name, tensor) for name, tensor in parts if tensor.numel()]
    if not weights:
        return ""
    device = weights[0][1].device  # other tensors may be on the host
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
    """`non_finite` of a state dict; where its tensors are sharded, all ranks get one answer."""
    fault = non_finite(state.items())
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return fault
    return next(filter(None, all_gather([fault])), "")


def weight_norm(parameters: Sequence[nn.Parameter]) -> float:
    """The norm of all parameters together; inf or nan if an entry is not finite."""
    return float(total_norm(parameters))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors together, over all ranks' shards."""
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def all_zero(tensors: Sequence[Tensor]) -> bool:
    """True if every entry on every rank is exactly 0. A norm of 0 may have underflowed."""
    return not bool(all_max(torch.tensor(float(any(bool(local(t).any()) for t in tensors)))))


def check_sampled(responses: Responses, model: nn.Module) -> None:
    """Stop a run whose policy gives no distribution to draw from.

    Args:
        responses: sampled responses.
        model: holds policy and teachers, whose weights are searched for faults.

    Raises:
        TrainingStopped: if log-probs are not finite. It says whether weights or logits are at
            fault.
    """
    # `policy_logprobs` may be unknown: vLLM gives none where top-k or top-p cuts the distribution.
    if bool(responses.sampling_logprobs.where(responses.sampled, 0.0).isfinite().all()):
        return
    fault = non_finite(model.named_parameters()) or (
        "the policy's logits are not finite, though its weights are: activations overflow"
    )
    raise TrainingStopped(
        f"nothing can be sampled: {fault}. Go on from an older checkpoint with a lower learning "
        "rate, or check model.policy"
    )


def not_finite_because(
    outputs: Sequence[LossOutput], figures: dict[str, float], model: nn.Module
) -> tuple[str, bool]:
    """Say in words what made a step's loss or gradient non-finite, and whether it is the weights.

    A collective.

    Args:
        outputs: the kernel's outputs of this rank's micro-batches.
        figures: loss and gradient norm.
        model: holds policy and teachers.
    """
    if fault := non_finite(model.named_parameters()):
        return fault, True
    kinds = {
        "the policy's logits": [output.logprob for output in outputs],
        "the objective, and so the teacher's logits or the advantage's credit": [
            output.objective for output in outputs
        ],
    }
    # Log-probs come first: where they are not finite, the objective is not either.
    bad = torch.tensor(
        [float(any(not bool(t.isfinite().all()) for t in each)) for each in kinds.values()]
    )
    found = [name for name, flag in zip(kinds, all_max(bad).tolist(), strict=True) if flag]
    what = found[0] if found else "the gradient alone (its norm, or a micro-batch's backward)"
    return f"{what}: {figures}", False


def _owner(name: str) -> str:
    """`policy`, `teacher` or `reference`. Under LoRA a teacher's factors lie inside the policy."""
    return next(owner for owner in reversed(_OWNERS) if owner in name.split("."))
