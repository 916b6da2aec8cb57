"""What becomes of an architecture: how its rows run, or why it is refused."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from table import NAMES, SKIPPED, model_folder
from transformers import logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scsdpo.errors import ConfigurationError
from scsdpo.metrics import GapCheck
from scsdpo.policy import CausalLM
from scsdpo.rollout import HFRollout
from scsdpo.training.self_check import examine, made_up_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


_HEAD = """\
# Models

This page says of every causal language model of transformers whether it can be trained, and how
the rows (sequences) of a step run: the [table](#every-architecture) has all of them by
`model_type`. It also describes the check that each run makes before its first step. Linear
attention and mixtures of experts have [a page of their own](architectures.md).

Common families run the fastest way: Qwen2 to Qwen3.5, Llama, Mistral, Gemma 3, OLMo, SmolLM3,
DeepSeek-V3, gpt-oss. The ways:

* **packed, prompts shared**: sequences lie end to end in one forward, and every common prefix of
  prompts runs once.
* **rows apart, padded**: each response runs after its own copy of the prompt, and the rows of a
  micro-batch are padded to the longest. A prompt then runs G times.
* **rows apart, one at a time**: a forward for each row, as in plain transformers. If a model's
  rotary frequencies depend on the length (dynamic, longrope), rows that are longer than its
  original context run alone; shorter rows share a forward.
* **refused**, before the first step, with the reason.
* **skipped**: the architecture is not a text model, and was not tried.

`HFRollout` samples in the same ways: from shared prompts; with transformers' own cache, rows with
prompts of one length together; or without a cache.

## The self-check

What config.json says decides before weights are loaded. Before the first step of `fit`, four
made-up rows then run in that way, for the student, teacher and reference of the run, with its
adapter, precision and device, on every rank. Four things are checked:

1. Rows do not read each other. The tokens of one row change and all shapes stay: no other row may
   move at all; with experts by at most 1e-5 of a hidden state's size in float32.
2. Rows are right. Hidden states, and one gradient, are those of each row alone: within 1e-3, and
   0.15 where weights are bfloat16.
3. The model is causal. No token sees those after it, and the head is all that makes logits of
   hidden states.
4. The sampler agrees. Its log-probabilities of a few sampled tokens are the trainer's: of
   `HFRollout` within 1e-3 nats a token, and 0.2 for bfloat16; of vLLM, in process and on servers,
   within `model.gap.stop` for half of them. A rollout of your own is asked if it says
   `can_be_asked`.

Where a check fails, the run takes the next slower way, and one line says so and what it costs.
Where a row alone is wrong, the model is refused. `self_check.json` in the run's folder has all
figures.

All checks always run, so that the way of a run does not depend on how busy the machine is. They
take about forty forwards of four short rows, without random numbers: dropout and experts that are
drawn are off. If they take more than ten seconds, one line says so. `model.policy.self_check:
false` turns them off.

## Every architecture

`PYTHONPATH=tests/helpers .venv/bin/python tests/models/write_page.py` writes this table from the
self-check of a small random model of each architecture; `make test-models` tests that it is
current.

Of {total}: {counts}.

| model_type | class | rows | sampled | why |
|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    path: str
    """A `RowPath`; `refused`; `skipped`."""
    sampler: str = ""
    reason: str = ""


def outcome(name: str, policy: CausalLM | None = None) -> tuple[Outcome, CausalLM | None]:
    """How `name` runs by its self-check, and the checked policy if it does."""
    if name in SKIPPED:
        return Outcome(path="skipped", reason=SKIPPED[name]), None
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        model_folder(Path(folder), name)
        try:
            policy = CausalLM(folder)
            policy.configure_model()
            examine(policy, {}, HFRollout(), 1.0, GapCheck())
        except ConfigurationError as error:
            said = str(error).removeprefix("model.policy.name_or_path: ")
            return Outcome(path="refused", reason=_without_figures(said.partition(";")[0])), None
    known = policy.known
    return Outcome(
        path=known.path.value, sampler=known.sampled.value, reason=_without_figures(known.reason)
    ), policy


def _without_figures(reason: str) -> str:
    """Rounding differs by machine, the page must not."""
    return re.sub(
        r" \(.*| by [0-9][0-9.e-]*( nats a token)?$", "", reason.removeprefix("student: ")
    )


def plain_logprobs(policy: CausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the made-up rows' responses: by the policy's path, and of plain transformers."""
    rows = made_up_rows(policy)
    runner = policy.runner(rows, range(len(rows.prompts)), 10**6, policy.adapter.current())
    found = torch.full(rows.ids.shape, torch.nan)
    plain = torch.full(rows.ids.shape, torch.nan)
    with torch.no_grad():
        for micro in runner.micro_batches():
            logits = runner.run(micro, lambda hidden, head: head(hidden)).log_softmax(-1)
            mask = torch.zeros_like(rows.sampled)
            mask[micro] = rows.sampled[micro]
            found[mask] = logits.gather(1, rows.ids[mask][:, None])[:, 0]
            runner.done(micro)
        model = policy.language_model.eval()
        implementation = model.config._attn_implementation
        model.set_attn_implementation(policy.known.implementation)
        for row, prompt in enumerate(rows.prompts):
            n = int(rows.present[row].sum())
            ids = torch.tensor([[*prompt, *rows.ids[row, :n].tolist()]])
            z = model(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            plain[row, :n] = z.gather(1, ids[0, 1:, None])[-n:, 0]
        model.set_attn_implementation(implementation)
        model.train()
    return found[rows.sampled], plain[rows.sampled]


def page(outcomes: dict[str, Outcome]) -> str:
    """`docs/models.md`."""
    counts: dict[str, int] = {}
    for each in outcomes.values():
        counts[each.path] = counts.get(each.path, 0) + 1
    told = ", ".join(f"{count} {path}" for path, count in sorted(counts.items()))
    lines = [_HEAD.format(total=len(outcomes), counts=told)]
    for name in NAMES:
        each = outcomes[name]
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
        reason = each.reason.replace("|", "/")
        lines.append(f"| {name} | {kind} | {each.path} | {each.sampler} | {reason} |")
    return "\n".join(lines) + "\n"
