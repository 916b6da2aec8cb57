"""Responses as tensors and primitives, as a checkpoint holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from scsdpo.types import Episode, Moment, Part, Prompt, Responses, Verdict


def plain(responses: Responses) -> dict[str, Any]:
    """All but the questions, whose verifiers are no plain values."""
    names = [f.name for f in fields(responses) if f.name != "prompts"]
    told = {name: getattr(responses, name) for name in names}
    told["episodes"] = [[asdict(each) for each in group] for group in responses.episodes]
    return told | {"drawn_at": [list(at) for at in responses.drawn_at]}


def restored(told: Mapping[str, Any], prompts: tuple[Prompt, ...]) -> Responses:
    """What `plain` was given, with its questions.

    Args:
        told: by `plain`, also that of an earlier version.
        prompts: the questions, as they were asked.
    """
    if "mask" in told:  # a checkpoint of 0.1
        old = dict(told)
        old |= {"sampled": old.pop("mask"), "ended": old.pop("finished")}
        return Responses.of_one_turn(prompts=prompts, **old)
    # A checkpoint without episodes is of responses of one turn.
    kept = told.get("episodes") or [[{} for _ in group] for group in told["texts"]]
    episodes = tuple(tuple(_episode(**each) for each in group) for group in kept)
    drawn_at = tuple(Moment(*at) for at in told.get("drawn_at", ()))
    given = {**told, "prompts": prompts, "episodes": episodes, "drawn_at": drawn_at}
    return Responses(**given)


def _episode(parts: Sequence[Mapping[str, Any]] = (), verdict: Any = None) -> Episode:
    return Episode(
        parts=tuple(Part(**part) for part in parts), verdict=verdict and Verdict(**verdict)
    )
