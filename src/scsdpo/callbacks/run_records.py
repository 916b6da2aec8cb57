"""Writes a run's responses, verdicts and token traces to files."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from scsdpo.advantage import Batch
from scsdpo.callbacks.rollouts import RolloutCallback
from scsdpo.distributed import all_gather
from scsdpo.policy import CausalLM
from scsdpo.policy.chat import Chat
from scsdpo.records import BatchFiles, Outage, TokenTrace, recorded, run_folder
from scsdpo.records.lines import rollout_record, token_record
from scsdpo.types import Judged, Prompt, stable_hash

FOLDERS = ("rollouts", "tokens")


@dataclass(order=True)
class _Candidate:
    """A question whose responses may be written."""

    draw: int
    """Random number; questions with the smallest ones are written."""
    rank: int
    question: int
    """Number of the question on that rank."""
    active: list[bool] = field(compare=False)
    successes: list[bool] = field(compare=False)


@dataclass
class _Batch:
    """The present batch, and the part of it that will be written."""

    batch: Batch
    where: dict[str, Any]
    """Run, batch and step, as they stand in each record."""
    chosen: list[_Candidate]
    """The questions that are written, of all ranks."""
    traced: set[tuple[int, int]]
    """(question's draw, number of the response) of the responses whose tokens are traced."""
    trace: TokenTrace | None


class RunRecords(RolloutCallback):
    """Write responses with their verdicts, and tokens with their credit: docs/records.md.

    Args:
        questions: number of questions of each batch and each validation that are written, with all
            their responses; `all`, or 0: none.
        traces: number of the written responses whose tokens are traced.
        trace_every: tokens are traced every so many batches, beginning with the first; 0: never.
        candidates: number of the most likely tokens of student and teacher in a trace.
        max_megabytes: size of the responses, and of the tokens, at most. Beyond it the run's
            batches are thinned out evenly.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        questions: NonNegativeInt | Literal["all"] = 2,
        traces: NonNegativeInt = 4,
        trace_every: NonNegativeInt = 10,
        candidates: PositiveInt = 5,
        max_megabytes: PositiveFloat = 500.0,
    ) -> None:
        for name, value in (("traces", traces), ("trace_every", trace_every)):
            if value < 0:
                raise ValueError(f"`RunRecords({name}=...)` must be >= 0, got {value}")
        for name, least in (("candidates", candidates), ("max_megabytes", max_megabytes)):
            if not least > 0:
                raise ValueError(f"`RunRecords({name}=...)` must be > 0, got {least}")
        if questions != "all" and questions < 0:
            raise ValueError(f"`RunRecords(questions=...)` must be >= 0 or all, got {questions}")
        self.questions = None if questions == "all" else int(questions)
        self.traces, self.trace_every, self.candidates = traces, trace_every, candidates
        self._most_bytes = 1e6 * max_megabytes
        self._files: dict[str, BatchFiles] = {}
        self._outage = Outage("writing the record of responses", OSError)
        self._batch: _Batch | None = None
        self._validated: list[tuple[int, list[dict[str, Any]]]] = []
        self._run = ""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # may be a collective: all ranks must call it
        self._run = "/".join(folder.parts[-2:])
        self._batch, self._validated = None, []
        if not trainer.is_global_zero or self.questions == 0:
            return
        self._files = {name: BatchFiles(folder / name, self._most_bytes) for name in FOLDERS}
        self._outage.attempt(
            partial(self._begin, int(recorded(pl_module).batches), trainer.ckpt_path)
        )

    def _begin(self, batch: int, checkpoint: str | Path | None) -> None:
        for files in self._files.values():
            files.begin(batch, checkpoint)

    def on_rollouts(self, trainer: L.Trainer, module: L.LightningModule, judged: Judged) -> None:
        if trainer.state.fn != "fit" or self.questions == 0 or judged.split == "train":
            return
        if not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf"):
            self._keep_validation(module, judged, self._where(trainer, module))

    def on_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch) -> None:
        """Choose the responses to write and to trace, before the kernel runs on the batch."""
        if self.questions == 0:
            return
        where, judged = self._where(trainer, module), batch.judged
        active = batch.active.view_as(judged.successes).tolist()
        successes = judged.successes.tolist()
        mine = [
            _Candidate(
                draw=stable_hash(where["batch"], prompt.key, *judged.texts[q], *_copy(prompt)),
                rank=module.global_rank,
                question=q,
                active=active[q],
                successes=successes[q],
            )
            for q, prompt in enumerate(judged.prompts)
        ]
        chosen = sorted(all_gather(mine))[: self.questions]
        due = self.trace_every and (where["batch"] - 1) % self.trace_every == 0
        traced = _traced(chosen, self.traces if due else 0)
        samples = judged.successes.shape[1]
        rows = [
            group.question * samples + g
            for group in chosen
            if group.rank == module.global_rank
            for draw, g in traced
            if draw == group.draw
        ]
        trace = None
        if rows:
            taught, length = batch.plan.needs_teacher.flatten(), batch.ids.shape[-1]
            trace = TokenTrace(rows, taught, length=length, candidates=self.candidates)
            recorded(module).recorder.watch(trace)
        self._batch = _Batch(batch, where, chosen, set(traced), trace)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now, self._batch = self._batch, None
        if now is None or not now.chosen:
            return
        lines: list[tuple[int, int, Any, Any]] = []
        for group in now.chosen:
            if group.rank == pl_module.global_rank:
                lines += self._lines(now, group, _chat(pl_module))
        everyone = sorted(all_gather(lines), key=lambda line: line[:2])
        if trainer.is_global_zero:
            rollouts = [record for _, _, record, _ in everyone]
            tokens = [record for *_, record in everyone if record is not None]
            self._write("rollouts", "train", now.where["batch"], rollouts)
            self._write("tokens", "train", now.where["batch"], tokens)

    def _lines(self, now: _Batch, group: _Candidate, chat: Chat) -> list[tuple[int, int, Any, Any]]:
        """(draw, number, record, record of its tokens or None) of each response of a question."""
        lines, q, samples = [], group.question, len(group.active)
        for g in range(samples):
            made: dict[str, Any] = {"where": now.where, "chat": chat}
            traced, tokens = (group.draw, g) in now.traced, None
            if traced:
                assert now.trace is not None
                sampled = now.batch.judged.responses.sampled[q, g]
                columns = now.trace.columns(q * samples + g, sampled)
                tokens = token_record(now.batch, q, g, columns=columns, **made)
            record = rollout_record(now.batch.judged, q, g, batch=now.batch, traced=traced, **made)
            lines.append((group.draw, g, record, tokens))
        return lines

    def _where(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        return {
            "run": self._run,
            "batch": int(recorded(module).batches),
            "step": trainer.global_step,
        }

    def _keep_validation(
        self, module: L.LightningModule, judged: Judged, where: dict[str, Any]
    ) -> None:
        """Keep the questions with the smallest draws, which are the same at every validation."""
        made: dict[str, Any] = {"where": where, "chat": _chat(module), "traced": False}
        for q, prompt in enumerate(judged.prompts):
            draw = stable_hash("validation", prompt.key, *_copy(prompt))
            kept = self._validated[: self.questions]
            if self.questions is None or len(kept) < self.questions or draw < kept[-1][0]:
                samples = range(judged.successes.shape[1])
                records: list[Any] = [rollout_record(judged, q, g, **made) for g in samples]
                self._validated = sorted([*kept, (draw, records)], key=lambda each: each[0])
        self._validated = self._validated[: self.questions]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the validation. At the epoch's end a rank might still drop it."""
        kept, self._validated = self._validated, []
        if trainer.state.fn != "fit" or self.questions == 0:
            return
        everyone = sorted(all_gather(kept), key=lambda each: each[0])[: self.questions]
        if trainer.is_global_zero and everyone:
            records = [record for _, group in everyone for record in group]
            self._write("rollouts", "val", records[0]["batch"], records)

    def _write(self, name: str, split: str, batch: int, records: list[dict[str, Any]]) -> None:
        if records:
            self._outage.attempt(partial(self._files[name].write, split, batch, records))


def _traced(groups: list[_Candidate], count: int) -> list[tuple[int, int]]:
    """(draw, number) of the `count` responses with credit that are traced.

    Of each question, one failure and one success come before a second one of either.
    """
    ranked = []
    for place, group in enumerate(groups):
        for success in (False, True):
            fitting = [
                g
                for g, (active, right) in enumerate(zip(group.active, group.successes, strict=True))
                if active and right == success
            ]
            ranked += [(turn, place, success, group.draw, g) for turn, g in enumerate(fitting)]
    return [(draw, g) for *_, draw, g in sorted(ranked)[:count]]


def _copy(prompt: Prompt) -> tuple[int, ...]:
    """Distinguishes copies of a question; empty for the first one, as if it were the only one."""
    return (prompt.copy,) if prompt.copy else ()


def _chat(module: L.LightningModule) -> Chat:
    policy = module.policy
    assert isinstance(policy, CausalLM)
    return policy.chat
