"""Prints a run's progress while it trains: time left, speed, figures, responses."""

import math
import time
from datetime import timedelta
from typing import Any

import lightning as L
from jsonargparse.typing import NonNegativeInt
from rich.text import Text

from scsdpo.advantage import Batch
from scsdpo.callbacks.rollouts import RolloutCallback
from scsdpo.io.text import in_one_line
from scsdpo.metrics import MODEL_PHASES
from scsdpo.records import TextLog, recorded

FIRST = (
    ("pass_rate", "pass rate"),
    ("reward", "reward"),
    ("truncated", "truncated"),
    ("verifier_errors", "verifier errors"),
    ("response_length", "length"),
    ("gradient_norm", "gradient"),
    ("entropy", "entropy"),
    ("divergence", "divergence"),
    ("logprob_gap", "gap"),
)
"""(figure, short name), in the order of the line."""
_SHOWN = 600
"""Characters of a text on the console, at most; loggers get the whole text."""


class Progress(RolloutCallback):
    """Print a line of figures, and a few responses with their verdicts, every so many batches.

    Figures are means since the last line. Responses are those of the question of rank 0's share
    whose pass rate is nearest to 1/2 (the first of equal ones), a wrong and a right one in turn.
    TensorBoard and W&B get them too, and keep all of them. On the console control characters are
    escaped, so that nothing in a response acts on the terminal.

    Args:
        every: a line is printed every so many batches, beginning with the first; 0: never.
        responses: number of responses that are shown at a time; 0: none.
        responses_every: responses are shown every so many batches, beginning with the first; 0:
            never.

    Raises:
        ValueError: if an argument is negative.
    """

    def __init__(
        self,
        every: NonNegativeInt = 10,
        responses: NonNegativeInt = 2,
        responses_every: NonNegativeInt = 50,
    ) -> None:
        given = {"every": every, "responses": responses, "responses_every": responses_every}
        for name, value in given.items():
            if value < 0:
                raise ValueError(f"`Progress({name}=...)` must be >= 0, got {value}")
        self.every, self.responses, self.responses_every = every, responses, responses_every
        self._text = TextLog()
        self._sums: dict[str, tuple[float, int]] = {}
        self._since, self._began = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sums, self._since = {}, time.monotonic()
        self._began = int(recorded(pl_module).batches)

    def on_batch(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch) -> None:
        now, judged = int(recorded(module).batches), batch.judged
        if not trainer.is_global_zero or not judged.prompts:
            return
        if self.responses and _due(now, self.responses_every):
            q = _most_informative(judged.pass_rates.tolist())
            for g in _wrong_and_right_in_turn(judged.successes[q].tolist())[: self.responses]:
                self._show(trainer, batch, q, g, now)

    def _show(self, trainer: L.Trainer, batch: Batch, q: int, g: int, now: int) -> None:
        judged = batch.judged
        prompt, verdict = judged.prompts[q], judged.verdicts[q][g]
        right = bool(judged.successes[q, g])
        rate, weight = float(judged.pass_rates[q]), float(batch.weights[q, g])
        said = f"{'right' if right else 'wrong'}, reward {verdict.reward:g}"
        said += f", pass rate {rate:.2f}, weight {weight:.2f}"
        said += "" if judged.ended[q, g] else ", cut off"
        said += f": {verdict.error or verdict.feedback}" if not right else ""
        text = judged.texts[q][g]
        row = [
            ("question", prompt.messages[-1]["content"]),
            ("response", text),
            ("verdict", said),
            ("gold answer", prompt.answer),
        ]
        shown = "\n".join(f"  {head}: {_short(cell)}" for head, cell in row)
        _print(trainer, f"batch {now}, {in_one_line(prompt.key)}, response {g}\n{shown}")
        self._text.write(trainer, "responses", row, now)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        module, metrics = recorded(pl_module), trainer.callback_metrics
        now = int(module.batches)
        for name in module.recorder.logged:
            value = float(metrics[name]) if name in metrics else math.nan
            if name.startswith("train/") and math.isfinite(value):
                total, count = self._sums.get(name[6:], (0.0, 0))
                self._sums[name[6:]] = total + value, count + 1
        if _due(now, self.every):
            if trainer.is_global_zero:
                _print(trainer, self._line(trainer, now))
            self._sums = {}

    def _line(self, trainer: L.Trainer, now: int) -> str:
        spent, done = time.monotonic() - self._since, now - self._began
        left, place = _batches_left(trainer, now), f"batch {now}"
        if left < math.inf:
            total, rest = now + round(left), timedelta(seconds=round(left * spent / done))
            place += f" of {total}, {rest} left" if total else f", {rest} left"
        figures = [
            f"{short} {total / count:.3g}"
            for name, short in FIRST
            if name in self._sums
            for total, count in [self._sums[name]]
            if name != "verifier_errors" or total
        ]
        speeds = [
            f"{phase} {self._sums[f'tokens/{phase}'][0] / seconds:,.0f}"
            for phase in MODEL_PHASES
            for seconds, _ in [self._sums.get(f"seconds/{phase}", (0.0, 0))]
            if seconds > 0
        ]
        return " · ".join([place, *figures, "tokens/s: " + ", ".join(speeds)])


def _due(now: int, every: int) -> bool:
    return bool(every) and (now - 1) % every == 0


def _most_informative(pass_rates: list[float]) -> int:
    """The question with the largest p (1 - p), the first of equal ones."""
    return max(range(len(pass_rates)), key=lambda q: pass_rates[q] * (1 - pass_rates[q]))


def _wrong_and_right_in_turn(successes: list[bool]) -> list[int]:
    """Numbers of the responses, wrong and right ones in turn."""
    turns = {False: 0, True: 0}
    order = []
    for g, right in enumerate(successes):
        order.append((turns[right], right, g))
        turns[right] += 1
    return [g for *_, g in sorted(order)]


def _batches_left(trainer: L.Trainer, now: int) -> float:
    """Batches until the run's limit on epochs or steps; inf: it has none.

    It is assumed that a step takes as many batches as steps did until now.
    """
    left = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = trainer.max_epochs * trainer.num_training_batches - now
    if trainer.max_steps >= 0 and trainer.global_step:
        left = min(left, (trainer.max_steps - trainer.global_step) * now / trainer.global_step)
    return max(left, 0.0)


def _short(text: str) -> str:
    text = in_one_line(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _print(trainer: L.Trainer, text: str) -> None:
    """Print above the progress bar, if there is one."""
    bar = trainer.progress_bar_callback
    # As `Text`, since rich's bar reads a string as markup.
    (bar.print if bar is not None else print)(Text(text))
