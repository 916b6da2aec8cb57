"""Before the first step: what rows that share a forward say is what each says alone.

The packed path is right for layers that mix tokens by attention alone. Others read their
neighbours, and nothing fails. So a few made-up rows run by the path that the run will take:

1. Rows do not read each other. The tokens of one row change, all shapes stay: no other row may
   move, but for rounding where experts sort tokens by what they are.
2. Rows are those of plain transformers. Each runs alone too, forward and backward, and the
   difference of hidden states and gradients is within rounding; so positions are right, and what a
   prompt hands on to its responses is whole.
3. A row does not see its own future, and the head is all that makes logits of hidden states.
4. The sampler draws tokens with the log-probabilities that the trainer says of them, if it is an
   engine that can be asked (`Rollout.can_be_asked`).

Where the packed path fails, rows run apart; where that fails too, one at a time; and where a row
alone is wrong, the model is refused. What would not be over in time, by how long the last forwards
took, is left out; but what a sampler's engine takes to start and to get the weights is not counted,
for the run's first batch would wait for it too.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.distributed import all_gather, all_max
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.io.files import write_whole
from scsdpo.loss import TokenLogits
from scsdpo.metrics import GapCheck
from scsdpo.policy import CausalLM, Rows, Weights
from scsdpo.policy.row_path import RowPath
from scsdpo.policy.sharding import is_sharded, local
from scsdpo.policy.tree import SHORTEST_SHARED
from scsdpo.records import Outage, run_folder
from scsdpo.rollout import HFRollout, Rollout
from scsdpo.teacher import Teacher
from scsdpo.training.budget import OutOfMemory, is_out_of_memory, noticed
from scsdpo.training.step import without_all_reduce
from scsdpo.types import Prompt, Responses, Sampling
from scsdpo.verifiers import ExactMatch

NAME = "self_check.json"
SECONDS = 10.0
"""What is not expected to be over by nine tenths of this time is left out, and said."""
NOTHING, EXPERTS = 0.0, 1e-6
"""How far other rows may move, relative to a hidden state's root mean square in float32."""
EXACT, ROUNDED = 1e-3, 0.15
"""How far hidden states and gradients may be from those of each row alone, relative to their
norm: weights in float32, and in bfloat16."""
GAP, ROUNDED_GAP = 1e-3, 0.2
"""Mean |log-prob of the trainer - the sampler's|, in nats, for the same two, by `HFRollout`."""
_BACKWARD = 3
"""Forwards that a backward takes as long as, at most."""
_DRAWN = 4
"""Tokens of a drawn response."""
_KEPT = 2**22
"""Entries of gradients that are compared."""
_HUGE = 10**6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one set of weights said by one path. All differences are relative and >= 0."""

    weights: str
    """`student`, `teacher`, `reference`."""
    path: str
    """A `RowPath`, or how the sampler ran."""
    others: float = 0.0
    """How far the other rows moved."""
    apart: float = 0.0
    """How far hidden states are from those of each row alone; of a sampler, nats."""
    gradient: float = 0.0
    """The same of gradients; 0 where there are none."""
    fault: str = ""
    """Why it failed; empty: it passed."""


class _Clock:
    """What is left out because it would be late; all ranks agree."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._forward: dict[str, float] = {}
        """By weights, seconds of a forward, of those that ran last."""
        self.left_out: list[str] = []

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @contextmanager
    def of(self, forwards: int, weights: str) -> Iterator[None]:
        """Inside, so many forwards run."""
        start = self.seconds
        yield
        self._forward[weights] = (self.seconds - start) / forwards

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside, the time does not count."""
        start = self.seconds
        yield
        self._start += self.seconds - start

    def is_late(self, what: str, forwards: int, weights: str = "student") -> bool:
        """Whether `what`, which takes so many forwards, is left out."""
        a_forward = self._forward.get(weights, self._forward["student"])
        end = torch.tensor(self.seconds + forwards * a_forward, dtype=torch.float64)
        late = float(all_max(end)) > 0.9 * SECONDS
        if late:
            self.left_out.append(what)
        return late


def check_model(
    host: L.LightningModule,
    policy: CausalLM,
    teachers: Mapping[str, Teacher],
    rollout: Rollout,
    sampling: Sampling,
    gap: GapCheck,
) -> None:
    """Check the run's models, choose how their rows run, and write what was found.

    A collective: every rank checks the same rows, and all choose alike.

    Args:
        host: of a Trainer that is about to fit.
        policy: the student, with its weights.
        teachers: who else reads, by slot.
        rollout: who samples.
        sampling: how the run does; its temperature and n are looked at.
        gap: how far an engine's log-probabilities may be from the trainer's.

    Raises:
        ConfigurationError: if the model is wrong by every path.
        TrainingStopped: if it does not fit into memory.
    """
    if not policy.self_check:
        return
    trainer = host.trainer
    started = policy.known
    try:
        with (
            trainer.strategy.precision_plugin.forward_context(),
            without_all_reduce(trainer),
            noticed(),
        ):
            findings, left_out, seconds = examine(
                policy, teachers, rollout, sampling.temperature, gap
            )
    except OutOfMemory as error:
        raise TrainingStopped(
            f"out of memory in the self-check, whose four rows have less than 60 tokens ({error}): "
            "use model.policy.adapter Lora, a smaller model or more devices"
        ) from None
    name = type(policy.language_model).__name__
    if policy.known.path is not RowPath.SHARED:
        rank_zero_info(
            f"self-check: {name} runs {policy.known.path.value} ({policy.known.reason}); each "
            f"prompt runs {sampling.n} times a step, once a response, and not once"
        )
    if left_out:
        rank_zero_info(f"self-check: not checked within {SECONDS:.0f} s: {', '.join(left_out)}")
    said = {
        "model": name,
        "expected": started.path.value,
        "path": policy.known.path.value,
        "reason": policy.known.reason,
        "sampler": policy.known.sampled.value,
        "seconds": round(seconds, 3),
        "left_out": left_out,
        "findings": [asdict(finding) for finding in findings],
    }
    folder = run_folder(trainer)  # a logger's version may ask rank 0: everyone must ask
    if trainer.is_global_zero and trainer.loggers:
        write = partial(write_whole, folder / NAME, json.dumps(said, indent=1) + "\n")
        Outage(NAME, OSError).attempt(write)  # a disk that is full costs no run


def examine(
    policy: CausalLM,
    teachers: Mapping[str, Teacher],
    rollout: Rollout,
    temperature: float,
    gap: GapCheck,
) -> tuple[list[Finding], list[str], float]:
    """All checks, in the order of their worth: findings, what was left out, and seconds.

    Raises:
        ConfigurationError: if the model is wrong by every path.
    """
    rows = made_up_rows(policy)
    findings: list[Finding] = []
    clock = _Clock()
    sets: dict[str, Weights] = {"student": policy.adapter.current()}
    for slot, teacher in teachers.items():
        for trunk in teacher.trunks(policy):
            if not any(trunk.same(other) for other in sets.values()):
                sets[slot if slot not in sets else f"{slot}/2"] = trunk

    with _undisturbed(policy):
        _refuse(_row_alone(policy, rows, clock))
        for name, weights in sets.items():
            findings += _descend(policy, rows, name, weights, clock)
        if isinstance(rollout, HFRollout):
            findings += _descend_sampler(policy, rows, rollout, temperature, clock)
        elif rollout.can_be_asked:
            findings += _ask(policy, rows, rollout, temperature, gap, clock)
    return findings, clock.left_out, clock.seconds


def made_up_rows(policy: CausalLM) -> Rows:
    """Four rows of 15 to 58 tokens, whose prompts share starts and ends in ways that runs do."""
    tokenizer = policy.chat.tokenizer
    known = min(len(tokenizer), policy.vocabulary)
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(known) if i not in special][:50_000])
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[int, ...]:
        at = torch.randint(len(usual), (count,), generator=generator, device="cpu")
        return tuple(usual[at].tolist())

    # The smallest id comes first: what others could read of that row stands before them.
    first, usual = usual[:1], usual[1:]
    system = drawn(SHORTEST_SHARED)
    a, b, c = system + drawn(3), system + drawn(5), (int(first), *drawn(8))
    prompts, lengths = [a, b, a, c], torch.tensor([5, 4, 3, 6])
    present = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.tensor([drawn(present.shape[1]) for _ in prompts]) * present
    return Rows(
        prompts=prompts, ids=ids, present=present, sampled=present, pad_id=policy.chat.pad_id
    )


_CHANGED = 3
"""The row whose prompt no other row has."""


def _with_another_row(policy: CausalLM, rows: Rows) -> Rows:
    """The same with other tokens in one row; its first stays, so that no row changes its place."""
    prompts, ids = list(rows.prompts), rows.ids.clone()
    first, *others = prompts[_CHANGED]
    prompts[_CHANGED] = (first, *reversed(others))
    n = int(rows.present[_CHANGED].sum())
    ids[_CHANGED, :n] = ids[_CHANGED, :n].flip(0)
    return replace(rows, prompts=prompts, ids=ids)


def _descend(
    policy: CausalLM, rows: Rows, name: str, weights: Weights, clock: _Clock
) -> list[Finding]:
    """Take the fastest path that is right for these weights, and all that were wrong before."""
    findings = []
    learns = name == "student"
    while policy.known.path is not RowPath.ALONE:
        path = policy.known.path
        together, alone = _FORWARDS[path], len(rows.prompts)
        if clock.is_late(name, 2 * together, name):
            break
        found = _agreed(lambda: _beside_others(policy, rows, name, weights, clock))
        itself = f"{name}, each row alone"
        if not found.fault and not clock.is_late(itself, together + alone, name):
            found = _agreed(partial(_beside_itself, policy, rows, found, weights, clock))
        # Under shards a backward before the first step changes the order in which an embedding's
        # gradients are summed: steps with and without a check would differ by rounding.
        due = learns and not found.fault and not is_sharded(policy)
        if due and not clock.is_late("gradient", (1 + _BACKWARD) * (together + len(_LEARNED))):
            found = _agreed(partial(_learned, policy, rows, found))
        findings.append(found)
        if not found.fault:
            break
        further = RowPath.PADDED if path is RowPath.SHARED else RowPath.ALONE
        policy.run_rows(further, f"{name}: {found.fault}")
    return findings


_FORWARDS = {RowPath.SHARED: 2, RowPath.PADDED: 1}
"""Of all rows together."""
_LEARNED = (0, 1)
"""The rows of which a gradient is taken."""


def _agreed(work: Callable[[], Finding]) -> Finding:
    """The finding of this rank, with the fault of the first rank that has one."""
    found = work()
    fault = next((each for each in all_gather([found.fault]) if each), "")
    return replace(found, fault=fault)


def _beside_others(
    policy: CausalLM, rows: Rows, name: str, weights: Weights, clock: _Clock
) -> Finding:
    """Check 1, by the path that the policy takes now."""
    path, exact = policy.known.path, _is_exact(policy)
    experts = _has_experts(policy.language_model)
    found = Finding(weights=name, path=path.value)
    try:
        with _precision(policy, exact and experts), clock.of(2 * _FORWARDS[path], name):
            before = _states(policy, rows, path, weights)
            after = _states(policy, _with_another_row(policy, rows), path, weights)
    except Exception as error:
        return _failed(found, "run", error)
    others = max(
        _largest(x, y)
        for row, (x, y) in enumerate(zip(before, after, strict=True))
        if row != _CHANGED
    )
    most = EXPERTS if experts else NOTHING
    if experts and not exact:
        most *= torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    fault = f"rows read each other (a change of one moves others by {others:.2g})"
    return replace(found, others=others, fault="" if others <= most else fault)


def _beside_itself(
    policy: CausalLM, rows: Rows, found: Finding, weights: Weights, clock: _Clock
) -> Finding:
    """The forwards of check 2: each row beside itself alone."""
    path, exact = policy.known.path, _is_exact(policy)
    forwards = _FORWARDS[path] + len(rows.prompts)
    try:
        with _precision(policy, exact), clock.of(forwards, found.weights):
            here = _states(policy, rows, path, weights)
            alone = _states(policy, rows, RowPath.ALONE, weights)
    except Exception as error:
        return _failed(found, "run", error)
    # In bfloat16 a token's experts may be others.
    rounded = not exact and _has_experts(policy.language_model)
    apart = max(
        _typical(x, y) if rounded else _relative(x, y) for x, y in zip(here, alone, strict=True)
    )
    fault = f"rows differ from each alone by {apart:.2g}"
    near = apart <= (EXACT if exact else ROUNDED)
    return replace(found, apart=apart, fault="" if near else fault)


def _failed(found: Finding, what: str, error: Exception) -> Finding:
    """That the model cannot do `what` by this path; out of memory is no finding."""
    if is_out_of_memory(error) or isinstance(error, ConfigurationError):
        raise error
    return replace(found, fault=f"it cannot {what} {found.path}: {first_line(error)}")


def _learned(policy: CausalLM, rows: Rows, found: Finding) -> Finding:
    """The gradient of check 2, of two rows."""
    path, exact, few = policy.known.path, _is_exact(policy), rows.at(_LEARNED)
    try:
        with _precision(policy, exact):
            gradient = _gradient_apart(policy, few, path)
    except Exception as error:
        policy.zero_grad()
        return _failed(found, "learn", error)
    wrong = not gradient <= (EXACT if exact else ROUNDED)
    fault = f"the gradient differs from that of each row alone by {gradient:.2g}" if wrong else ""
    return replace(found, gradient=gradient, fault=fault)


def _states(policy: CausalLM, rows: Rows, path: RowPath, weights: Weights) -> list[Tensor]:
    """[n, D] of each row, without gradient."""
    found: dict[int, Tensor] = {}
    with _forced(policy, path), torch.no_grad():
        runner = policy.runner(rows, range(len(rows.prompts)), _HUGE, weights)
        for micro in runner.micro_batches():
            hidden = runner.run(micro, lambda hidden, head: hidden.float())
            runner.done(micro)
            sizes = rows.sampled.sum(-1)[micro].tolist() if micro else []
            found.update(zip(micro, hidden.split(sizes) if sizes else (), strict=True))
    return [found[row] for row in range(len(rows.prompts))]


def _gradient_apart(policy: CausalLM, rows: Rows, path: RowPath) -> float:
    """Relative distance of two gradients of one loss, by `path` and of each row alone."""
    here, alone = (_gradient(policy, rows, each) for each in (path, RowPath.ALONE))
    squares = [((x - y).square().sum(), y.square().sum()) for x, y in zip(here, alone, strict=True)]
    if not squares:
        return 0.0
    apart, whole = (torch.stack(each).sum() for each in zip(*squares, strict=True))
    return float((apart / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())


def _gradient(policy: CausalLM, rows: Rows, path: RowPath) -> list[Tensor]:
    """Of a loss that tells rows, places and channels apart, in some of the trained parameters."""
    trained = sorted((p for p in policy.parameters() if p.requires_grad), key=Tensor.numel)
    kept: list[nn.Parameter] = []
    total = 0
    for parameter in trained:
        total += parameter.numel()
        if kept and total > _KEPT:
            break
        kept.append(parameter)
    policy.zero_grad()
    with _forced(policy, path), torch.enable_grad():
        runner = policy.runner(rows, range(len(rows.prompts)), _HUGE)
        for micro in runner.micro_batches():
            runner.run(micro, partial(_told, rows, micro)).backward()
            runner.done(micro)
    zero = (torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in kept)
    found = [gradient.detach().float().clone() for gradient in zero]
    policy.zero_grad()
    return found


def _told(rows: Rows, micro: Sequence[int], hidden: Tensor, head: nn.Linear) -> Tensor:
    """A number whose gradient differs by row, place and channel."""
    if not micro:
        return hidden.sum()
    parts = hidden.float().split(rows.sampled.sum(-1)[list(micro)].tolist())
    total = hidden.new_zeros((), dtype=torch.float32)
    for row, part in zip(micro, parts, strict=True):
        order = torch.arange(part.numel(), device=part.device).view_as(part)
        total = total + (part * torch.sin(order + 7.0 * row)).sum() / part.norm().detach()
    return total


def _row_alone(policy: CausalLM, rows: Rows, clock: _Clock) -> str:
    """Check 3; why the model is refused, or nothing.

    What the head makes of a row is what plain transformers says of one that differs only behind it:
    both hold or neither is known, and then a third forward tells which of them fails.
    """
    row = rows.at([1])
    prompt = row.prompts[0]
    other = replace(row, ids=row.ids.clone())
    n = int(row.present.sum())
    last = int(row.ids[0, n - 2])  # the one behind it is read by nobody
    other.ids[0, n - 2] = next(token for token in prompt if token != last)
    student = policy.adapter.current()
    near = EXACT if _is_exact(policy) else ROUNDED

    def plain(model: PreTrainedModel) -> tuple[Tensor, ...]:
        ids = torch.tensor([[*prompt, *row.ids[0, : n - 1].tolist()]], device=model.device)
        return (model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float(),)

    def applied(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
        return hidden.float(), TokenLogits.of(hidden, head, 1.0).logits.clone()

    def ran(rows: Rows) -> tuple[Tensor, Tensor]:
        with clock.of(1, "student"):
            return policy.runner(rows, [0], _HUGE, student).run([0], applied)

    name = type(policy.language_model).__name__
    try:
        with (
            _precision(policy, _is_exact(policy)),
            _forced(policy, RowPath.ALONE),
            torch.no_grad(),
        ):
            (said,) = policy.run(student, plain)
            moved, made = ran(other)
            if _of_spread(said[: n - 1], made[: n - 1]) <= near:
                return ""
            hidden, made = ran(row)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ConfigurationError):
            raise
        return f"{name} does not run as a causal language model: {first_line(error)}"
    if not (differs := _of_spread(said, made)) <= near:
        return (
            f"{name} makes its logits of hidden states by more than its head (they differ by "
            f"{differs:.2g} of their spread), which the credit loss does not model"
        )
    if not (seen := _relative(moved[: n - 1], hidden[: n - 1])) <= near:
        return f"{name} is not causal: a token sees those after it (they move it by {seen:.2g})"
    return ""


def _refuse(why: str, remedy: str = "choose another architecture (docs/models.md)") -> None:
    why = next((each for each in all_gather([why]) if each), "")
    if why:
        raise ConfigurationError(f"model.policy.name_or_path: {why}; {remedy}")


def _of_spread(plain: Tensor, made: Tensor) -> float:
    """Root mean square of the difference of two tables of logits, relative to their spread."""
    spread = float((plain - plain.mean(-1, keepdim=True)).square().mean().sqrt())
    return float((plain - made).square().mean().sqrt()) / max(spread, 1e-12)


# -------------------------------------------------------------------------------- the sampler


def _descend_sampler(
    policy: CausalLM, rows: Rows, rollout: HFRollout, temperature: float, clock: _Clock
) -> list[Finding]:
    """Check 4: the fastest way to sample that says what the trainer says."""
    findings = []
    while not clock.is_late("sampler", _FORWARDS_DRAWN):
        found = _agreed(lambda: _sampled(policy, rows, rollout, temperature))
        findings.append(found)
        if not found.fault:
            break
        if policy.known.sampled is RowPath.ALONE:
            name = type(policy.language_model).__name__
            _refuse(f"of {name} HFRollout {found.fault}", "use VLLMRollout as model.rollout")
        shared = policy.known.sampled is RowPath.SHARED
        policy.sample_rows(RowPath.PADDED if shared else RowPath.ALONE)
    return findings


_FORWARDS_DRAWN = 1 + _DRAWN + 2
"""Of prompts, of tokens, and of the trainer."""


def _sampled(policy: CausalLM, rows: Rows, rollout: HFRollout, temperature: float) -> Finding:
    path, exact = policy.known.sampled, _is_exact(policy)
    found = Finding(weights="sampler", path=path.value)
    prompts, sampling = _asked(rows, temperature)
    try:
        with _precision(policy, exact):
            drawn = rollout.sample(policy, prompts, sampling)
            gap = float(_gaps(policy, drawn).mean())
    except Exception as error:
        if is_out_of_memory(error) or (
            isinstance(error, ConfigurationError) and path is not RowPath.SHARED
        ):
            raise
        return replace(found, fault=f"cannot sample {path.value}: {first_line(error)}")
    near = GAP if exact else ROUNDED_GAP
    fault = "" if gap <= near else f"and the trainer differ by {gap:.2g} nats a token"
    return replace(found, apart=gap, fault=fault)


def _ask(
    policy: CausalLM,
    rows: Rows,
    rollout: Rollout,
    temperature: float,
    gap: GapCheck,
    clock: _Clock,
) -> list[Finding]:
    """Check 4 of an engine that computes by its own precision, which `gap` allows for.

    Few tokens: the median is judged. What its own errors are, it says itself.
    """
    prompts, sampling = _asked(rows, temperature)
    needed = max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
    most = rollout.max_length()
    if most is not None and most < needed:
        clock.left_out.append(f"sampler (it has room for {most} tokens)")
        return []
    if clock.is_late("sampler", 2):
        return []
    with clock.stopped(), rollout.hold_weights(policy):
        drawn = rollout.sample(policy, prompts, sampling)
    with _precision(policy, _is_exact(policy)):
        gaps = _gaps(policy, drawn)
    name = type(rollout).__name__
    typical = float(gaps.median()) if len(gaps) else 0.0
    fault = f"{name} and the trainer differ by {typical:.2g} nats a token"
    wrong = fault if not typical <= gap.stop else ""
    found = _agreed(lambda: Finding(weights="sampler", path=name, apart=typical, fault=wrong))
    if found.fault:
        raise ConfigurationError(
            f"model.rollout: {found.fault} on made-up rows, more than model.gap.stop={gap.stop:g}: "
            "the sampler has other weights or computes otherwise; compare its dtype and its "
            "log-prob settings with the trainer's (docs/vllm.md)"
        )
    return [found]


def _asked(rows: Rows, temperature: float) -> tuple[list[Prompt], Sampling]:
    prompts = [
        Prompt(key=f"self-check/{i}", messages=(), verifier=ExactMatch(), answer="", ids=ids)
        for i, ids in enumerate(dict.fromkeys(rows.prompts))
    ]
    return prompts, Sampling(n=2, max_new_tokens=_DRAWN, temperature=temperature, seed=0)


def _gaps(policy: CausalLM, drawn: Responses) -> Tensor:
    """[n] |log-prob of the trainer - the sampler's| of the drawn tokens of which it says one."""
    sampled, ids = drawn.sampled.flatten(0, 1).cpu(), drawn.ids.flatten(0, 1).cpu()
    prompts = [prompt.ids for prompt in drawn.prompts for _ in range(drawn.sampled.shape[1])]
    asked = Rows(
        prompts=prompts, ids=ids, present=sampled, sampled=sampled, pad_id=policy.chat.pad_id
    )
    said = torch.full(ids.shape, math.nan)
    runner = policy.runner(asked, range(len(ids)), _HUGE, policy.adapter.current())
    for micro in runner.micro_batches():
        mask = torch.zeros_like(sampled)
        mask[micro] = sampled[micro]
        tokens = ids[mask]

        def logprobs(hidden: Tensor, head: nn.Linear, tokens: Tensor = tokens) -> Tensor:
            logits = TokenLogits.of(hidden, head, drawn.temperature)
            return logits.logprob(tokens.to(hidden.device))

        said[mask] = runner.run(micro, logprobs).float().cpu()
        runner.done(micro)
    gaps = (said - drawn.policy_logprobs.flatten(0, 1).cpu())[sampled].abs()
    return gaps[~gaps.isnan()]


# ---------------------------------------------------------------------------------- precision


def _is_exact(policy: CausalLM) -> bool:
    """Whether the weights are float32, so that the check can be, whatever autocast does."""
    dtypes = {p.dtype for p in policy.language_model.parameters() if p.is_floating_point()}
    return dtypes <= {torch.float32, torch.float64} and policy.gathered_dtype == "auto"


def _has_experts(model: PreTrainedModel) -> bool:
    names = {type(part).__name__.lower() for part in model.modules()}
    return any("expert" in name or "moe" in name for name in names)


@contextmanager
def _precision(policy: CausalLM, exact: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if exact:
            device = policy.language_model.device.type
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _forced(policy: CausalLM, path: RowPath) -> Iterator[None]:
    known = policy.known
    policy.known = replace(known, path=path)
    try:
        yield
    finally:
        policy.known = known


@contextmanager
def _undisturbed(policy: CausalLM) -> Iterator[None]:
    """Leave random state, gradients and modes as they are; no dropout."""
    model = policy.wrapped
    modes = {part: part.training for part in model.modules()}
    # Dropout of attention is a number in the configuration, and no module.
    settings: Mapping[str, Any] = policy.language_model.config.get_text_config().to_dict()
    drops = any("drop" in k and isinstance(v, float) and v > 0 for k, v in settings.items())
    for part in model.modules():
        part.training = part.training and not drops and not isinstance(part, nn.Dropout)
    device = policy.language_model.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _largest(x: Tensor, y: Tensor) -> float:
    """Largest |x - y| over the root mean square of y."""
    scale = y.square().mean().sqrt().clamp(min=torch.finfo(y.dtype).tiny)
    return float((x - y).abs().max() / scale)


def _by_token(x: Tensor, y: Tensor) -> Tensor:
    scale = y.norm(dim=-1).clamp(min=torch.finfo(y.dtype).tiny)
    return (x - y).norm(dim=-1) / scale


def _relative(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y| at the worst token."""
    return float(_by_token(x, y).max())


def _typical(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y| at the median token."""
    return float(_by_token(x, y).median())
