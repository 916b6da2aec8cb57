"""Checks, before the first step, that rows which share a forward compute what each does alone.

The packed path is right for layers that mix tokens by attention alone. Other layers would read
across rows without any error. So a few made-up rows run on the path that the run will take:

1. Rows do not read each other. The tokens of one row are changed, all shapes stay the same, and no
   other row may change, but for rounding where experts group tokens by their values.
2. Rows are those of plain transformers. Each row also runs alone, forward and backward, and hidden
   states and gradients must agree within rounding. So positions are right, and responses read the
   whole prompt that they share.
3. A row does not see its own future, and logits are the head's product with hidden states.
4. The sampler's log-probs are those of the trainer, if it is an engine that can be asked
   (`Rollout.can_be_asked`).

If the packed path fails, rows run padded; if that fails too, one at a time; and if a row alone is
wrong, the model is refused. All checks always run, however slow the machine: if one were left out
for lack of time, the path of a run, and so its rounding, would depend on the machine's load.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from scsdpo.distributed import all_gather
from scsdpo.errors import ConfigurationError, TrainingStopped, first_line
from scsdpo.io.files import write_object
from scsdpo.loss import TokenLogits
from scsdpo.metrics import GapCheck
from scsdpo.policy import CausalLM, Rows, Weights
from scsdpo.policy.row_path import RowPath
from scsdpo.policy.sharding import is_sharded, local
from scsdpo.policy.tree import SHORTEST_SHARED
from scsdpo.records import Outage, run_folder
from scsdpo.rollout import HFRollout, Rollout
from scsdpo.teacher import Teacher
from scsdpo.training.budget import OutOfMemory, as_out_of_memory, is_out_of_memory
from scsdpo.training.step import without_all_reduce
from scsdpo.types import Prompt, Responses, Sampling
from scsdpo.verifiers import ExactMatch

NAME = "self_check.json"
_LONG = 10.0
"""After so many seconds a line says how long the checks took."""
NOTHING = 0.0
"""Largest change of other rows without experts."""
EXPERTS, ROUNDED_EXPERTS = 1e-5, 0.07
"""Largest change of other rows with experts, relative to the root mean square of a hidden state:
in float32, and in bfloat16. Other tokens give an expert other groups, whose sums round anew."""
EXACT, ROUNDED = 1e-3, 0.15
"""Largest difference of hidden states and gradients from those of each row alone, relative to their
norm: for weights in float32, and in bfloat16."""
GAP, ROUNDED_GAP = 1e-3, 0.2
"""Largest mean |log-prob of the trainer - log-prob of `HFRollout`|, in nats: for weights in
float32, and in bfloat16."""
_DRAWN = 4
"""Tokens per sampled response."""
_KEPT = 2**22
"""Number of gradient entries that are compared, at most."""
_HUGE = 10**6
"""A budget of tokens that holds all rows."""


@dataclass(frozen=True, kw_only=True)
class PathResult:
    """Result of checking one set of weights on one path. All differences are relative and >= 0."""

    weights: str
    """`student`, `teacher`, `reference`."""
    path: str
    """A `RowPath`, or the path of the sampler."""
    others: float = 0.0
    """Change of the other rows, when one row was changed."""
    apart: float = 0.0
    """Difference of hidden states from those of each row alone; for a sampler, of log-probs in
    nats."""
    gradient: float = 0.0
    """Difference of gradients from those of each row alone; 0 where none were computed."""
    random: bool = False
    """True if a forward in training mode draws random numbers; gradients are then compared in
    evaluation mode."""
    fault: str = ""
    """Why the check failed; empty: it passed."""


def check_model(
    host: L.LightningModule,
    policy: CausalLM,
    teachers: Mapping[str, Teacher],
    rollout: Rollout,
    sampling: Sampling,
    gap: GapCheck,
) -> None:
    """Check the run's models, choose the path of their rows, and write the results to a file.

    A collective: every rank checks the same rows, and all choose alike.

    Args:
        host: the module of a Trainer that is about to fit.
        policy: the student, with its weights.
        teachers: slot -> teacher.
        rollout: the sampler.
        sampling: the run's sampling; its temperature and n are used.
        gap: how far an engine's log-probs may be from the trainer's.

    Raises:
        ConfigurationError: if the model is wrong on every path.
        TrainingStopped: if the check runs out of memory.
    """
    if not policy.self_check:
        return
    trainer = host.trainer
    expected, start = policy.known, time.monotonic()
    try:
        with (
            trainer.strategy.precision_plugin.forward_context(),
            without_all_reduce(trainer),
            as_out_of_memory(),
        ):
            findings, left_out = examine(policy, teachers, rollout, sampling.temperature, gap)
    except OutOfMemory as error:
        raise TrainingStopped(
            f"out of memory in the self-check, whose four rows have less than 60 tokens each "
            f"({error}): use model.policy.adapter Lora, a smaller model or more devices"
        ) from None
    name, seconds = type(policy.language_model).__name__, time.monotonic() - start
    if policy.known.path is not RowPath.SHARED:
        rank_zero_info(
            f"self-check: {name} cannot run a prompt once for all its responses "
            f"({policy.known.reason}). It runs with {policy.known.path.value}: each prompt runs "
            f"{sampling.n} times per step, which is slower"
        )
    if any(finding.random for finding in findings):
        rank_zero_info(
            f"self-check: {name} draws random numbers in training (dropout, or experts drawn at "
            "random), so log-probs of the update differ from those of the sampler; if it is "
            "dropout, set it to 0 in the model's config.json or in "
            "model.policy.adapter.lora_dropout"
        )
    if left_out:
        rank_zero_info(f"self-check: {left_out}. Training goes on")
    if seconds > _LONG:
        rank_zero_info(
            f"self-check: took {seconds:.0f} s; model.policy.self_check=false turns it off"
        )
    report = {
        "model": name,
        "expected": expected.path.value,
        "path": policy.known.path.value,
        "reason": policy.known.reason,
        "sampler": policy.known.sampled.value,
        "seconds": round(seconds, 3),
        "left_out": left_out,
        "findings": [asdict(finding) for finding in findings],
    }
    folder = run_folder(trainer)  # may be a collective: all ranks must call it
    if trainer.is_global_zero and trainer.loggers:
        write = partial(write_object, folder / NAME, report)
        Outage(NAME, OSError).attempt(write)  # a full disk does not end the run


def examine(
    policy: CausalLM,
    teachers: Mapping[str, Teacher],
    rollout: Rollout,
    temperature: float,
    gap: GapCheck,
) -> tuple[list[PathResult], str]:
    """Run all checks, the most important first.

    Returns:
        The results; and why the sampler was not checked, empty where it was or cannot be asked.

    Raises:
        ConfigurationError: if the model is wrong on every path.
    """
    rows = made_up_rows(policy)
    findings: list[PathResult] = []
    left_out = ""
    sets: dict[str, Weights] = {"student": policy.adapter.current()}
    for slot, teacher in teachers.items():
        for weights in teacher.weights_to_run(policy):
            if not any(weights.same(other) for other in sets.values()):
                sets[slot if slot not in sets else f"{slot}/2"] = weights

    device = policy.language_model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _refuse_model(_row_alone(policy, rows))
        for name, weights in sets.items():
            findings += _descend(policy, rows, name, weights)
        if isinstance(rollout, HFRollout):
            findings += _descend_sampler(policy, rows, rollout, temperature)
        elif rollout.can_be_asked:
            prompts, few = _prompts_to_sample(rows, temperature)
            if left_out := _lacks_room(rollout, prompts, few):
                return findings, left_out
            findings.append(_ask(policy, prompts, few, rollout, gap))
    return findings, left_out


def made_up_rows(policy: CausalLM) -> Rows:
    """Four rows of 15 to 58 tokens, whose prompts share starts and ends as those of runs do."""
    tokenizer = policy.chat.tokenizer
    known = min(len(tokenizer), policy.vocabulary)
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([i for i in range(known) if i not in special][:50_000])
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[int, ...]:
        at = torch.randint(len(usual), (count,), generator=generator, device="cpu")
        return tuple(usual[at].tolist())

    # The changed row has the smallest first id, so that it is packed before all rows that might
    # read it.
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
"""The row that is changed; no other row has its prompt."""


def _with_a_changed_row(policy: CausalLM, rows: Rows) -> Rows:
    """`rows` with other tokens in one row. Its first token stays, so that no row changes place."""
    prompts, ids = list(rows.prompts), rows.ids.clone()
    first, *others = prompts[_CHANGED]
    prompts[_CHANGED] = (first, *reversed(others))
    n = int(rows.present[_CHANGED].sum())
    ids[_CHANGED, :n] = ids[_CHANGED, :n].flip(0)
    return replace(rows, prompts=prompts, ids=ids)


def _descend(policy: CausalLM, rows: Rows, name: str, weights: Weights) -> list[PathResult]:
    """Take the fastest path that is right for these weights; return the results of each path."""
    findings = []
    learns = name == "student"
    while policy.known.path is not RowPath.ALONE:
        path = policy.known.path
        found = _first_fault_of_all_ranks(partial(_check_others, policy, rows, name, weights))
        if not found.fault:
            found = _first_fault_of_all_ranks(
                partial(_check_against_alone, policy, rows, found, weights)
            )
        # With shards a backward before the first step would change the order in which an
        # embedding's gradients are summed: steps with and without this check would differ by
        # rounding.
        if learns and not found.fault and not is_sharded(policy):
            found = _first_fault_of_all_ranks(partial(_check_gradient, policy, rows, found))
        findings.append(found)
        if not found.fault:
            break
        further = RowPath.PADDED if path is RowPath.SHARED else RowPath.ALONE
        policy.run_rows(further, f"{name}: {found.fault}")
    return findings


_LEARNED = (0, 1)
"""The rows whose gradient is compared."""


def _first_fault_of_all_ranks(work: Callable[[], PathResult]) -> PathResult:
    """The result of this rank, with the fault of the first rank that has one. A collective."""
    found = work()
    fault = next((each for each in all_gather([found.fault]) if each), "")
    return replace(found, fault=fault)


def _check_others(policy: CausalLM, rows: Rows, name: str, weights: Weights) -> PathResult:
    """Check 1, on the policy's present path."""
    path, exact = policy.known.path, _is_exact(policy)
    experts = _has_experts(policy.language_model)
    found = PathResult(weights=name, path=path.value)
    try:
        with _precision(policy, exact and experts):
            before = _states(policy, rows, path, weights)
            after = _states(policy, _with_a_changed_row(policy, rows), path, weights)
    except Exception as error:
        return _failed(found, "run", error)
    others = max(
        _largest(x, y)
        for row, (x, y) in enumerate(zip(before, after, strict=True))
        if row != _CHANGED
    )
    most = (EXPERTS if exact else ROUNDED_EXPERTS) if experts else NOTHING
    fault = f"rows read each other (a change of one row changes others by {others:.2g})"
    return replace(found, others=others, fault="" if others <= most else fault)


def _check_against_alone(
    policy: CausalLM, rows: Rows, found: PathResult, weights: Weights
) -> PathResult:
    """The forwards of check 2: rows together against each row alone."""
    path, exact = policy.known.path, _is_exact(policy)
    try:
        with _precision(policy, exact):
            here = _states(policy, rows, path, weights)
            alone = _states(policy, rows, RowPath.ALONE, weights)
    except Exception as error:
        return _failed(found, "run", error)
    # In bfloat16 rounding may give a token other experts: then the median token is judged.
    rounded = not exact and _has_experts(policy.language_model)
    differences = [_by_token(x, y) for x, y in zip(here, alone, strict=True)]
    apart = max(float(each.median() if rounded else each.max()) for each in differences)
    fault = f"rows run together differ from rows run alone by {apart:.2g}"
    near = apart <= (EXACT if exact else ROUNDED)
    return replace(found, apart=apart, fault="" if near else fault)


def _failed(found: PathResult, what: str, error: Exception) -> PathResult:
    """The result that the model cannot do `what` on this path; out of memory is raised again."""
    if is_out_of_memory(error) or isinstance(error, ConfigurationError):
        raise error
    return replace(found, fault=f"it cannot {what} with {found.path}: {first_line(error)}")


def _check_gradient(policy: CausalLM, rows: Rows, found: PathResult) -> PathResult:
    """The gradients of check 2, of two rows: together against each row alone.

    They are computed in training mode, so that gradient checkpointing is tested too, unless a
    forward then draws random numbers: dropout, experts that are drawn, layers that are skipped.
    """
    path, exact, few = policy.known.path, _is_exact(policy), rows.at(_LEARNED)
    try:
        with _precision(policy, exact):
            before = _random_state(policy)
            here = _gradient(policy, few, path)
            pairs = zip(before, _random_state(policy), strict=True)
            random = not all(torch.equal(x, y) for x, y in pairs)
            with _evaluating(policy) if random else nullcontext():
                if random:
                    here = _gradient(policy, few, path)
                alone = _gradient(policy, few, RowPath.ALONE)
    except Exception as error:
        policy.zero_grad()
        return _failed(found, "learn", error)
    gradient = 0.0
    if here:
        pairs = zip(here, alone, strict=True)
        squares = [((x - y).square().sum(), y.square().sum()) for x, y in pairs]
        apart, whole = (torch.stack(each).sum() for each in zip(*squares, strict=True))
        gradient = float((apart / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())
    wrong = not gradient <= (EXACT if exact else ROUNDED)
    fault = f"the gradient differs from that of rows run alone by {gradient:.2g}" if wrong else ""
    return replace(found, gradient=gradient, random=random, fault=fault)


def _states(policy: CausalLM, rows: Rows, path: RowPath, weights: Weights) -> list[Tensor]:
    """[n, D] hidden states of each row, without gradient."""
    found: dict[int, Tensor] = {}
    with _forced(policy, path), torch.no_grad():
        runner = policy.runner(rows, range(len(rows.prompts)), _HUGE, weights)
        for micro in runner.micro_batches():
            hidden = runner.run(micro, lambda hidden, head: hidden.float())
            runner.done(micro)
            sizes = rows.sampled.sum(-1)[micro].tolist() if micro else []
            found.update(zip(micro, hidden.split(sizes) if sizes else (), strict=True))
    return [found[row] for row in range(len(rows.prompts))]


def _gradient(policy: CausalLM, rows: Rows, path: RowPath) -> list[Tensor]:
    """Gradients of `_scalar_loss` in some of the trained parameters, the smallest ones."""
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
            runner.run(micro, partial(_scalar_loss, rows, micro)).backward()
            runner.done(micro)
    zero = (torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in kept)
    found = [gradient.detach().float().clone() for gradient in zero]
    policy.zero_grad()
    return found


def _scalar_loss(rows: Rows, micro: Sequence[int], hidden: Tensor, head: nn.Linear) -> Tensor:
    """A loss whose gradient differs by row, place and channel."""
    if not micro:
        return hidden.sum()
    parts = hidden.float().split(rows.sampled.sum(-1)[list(micro)].tolist())
    total = hidden.new_zeros((), dtype=torch.float32)
    for row, part in zip(micro, parts, strict=True):
        order = torch.arange(part.numel(), device=part.device).view_as(part)
        total = total + (part * torch.sin(order + 7.0 * row)).sum() / part.norm().detach()
    return total


def _row_alone(policy: CausalLM, rows: Rows) -> str:
    """Check 3: why the model is refused; '': it is not.

    Two forwards are compared: the logits of plain transformers for a row, and the head's product
    with the hidden states of a row that differs in its last token. If the logits before that token
    agree, both claims hold. If not, a third forward tells which one fails.
    """
    row = rows.at([1])
    prompt = row.prompts[0]
    other = replace(row, ids=row.ids.clone())
    n = int(row.present.sum())
    last = int(row.ids[0, n - 2])  # the last token that the model reads
    other.ids[0, n - 2] = next(token for token in prompt if token != last)
    student = policy.adapter.current()
    near = EXACT if _is_exact(policy) else ROUNDED

    def plain(model: PreTrainedModel) -> tuple[Tensor, ...]:
        ids = torch.tensor([[*prompt, *row.ids[0, : n - 1].tolist()]], device=model.device)
        return (model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float(),)

    def applied(hidden: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor]:
        return hidden.float(), TokenLogits.of(hidden, head, 1.0).logits.clone()

    def ran(rows: Rows) -> tuple[Tensor, Tensor]:
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
            f"the logits of {name} are not its head's product with hidden states (they differ by "
            f"{differs:.2g} of their spread), which the credit loss needs"
        )
    seen = float(_by_token(moved[: n - 1], hidden[: n - 1]).max())
    if not seen <= near:
        return f"{name} is not causal: a token reads later ones (they change it by {seen:.2g})"
    return ""


def _refuse_model(why: str, remedy: str = "choose another architecture (docs/models.md)") -> None:
    why = next((each for each in all_gather([why]) if each), "")
    if why:
        raise ConfigurationError(f"model.policy.name_or_path: {why}; {remedy}")


def _of_spread(plain: Tensor, made: Tensor) -> float:
    """Root mean square of the difference of two tables of logits, relative to their spread."""
    # The spread is that around each position's mean: a constant added to logits changes nothing.
    spread = float((plain - plain.mean(-1, keepdim=True)).square().mean().sqrt())
    return float((plain - made).square().mean().sqrt()) / max(spread, 1e-12)


# -------------------------------------------------------------------------------- the sampler


def _descend_sampler(
    policy: CausalLM, rows: Rows, rollout: HFRollout, temperature: float
) -> list[PathResult]:
    """Check 4: take the fastest path of sampling whose log-probs are the trainer's."""
    findings = []
    while True:
        found = _first_fault_of_all_ranks(lambda: _sampled(policy, rows, rollout, temperature))
        findings.append(found)
        if not found.fault:
            return findings
        if policy.known.sampled is RowPath.ALONE:
            name = type(policy.language_model).__name__
            _refuse_model(
                f"with {name} HFRollout {found.fault}", "use VLLMRollout as model.rollout"
            )
        shared = policy.known.sampled is RowPath.SHARED
        policy.sample_rows(RowPath.PADDED if shared else RowPath.ALONE)


def _sampled(policy: CausalLM, rows: Rows, rollout: HFRollout, temperature: float) -> PathResult:
    path, exact = policy.known.sampled, _is_exact(policy)
    found = PathResult(weights="sampler", path=path.value)
    prompts, sampling = _prompts_to_sample(rows, temperature)
    try:
        with _precision(policy, exact):
            drawn = rollout.sample(policy, prompts, sampling)
            gap = float(_gaps(policy, drawn).mean())
    except Exception as error:
        if is_out_of_memory(error) or (
            isinstance(error, ConfigurationError) and path is not RowPath.SHARED
        ):
            raise
        return replace(found, fault=f"cannot sample with {path.value}: {first_line(error)}")
    near = GAP if exact else ROUNDED_GAP
    fault = "" if gap <= near else f"and the trainer differ by {gap:.2g} nats a token"
    return replace(found, apart=gap, fault=fault)


def _lacks_room(rollout: Rollout, prompts: Sequence[Prompt], sampling: Sampling) -> str:
    """Why an engine cannot be asked for these tokens; '': it can."""
    most = rollout.max_length()
    needed = max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens
    if most is None or most >= needed:
        return ""
    return f"the sampler was not checked: it has room for {most} tokens, {needed} are needed"


def _ask(
    policy: CausalLM, prompts: list[Prompt], sampling: Sampling, rollout: Rollout, gap: GapCheck
) -> PathResult:
    """Check 4 for an engine that computes in a precision of its own, which `gap` allows for.

    There are few tokens, so the median is judged. An engine's own errors are not caught here.
    """
    with rollout.hold_weights(policy):
        drawn = rollout.sample(policy, prompts, sampling)
    with _precision(policy, _is_exact(policy)):
        gaps = _gaps(policy, drawn)
    name = type(rollout).__name__
    typical = float(gaps.median()) if len(gaps) else 0.0
    fault = f"{name} and the trainer differ by {typical:.2g} nats a token"
    wrong = fault if not typical <= gap.stop else ""
    found = _first_fault_of_all_ranks(
        lambda: PathResult(weights="sampler", path=name, apart=typical, fault=wrong)
    )
    if found.fault:
        raise ConfigurationError(
            f"model.rollout: {found.fault} on made-up rows, more than model.gap.stop={gap.stop:g}: "
            "the sampler uses other weights or other numerics; compare its dtype and its "
            "log-prob settings with the trainer's (docs/vllm.md)"
        )
    return found


def _prompts_to_sample(rows: Rows, temperature: float) -> tuple[list[Prompt], Sampling]:
    prompts = [
        Prompt(key=f"self-check/{i}", messages=(), verifier=ExactMatch(), answer="", ids=ids)
        for i, ids in enumerate(dict.fromkeys(rows.prompts))
    ]
    return prompts, Sampling(n=2, max_new_tokens=_DRAWN, temperature=temperature, seed=0)


def _gaps(policy: CausalLM, drawn: Responses) -> Tensor:
    """[n] |log-prob of the trainer - log-prob of the sampler|, nats, where both are known."""
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
    """True if the weights are float32, so that the check can run in it without autocast."""
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
def _evaluating(policy: CausalLM) -> Iterator[None]:
    """Evaluation mode inside the block: no dropout, and nothing else that is drawn at random."""
    modes = {part: part.training for part in policy.wrapped.modules()}
    policy.wrapped.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _random_state(policy: CausalLM) -> list[Tensor]:
    device = policy.language_model.device
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _largest(x: Tensor, y: Tensor) -> float:
    """Largest |x - y| over the root mean square of y."""
    scale = y.square().mean().sqrt().clamp(min=torch.finfo(y.dtype).tiny)
    return float((x - y).abs().max() / scale)


def _by_token(x: Tensor, y: Tensor) -> Tensor:
    """[n]: |x - y| / |y| at each token."""
    scale = y.norm(dim=-1).clamp(min=torch.finfo(y.dtype).tiny)
    return (x - y).norm(dim=-1) / scale
