"""Weights from pass rates that were measured once, before training."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM
from scsdpo.policy.names import is_factor, plain_name
from scsdpo.types import Judged
from scsdpo.weighting._base import Weighting

FORMAT = "scsdpo rates 1"
_COMMAND = "`scsdpo rates --out FILE` with this run's --config files"


@dataclass(frozen=True, kw_only=True)
class FrozenPassRate(Weighting):
    """PACED's curriculum. W_j = w_j / mean of w over the file, w_j = p_j^solved (1 - p_j)^failed

    p_j is measured once before training (`scsdpo rates`) and never changes; the mean is over the
    whole training set. Questions with p_j in {0, 1} always weigh 0 (if the exponent is above 0), so
    that a question which is too hard at the start is never trained on.

    The file must be of this policy (its first weights are compared) and of this data (it must have
    each question). Of a large or endless set, the first questions are checked before training and
    the others when they are drawn.

    Args:
        path: file that `scsdpo rates` wrote.
        solved: exponent of p, >= 0.
        failed: exponent of 1 - p, >= 0.

    Raises:
        ValueError: if an exponent is negative, the file is missing or not a file of rates, or all
            its weights are 0.
        ConfigurationError: from `configure`, `check_questions` or `weigh`, if the file is of
            another policy or lacks a question.

    Source:
        PACED, as stated in arXiv:2605.27765: p (1 - p).
    """

    path: str
    solved: float = 1.0
    failed: float = 1.0

    def __post_init__(self) -> None:
        for name in ("solved", "failed"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"`FrozenPassRate({name}=...)` must be >= 0, got {value}")
        if not self._mean > 0:
            raise ValueError(
                f"`FrozenPassRate(path={self.path})`: every weight is 0, so that nothing would be "
                "learned: take easier questions, or exponents of 0"
            )

    @cached_property
    def _file(self) -> dict[str, Any]:
        try:
            content = json.loads(Path(self.path).read_text(encoding="utf-8"))
        except OSError:
            raise ValueError(
                f"`FrozenPassRate(path={self.path})` cannot be read; write it with {_COMMAND}"
            ) from None
        except ValueError:
            content = {}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"`FrozenPassRate(path={self.path})` is not a file of pass rates; write one with "
                f"{_COMMAND}"
            )
        return content

    @cached_property
    def _raw(self) -> dict[str, float]:
        rates = {key: right / of for key, (right, of) in self._file["rates"].items()}
        return {key: p**self.solved * (1 - p) ** self.failed for key, p in rates.items()}

    @cached_property
    def _mean(self) -> float:
        return sum(self._raw.values()) / max(len(self._raw), 1)

    def configure(self, policy: CausalLM) -> None:
        if fingerprint(policy.wrapped) != self._file["fingerprint"]:
            raise ConfigurationError(
                f"`FrozenPassRate(path={self.path})`: its rates were measured with another policy "
                f"({self._file['policy']}) than {policy.name_or_path}; measure them again with "
                f"{_COMMAND}"
            )

    def check_questions(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key not in self._raw:
                raise ConfigurationError(
                    f"`FrozenPassRate(path={self.path})` has no rate of question {key!r}: it was "
                    f"measured on other training questions; measure again with {_COMMAND}"
                )

    def weigh(self, judged: Judged) -> Tensor:
        self.check_questions(judged.keys)
        weights = torch.tensor(
            [self._raw[key] / self._mean for key in judged.keys],
            dtype=torch.float64,
            device=judged.rewards.device,
        )
        return weights[:, None].expand(-1, judged.rewards.shape[1])


def fingerprint(model: nn.Module) -> str:
    """A hash of a model before training: of names, shapes and a few values of its weights.

    Values are rounded to bfloat16, so that the dtype of loading does not matter. LoRA's factors are
    left out.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.named_parameters():
        if not is_factor(name):
            few = value.detach().flatten()[:64].to("cpu", torch.bfloat16).float().tolist()
            plain = plain_name(name).removeprefix("base_model.model.")
            digest.update(f"{plain} {tuple(value.shape)} {few}".encode())
    return digest.hexdigest()
