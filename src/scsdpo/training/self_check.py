"""Before the first step: what rows that share a forward say is what each says alone.

The packed path is right for layers that mix tokens by attention alone. Others read their
neighbours, and nothing fails. So a few made-up rows run by the path that the run will take:

1. Rows do not read each other. The tokens of one row change, all shapes stay: no other row may
   move, but for rounding where experts sort tokens by what they are.
2. Rows are those of plain transformers. Each runs alone too, forward and backward, and the
   difference of hidden states and gradients is within rounding; so positions are right, and what a
   prompt hands on to its responses is whole.
3. A row does not see its own future, and the head is all that makes logits of hidden states.
4. `HFRollout` draws tokens with the log-probabilities that the trainer says of them. Of other
   engines the first batch's tokens tell (`GapCheck`), before the first step.

Where the packed path fails, rows run apart; where that fails too, one at a time; and where a row
alone is wrong, the model is refused.
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
from scsdpo.policy import CausalLM, Rows, Weights
from scsdpo.policy.row_path import RowPath
from scsdpo.policy.sharding import is_sharded, local
from scsdpo.policy.tree import SHORTEST_SHARED
from scsdpo.records import Outage, run_folder
from scsdpo.rollout import HFRollout, Rollout
from scsdpo.teacher import Teacher
from scsdpo.training.budget import OutOfMemory, is_out_of_memory, noticed
from scsdpo.training.step import without_all_reduce
from scsdpo.types import Prompt, Sampling
from scsdpo.verifiers import ExactMatch

NAME = "self_check.json"
SECONDS = 10.0
"""What is not begun by half of this time is left out, and said."""
NOTHING, EXPERTS = 0.0, 1e-6
"""How far other rows may move, relative to a hidden state's root mean square in float32."""
EXACT, ROUNDED = 1e-3, 0.15
"""How far hidden states and gradients may be from those of each row alone, relative to their
norm: weights in float32, and in bfloat16."""
GAP, ROUNDED_GAP = 1e-3, 0.2
"""Mean |log-prob of the trainer - the sampler's|, in nats, for the same two."""
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
    """What is left out because it is late; all ranks agree."""

    def __init__(self) -> None:
        self.start, self.left_out = time.monotonic(), list[str]()

    def is_late(self, what: str) -> bool:
        """Whether `what` is left out."""
        spent = torch.tensor(time.monotonic() - self.start, dtype=torch.float64)
        late = float(all_max(spent)) > SECONDS / 2
        if late:
            self.left_out.append(what)
        return late


def check_model(
    host: L.LightningModule,
    policy: CausalLM,
    teachers: Mapping[str, Teacher],
    rollout: Rollout,
    sampling: Sampling,
) -> None:
    """Check the run's models, choose how their rows run, and write what was found.

    A collective: every rank checks the same rows, and all choose alike.

    Args:
        host: of a Trainer that is about to fit.
        policy: the student, with its weights.
        teachers: who else reads, by slot.
        rollout: who samples.
        sampling: how the run does; its temperature and n are looked at.

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
            findings, left_out, seconds = examine(policy, teachers, rollout, sampling.temperature)
    except OutOfMemory as error:
        raise TrainingStopped(
            f"out of memory in the self-check, whose four rows have less than 50 tokens ({error}): "
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
    policy: CausalLM, teachers: Mapping[str, Teacher], rollout: Rollout, temperature: float
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
        _refuse(_row_alone(policy, rows))
        for name, weights in sets.items():
            if name == "student" or not clock.is_late(name):
                findings += _descend(policy, rows, name, weights, clock)
        if isinstance(rollout, HFRollout) and not clock.is_late("sampler"):
            findings += _descend_sampler(policy, rows, rollout, temperature)
    return findings, clock.left_out, time.monotonic() - clock.start


def made_up_rows(policy: CausalLM) -> Rows:
    """Four rows of 14 to 25 tokens, whose prompts share starts and ends in ways that runs do."""
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
        found = _agreed(lambda: _compared(policy, rows, name, weights))
        # Under shards a backward before the first step changes the order in which an embedding's
        # gradients are summed: steps with and without a check would differ by rounding.
        due = learns and not found.fault and not is_sharded(policy)
        if due and not clock.is_late("gradient"):
            found = _agreed(partial(_learned, policy, rows, found))
        findings.append(found)
        if not found.fault:
            break
        further = RowPath.PADDED if path is RowPath.SHARED else RowPath.ALONE
        policy.run_rows(further, f"{name}: {found.fault}")
    return findings


def _agreed(work: Callable[[], Finding]) -> Finding:
    """The finding of this rank, with the fault of the first rank that has one."""
    found = work()
    fault = next((each for each in all_gather([found.fault]) if each), "")
    return replace(found, fault=fault)


def _compared(policy: CausalLM, rows: Rows, name: str, weights: Weights) -> Finding:
    """Check 1, and the forwards of check 2, by the path that the policy takes now."""
    path = policy.known.path
    exact = _is_exact(policy)
    experts = _has_experts(policy.language_model)
    found = Finding(weights=name, path=path.value)
    autocast = torch.is_autocast_enabled(policy.language_model.device.type)
    rounds = exact and not experts and autocast  # only then the first forward was not exact
    try:
        with _precision(policy, exact and experts):
            before = _states(policy, rows, path, weights)
            after = _states(policy, _with_another_row(policy, rows), path, weights)
        others = max(
            _largest(x, y)
            for row, (x, y) in enumerate(zip(before, after, strict=True))
            if row != _CHANGED
        )
        with _precision(policy, exact):
            alone = _states(policy, rows, RowPath.ALONE, weights)
            here = _states(policy, rows, path, weights) if rounds else before
            pairs = list(zip(here, alone, strict=True))
            rounded = not exact and experts  # where a token's experts may be others
            apart = max(_typical(x, y) if rounded else _relative(x, y) for x, y in pairs)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ConfigurationError):
            raise
        return replace(found, fault=f"it cannot run {path.value}: {first_line(error)}")
    most = EXPERTS if experts else NOTHING
    if experts and not exact:
        most *= torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    near = EXACT if exact else ROUNDED
    fault = ""
    if not others <= most:
        fault = f"rows read each other (a change of one moves others by {others:.2g})"
    elif not apart <= near:
        fault = f"rows differ from each alone by {apart:.2g}"
    return replace(found, others=others, apart=apart, fault=fault)


def _learned(policy: CausalLM, rows: Rows, found: Finding) -> Finding:
    """The gradient of check 2, of two rows."""
    path, exact, few = policy.known.path, _is_exact(policy), rows.at([0, 1])
    try:
        with _precision(policy, exact):
            gradient = _gradient_apart(policy, few, path)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ConfigurationError):
            raise
        policy.zero_grad()
        return replace(found, fault=f"it cannot learn {path.value}: {first_line(error)}")
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


def _row_alone(policy: CausalLM, rows: Rows) -> str:
    """Check 3; why the model is refused, or nothing."""
    model_rows = rows.at([1])
    prompt = model_rows.prompts[0]
    other = replace(model_rows, ids=model_rows.ids.clone())
    n = int(model_rows.present.sum())
    last = int(model_rows.ids[0, n - 2])  # the one behind it is read by nobody
    other.ids[0, n - 2] = next(token for token in prompt if token != last)
    student = policy.adapter.current()
    exact = _is_exact(policy)

    def logits(model: PreTrainedModel) -> tuple[Tensor, ...]:
        ids = torch.tensor([[*prompt, *model_rows.ids[0, : n - 1].tolist()]], device=model.device)
        return (model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float(),)

    def applied(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
        return hidden.float(), TokenLogits.of(hidden, head, 1.0).logits.clone()

    name = type(policy.language_model).__name__
    try:
        with _precision(policy, exact), _forced(policy, RowPath.ALONE), torch.no_grad():
            ran = [policy.runner(each, [0], _HUGE, student) for each in (model_rows, other)]
            (hidden, made), (moved, _) = (runner.run([0], applied) for runner in ran)
            (plain,) = policy.run(student, logits)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ConfigurationError):
            raise
        return f"{name} does not run as a causal language model: {first_line(error)}"
    spread = float((plain - plain.mean(-1, keepdim=True)).square().mean().sqrt())
    differs = float((plain - made).square().mean().sqrt()) / max(spread, 1e-12)
    if not differs <= (EXACT if exact else ROUNDED):
        return (
            f"{name} makes its logits of hidden states by more than its head (they differ by "
            f"{differs:.2g} of their spread), which the credit loss does not model"
        )
    seen = _relative(moved[: n - 1], hidden[: n - 1])
    if not seen <= (EXACT if exact else ROUNDED):
        return f"{name} is not causal: a token sees those after it (they move it by {seen:.2g})"
    return ""


def _refuse(why: str, remedy: str = "choose another architecture (docs/models.md)") -> None:
    why = next((each for each in all_gather([why]) if each), "")
    if why:
        raise ConfigurationError(f"model.policy.name_or_path: {why}; {remedy}")


# -------------------------------------------------------------------------------- the sampler


def _descend_sampler(
    policy: CausalLM, rows: Rows, rollout: HFRollout, temperature: float
) -> list[Finding]:
    """Check 4: the fastest way to sample that says what the trainer says."""
    findings = []
    while True:
        found = _agreed(lambda: _sampled(policy, rows, rollout, temperature))
        findings.append(found)
        if not found.fault:
            return findings
        if policy.known.sampled is RowPath.ALONE:
            name = type(policy.language_model).__name__
            _refuse(f"of {name} HFRollout {found.fault}", "use VLLMRollout as model.rollout")
        shared = policy.known.sampled is RowPath.SHARED
        policy.sample_rows(RowPath.PADDED if shared else RowPath.ALONE)


def _sampled(policy: CausalLM, rows: Rows, rollout: HFRollout, temperature: float) -> Finding:
    path, exact = policy.known.sampled, _is_exact(policy)
    found = Finding(weights="sampler", path=path.value)
    prompts = [
        Prompt(key=f"self-check/{i}", messages=(), verifier=ExactMatch(), answer="", ids=ids)
        for i, ids in enumerate(dict.fromkeys(rows.prompts))
    ]
    sampling = Sampling(n=2, max_new_tokens=6, temperature=temperature, seed=0)
    try:
        with _precision(policy, exact):
            drawn = rollout.sample(policy, prompts, sampling)
            sampled = drawn.sampled.flatten(0, 1).cpu()
            ids = drawn.ids.flatten(0, 1).cpu()
            asked = Rows(
                prompts=[prompt.ids for prompt in prompts for _ in range(sampling.n)],
                ids=ids,
                present=sampled,
                sampled=sampled,
                pad_id=policy.chat.pad_id,
            )
            said = torch.full(ids.shape, math.nan)
            runner = policy.runner(asked, range(len(ids)), _HUGE, policy.adapter.current())
            for micro in runner.micro_batches():
                mask = torch.zeros_like(sampled)
                mask[micro] = sampled[micro]
                tokens = ids[mask]

                def logprobs(hidden: Tensor, head: nn.Linear, tokens: Tensor = tokens) -> Tensor:
                    logits = TokenLogits.of(hidden, head, temperature)
                    return logits.logprob(tokens.to(hidden.device))

                said[mask] = runner.run(micro, logprobs).float().cpu()
                runner.done(micro)
    except Exception as error:
        if is_out_of_memory(error) or (
            isinstance(error, ConfigurationError) and path is not RowPath.SHARED
        ):
            raise
        return replace(found, fault=f"cannot sample {path.value}: {first_line(error)}")
    gaps = (said - drawn.policy_logprobs.flatten(0, 1).cpu())[sampled].abs()
    gap = float(gaps.mean())
    near = GAP if exact else ROUNDED_GAP
    fault = "" if gap <= near else f"and the trainer differ by {gap:.2g} nats a token"
    return replace(found, apart=gap, fault=fault)


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
