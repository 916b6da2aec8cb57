"""What is seen of a run while it trains: time left, speed, first figures, responses."""

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
"""Figures in the order in which they are looked at, and their short names."""
PHASES = ("rollout", "teacher", "student")
_SHOWN = 600
"""Characters of a text on the console; loggers get all of it."""


class Progress(RolloutCallback):
    """A line of figures, and a few responses with their verdicts, every so many batches.

    Figures are means since the last line. Responses are those of a question that teaches, of rank
    0's share: the pass rate nearest to 1/2, of several the first; a wrong and a right one in turn.
    TensorBoard and W&B get them too, and keep them all. On the console what a text holds beside
    letters is spelled out, so that nothing in a response acts on the terminal.

    Args:
        every: batches from one line to the next, beginning with the first; 0: none.
        responses: shown at a time; 0: none.
        responses_every: batches from one showing to the next, beginning with the first; 0: never.

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
            q = _informative(judged.pass_rates.tolist())
            for g in _telling(judged.successes[q].tolist())[: self.responses]:
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
        left, total = _left(trainer, now), _total(trainer, now)
        place = f"batch {now}" + (f" of {total}" if total else "")
        if left < math.inf:
            rest = timedelta(seconds=round(left * spent / done))
            place += f", {rest} left"
        figures = [
            f"{short} {total / count:.3g}"
            for name, short in FIRST
            if name in self._sums
            for total, count in [self._sums[name]]
            if name != "verifier_errors" or total
        ]
        speeds = [
            f"{phase} {self._sums[f'tokens/{phase}'][0] / seconds:,.0f}"
            for phase in PHASES
            for seconds, _ in [self._sums.get(f"seconds/{phase}", (0.0, 0))]
            if seconds > 0
        ]
        return " · ".join([place, *figures, "tokens/s: " + ", ".join(speeds)])


def _due(now: int, every: int) -> bool:
    return bool(every) and (now - 1) % every == 0


def _informative(pass_rates: list[float]) -> int:
    """The question whose responses tell most: p (1 - p) is largest, of several the first."""
    return max(range(len(pass_rates)), key=lambda q: pass_rates[q] * (1 - pass_rates[q]))


def _telling(successes: list[bool]) -> list[int]:
    """Numbers of the responses, wrong and right ones in turn."""
    turns = {False: 0, True: 0}
    order = []
    for g, right in enumerate(successes):
        order.append((turns[right], right, g))
        turns[right] += 1
    return [g for *_, g in sorted(order)]


def _left(trainer: L.Trainer, now: int) -> float:
    """Batches until the run ends, as far as its limits on epochs and steps say; inf: they do not.

    Steps to go take as many batches as those before did.
    """
    left = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = trainer.max_epochs * trainer.num_training_batches - now
    if trainer.max_steps >= 0 and trainer.global_step:
        left = min(left, (trainer.max_steps - trainer.global_step) * now / trainer.global_step)
    return max(left, 0.0)


def _total(trainer: L.Trainer, now: int) -> int:
    """Batches of the whole run; 0: not known."""
    left = _left(trainer, now)
    return now + round(left) if left < math.inf else 0


def _short(text: str) -> str:
    text = in_one_line(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _print(trainer: L.Trainer, text: str) -> None:
    """Above the bar, if there is one."""
    bar = trainer.progress_bar_callback
    # rich's bar reads markup in a string.
    (bar.print if bar is not None else print)(Text(text))
