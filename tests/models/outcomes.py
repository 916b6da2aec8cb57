"""What becomes of an architecture: how its rows run, or why it is refused."""

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
# Models: which path an architecture takes

Written by `PYTHONPATH=tests/helpers .venv/bin/python tests/models/write_page.py`, which runs the
self-check on a small random model of every causal architecture of transformers; `make test-models`
holds it to be current.

How the rows of a step run:

* **packed, prompts shared**: rows lie end to end in one forward, and every common start of prompts
  runs once. Right where attention is all that mixes tokens.
* **rows apart, padded**: each response runs after its own copy of the prompt, and the rows of a
  micro-batch are padded to the longest. A prompt then runs G times.
* **rows apart, one at a time**: as in plain transformers, a forward a row. So run rows that are
  longer than the original context of a model whose rotary frequencies depend on the length
  (dynamic, longrope); shorter rows of it share a forward.
* **refused**, before the first step, with the reason.

`HFRollout` samples alike: from shared prompts; with transformers' own cache, rows with prompts of
one length together; or without a cache.

## The self-check

What is known from config.json decides before weights are loaded. Before the first step of `fit`
four made-up rows run by that path, for the student, teacher and reference of the run, with its
adapter, precision and device, on every rank:

1. One row's tokens change and all shapes stay: no other row may move at all; with experts by at
   most 1e-6 of a hidden state's size in float32.
2. Hidden states, and one gradient, are those of each row alone: within 1e-3, and 0.15 where weights
   are bfloat16.
3. No token sees those after it, and the head is all that makes logits of hidden states.
4. The sampler's log-probabilities of a few drawn tokens are the trainer's: of `HFRollout` within
   1e-3 nats a token, and 0.2 for bfloat16; of vLLM, in process and on servers, within
   `model.gap.stop` for half of them. A rollout of your own is asked if it says `can_be_asked`.

Where a check fails the next slower path is taken, and one line says so and what it costs; where a
row alone is wrong the model is refused. `self_check.json` in the run's folder has all figures. It
takes ten seconds at most: what would not be over by then, by how long the last forwards took, is
left out, which is said. An engine that starts and gets the weights for it, as it would for the
first batch, is not counted. `model.policy.self_check: false` turns it off.

## Every architecture

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
    return reason.removeprefix("student: ").partition(" (")[0].partition(" by 0")[0]


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
