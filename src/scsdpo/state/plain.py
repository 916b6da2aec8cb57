"""Responses as tensors and primitives, for checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from scsdpo.types import Episode, Moment, Part, Prompt, Responses, Verdict


def plain(responses: Responses) -> dict[str, Any]:
    """All fields but the questions, whose verifiers are no primitives."""
    names = [f.name for f in fields(responses) if f.name != "prompts"]
    values = {name: getattr(responses, name) for name in names}
    values["episodes"] = [[asdict(each) for each in group] for group in responses.episodes]
    return values | {"drawn_at": [list(at) for at in responses.drawn_at]}


def restored(values: Mapping[str, Any], prompts: tuple[Prompt, ...]) -> Responses:
    """The responses of which `plain` made `values`.

    Args:
        values: from `plain`, of this or an earlier version.
        prompts: the questions, as they were asked.
    """
    if "mask" in values:  # a checkpoint of 0.1
        old = dict(values)
        old |= {"sampled": old.pop("mask"), "ended": old.pop("finished")}
        return Responses.of_one_turn(prompts=prompts, **old)
    # A checkpoint without episodes has responses of one turn.
    kept = values.get("episodes") or [[{} for _ in group] for group in values["texts"]]
    episodes = tuple(tuple(_episode(**each) for each in group) for group in kept)
    drawn_at = tuple(Moment(*at) for at in values.get("drawn_at", ()))
    given = {**values, "prompts": prompts, "episodes": episodes, "drawn_at": drawn_at}
    return Responses(**given)


def _episode(parts: Sequence[Mapping[str, Any]] = (), verdict: Any = None) -> Episode:
    return Episode(
        parts=tuple(Part(**part) for part in parts), verdict=verdict and Verdict(**verdict)
    )
