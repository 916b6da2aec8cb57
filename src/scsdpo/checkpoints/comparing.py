"""Changes of a configuration since a checkpoint was written, and whether they are allowed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_SHOWN = 60
"""Number of characters of a value that a message shows."""


class Rule(Enum):
    """The consequence of a change."""

    EFFECT = "takes effect"
    WARN = "results before and after this change are not comparable"
    REFUSE = "cannot change"


_RULES = {
    "model": Rule.WARN,
    "model.policy": Rule.REFUSE,
    "model.policy.attn_implementation": Rule.EFFECT,
    "model.policy.gradient_checkpointing": Rule.EFFECT,
    "model.policy.compile_layers": Rule.EFFECT,
    "model.policy.dtype": Rule.WARN,
    "model.policy.chat_template_kwargs": Rule.WARN,
    "model.policy.adapter.lora_dropout": Rule.WARN,
    "model.optimizer": Rule.EFFECT,
    "model.lr_scheduler": Rule.EFFECT,
    "model.rollout": Rule.EFFECT,
    "model.verification": Rule.EFFECT,
    "model.val_sampling": Rule.EFFECT,
    "model.limits": Rule.EFFECT,
    "model.gap": Rule.EFFECT,
    "data": Rule.WARN,
    "data.val": Rule.EFFECT,
    "data.val_questions_per_batch": Rule.EFFECT,
    "data.num_workers": Rule.EFFECT,
    "seed_everything": Rule.WARN,
    "trainer": Rule.EFFECT,
    "trainer.precision": Rule.WARN,
    "checkpoint": Rule.EFFECT,
    "records": Rule.EFFECT,
    "health": Rule.EFFECT,
    "progress": Rule.EFFECT,
}
"""Rules by the longest prefix of a key. Keys without a rule do not affect a run."""

_MEMORY = ("advantage", "weighting", "token_weighting", "selection", "teacher", "reference")
"""Strategies under `model` that may have a state."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key, with its value in the checkpoint and its present value."""

    key: str
    before: Any
    now: Any

    @property
    def rule(self) -> Rule | None:
        """The rule that applies; None: the key does not affect a run."""
        if self.key == "model.optimizer":  # another class, whose state has another form
            return Rule.REFUSE
        parts = self.key.split(".")
        starts = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((_RULES[start] for start in starts if start in _RULES), None)

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
    return [change for change in found if change.rule is not None]


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
