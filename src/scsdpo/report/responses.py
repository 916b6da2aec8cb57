"""Responses and tokens for the page, of as many batches as fit."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scsdpo.io.files import whole_lines
from scsdpo.report.pack import pack
from scsdpo.report.reading import Run, spread_out

SCHEMA = 2
"""Schema version of the records; importing `scsdpo.records` would load torch."""
SUCCESS, ERROR, LENGTH, TRACED, ACTIVE = 1, 2, 4, 8, 16
"""Bits of a response in the index, by which the page filters."""

Kind = Literal["rollouts", "tokens"]
DIGITS: dict[Kind, int] = {"rollouts": 6, "tokens": 4}
"""Digits of numbers in the page."""
TOKENS_SHARE = 0.6


@dataclass(kw_only=True)
class Embedded:
    """The records that are embedded in the page.

    A chunk is a file of `rollouts/` or `tokens/`, packed, by "KIND-RUN-SPLIT-BATCH". The index has
    for each run and split its batches in order, and of each the questions with their responses'
    bits, so that the page filters without reading a chunk.
    """

    chunks: dict[str, str] = field(default_factory=dict)
    index: list[dict[str, list[dict[str, Any]]]] = field(default_factory=list)
    found: int = 0
    """Number of files found."""
    responses: int = 0
    traces: int = 0

    @property
    def room(self) -> str:
        """A sentence if not all files fit; else empty."""
        if len(self.chunks) == self.found:
            return ""
        return f"{len(self.chunks):,} of {self.found:,} files of records, spread over the run"


@dataclass(frozen=True, kw_only=True)
class _File:
    run: int
    kind: Kind
    split: str
    batch: int
    path: Path

    @property
    def chunk(self) -> str:
        return f"{self.kind}-{self.run}-{self.split}-{self.batch}"


def embed(runs: Sequence[Run], most_bytes: int) -> Embedded:
    """Choose files until the page is full: of every run the last batch, the first, then others.

    Batches with traced tokens come before those with responses only; tokens take at most
    `TOKENS_SHARE` of the room.
    """
    embedded = Embedded(index=[{"train": [], "val": []} for _ in runs])
    files = [file for i, run in enumerate(runs) for file in _files(i, run.folder)]
    embedded.found = len(files)
    room, for_tokens = float(most_bytes), TOKENS_SHARE * most_bytes
    full: set[Kind] = set()
    for file in _by_worth(files):
        if file.kind in full:
            continue
        found = whole_lines(file.path, "schema_version", "key", "sample")
        lines = [_current(line) for line in found if line["schema_version"] in (1, SCHEMA)]
        if not lines:
            continue
        content = _questions(lines) if file.kind == "rollouts" else [_trace(x) for x in lines]
        packed = pack(content, DIGITS[file.kind])
        if len(packed) > (min(room, for_tokens) if file.kind == "tokens" else room):
            full.add(file.kind)
            continue
        room -= len(packed)
        embedded.chunks[file.chunk] = packed
        if file.kind == "tokens":
            for_tokens -= len(packed)
            embedded.traces += len(lines)
            continue
        embedded.responses += len(lines)
        entry = {"batch": file.batch, "questions": [_entry(question) for question in content]}
        embedded.index[file.run][file.split].append(entry)
    for splits in embedded.index:
        for batches in splits.values():
            batches.sort(key=lambda entry: entry["batch"])
    return embedded


def _files(run: int, folder: Path) -> Iterator[_File]:
    kinds: tuple[Kind, ...] = ("rollouts", "tokens")
    for kind in kinds:
        for path in sorted((folder / kind).glob("*.jsonl")):
            if name := re.fullmatch(r"(train|val)_(\d+)", path.stem):
                yield _File(run=run, kind=kind, split=name[1], batch=int(name[2]), path=path)


def _by_worth(files: Sequence[_File]) -> list[_File]:
    """Files in an order whose every prefix spans the run; responses and tokens stay together."""
    traced = {(f.run, f.split, f.batch) for f in files if f.kind == "tokens"}
    ranks: dict[tuple[int, str, int], int] = {}
    for run, split in dict.fromkeys((f.run, f.split) for f in files):
        batches = sorted({f.batch for f in files if (f.run, f.split) == (run, split)})
        first = [b for b in batches if (run, split, b) in traced]
        others = [b for b in batches if (run, split, b) not in traced]
        for rank, batch in enumerate([*spread_out(first), *spread_out(others)]):
            ranks[run, split, batch] = rank
    return sorted(files, key=lambda f: (ranks[f.run, f.split, f.batch], f.run, f.split, f.kind))


def _current(line: dict[str, Any]) -> dict[str, Any]:
    """A line in the words of today's schema; version 1 had other names for three fields."""
    if line["schema_version"] == SCHEMA or "output" not in line:
        return line
    finished = line["finish_reason"] == "stop"
    return line | {"gold": line["target"], "response": line["output"], "finished": finished}


def _questions(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The responses of a batch by question."""
    questions: dict[str, dict[str, Any]] = {}
    shared = ("key", "category", "messages", "gold", "samples", "pass_rate", "step")
    own = (
        "sample", "response", "answer", "reward", "success", "feedback", "error", "finished",
        "n_tokens", "weight", "active", "teacher_prompt", "version", "traced",
    )  # fmt: skip
    for line in lines:
        question = {name: line[name] for name in shared} | {"responses": []}
        question = questions.setdefault(line["key"], question)
        played = {"turns": line.get("turns", []), "stopped": line.get("stopped", "")}  # not in 0.1
        question["responses"].append({name: line[name] for name in own} | played)
    return list(questions.values())


def _entry(question: dict[str, Any]) -> list[Any]:
    bits = [
        SUCCESS * response["success"]
        + ERROR * bool(response["error"])
        + LENGTH * (not response["finished"])
        + TRACED * response["traced"]
        + ACTIVE * response["active"]
        for response in question["responses"]
    ]
    weights = [r["weight"] for r in question["responses"] if r["weight"] is not None]
    weight = max(weights, default=None)
    return [question["key"], question["category"], question["pass_rate"], weight, bits]


def _trace(line: dict[str, Any]) -> dict[str, Any]:
    left_out = ("schema_version", "run", "split", "batch", "step", "top_ids", "vocabulary")
    words = {int(token): text for token, text in line["vocabulary"].items()}
    top = [[words.get(token, "") for token in tokens] for tokens in line["top_ids"]]
    sampled = [
        tokens.index(token) if token in tokens else -1
        for token, tokens in zip(line["ids"], line["top_ids"], strict=True)
    ]
    # Computed before rounding: the difference of nearly equal log-probs would lose its digits.
    pairs = zip(line["teacher_logprob"], line["logprob"], strict=True)
    ratio = [None if t is None or s is None else t - s for t, s in pairs]
    kept = {k: v for k, v in line.items() if k not in left_out}
    return kept | {"top": top, "sampled": sampled, "ratio": ratio}
