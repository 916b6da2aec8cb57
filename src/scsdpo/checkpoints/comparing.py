"""Changes of a configuration since a checkpoint was written, and whether they are allowed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_SHOWN = 60
"""Number of characters of a value that a message shows."""


class Consequence(Enum):
    """The consequence of a change."""

    EFFECT = "takes effect"
    WARN = "results before and after this change are not comparable"
    REFUSE = "cannot change"


_CONSEQUENCES = {
    "model": Consequence.WARN,
    "model.policy": Consequence.REFUSE,
    "model.policy.attn_implementation": Consequence.EFFECT,
    "model.policy.gradient_checkpointing": Consequence.EFFECT,
    "model.policy.compile_layers": Consequence.EFFECT,
    "model.policy.dtype": Consequence.WARN,
    "model.policy.chat_template_kwargs": Consequence.WARN,
    "model.policy.adapter.lora_dropout": Consequence.WARN,
    "model.optimizer": Consequence.EFFECT,
    "model.lr_scheduler": Consequence.EFFECT,
    "model.rollout": Consequence.EFFECT,
    "model.verification": Consequence.EFFECT,
    "model.val_sampling": Consequence.EFFECT,
    "model.limits": Consequence.EFFECT,
    "model.gap": Consequence.EFFECT,
    "data": Consequence.WARN,
    "data.val": Consequence.EFFECT,
    "data.val_questions_per_batch": Consequence.EFFECT,
    "data.num_workers": Consequence.EFFECT,
    "seed_everything": Consequence.WARN,
    "trainer": Consequence.EFFECT,
    "trainer.precision": Consequence.WARN,
    "checkpoint": Consequence.EFFECT,
    "records": Consequence.EFFECT,
    "health": Consequence.EFFECT,
    "progress": Consequence.EFFECT,
}
"""Consequences by the longest prefix of a key. Keys without one do not affect a run."""

_MEMORY = ("advantage", "weighting", "token_weighting", "selection", "teacher", "reference")
"""Strategies under `model` that may have a state."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key, with its value in the checkpoint and its present value."""

    key: str
    before: Any
    now: Any

    @property
    def consequence(self) -> Consequence | None:
        """The consequence of this change; None: the key does not affect a run."""
        if self.key == "model.optimizer":  # another class, whose state has another form
            return Consequence.REFUSE
        parts = self.key.split(".")
        starts = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((_CONSEQUENCES[start] for start in starts if start in _CONSEQUENCES), None)

    @property
    def of_schedule(self) -> bool:
        """True if learning rates must be computed anew."""
        return self.key.startswith(("model.optimizer.", "model.lr_scheduler"))

    @property
    def of_memory(self) -> bool:
        """True if a class was exchanged, so that saved strategy states may not fit."""
        strategy = self.key.split(".")[1:2]
        return strategy != [] and strategy[0] in _MEMORY and isinstance(self.now, Mapping | list)

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.now)}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The changed keys, in the order of `now`; keys that only one of them has do not count."""
    found = [each for key in now if key in before for each in _compare(key, before[key], now[key])]
    return [change for change in found if change.consequence is not None]


def _compare(key: str, before: Any, now: Any) -> Iterator[Change]:
    if before == now or _is_same_folder(before, now):
        return
    nested = isinstance(before, Mapping) and isinstance(now, Mapping)
    if not nested or before.get("class_path") != now.get("class_path"):
        yield Change(key=key, before=before, now=now)
    else:
        inside = "init_args" if "class_path" in now else None
        old, new = (each.get(inside) or {} if inside else each for each in (before, now))
        for name in new:
            if name in old:
                yield from _compare(f"{key}.{name}", old[name], new[name])


def _is_same_folder(before: Any, now: Any) -> bool:
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    return Path(now).is_dir() and Path(before).is_dir() and Path(now).samefile(before)


def _shown(value: Any) -> str:
    """A value for a message; an object is shown by its class's name."""
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, list):
        value = f"[{', '.join(map(_shown, value))}]"
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
