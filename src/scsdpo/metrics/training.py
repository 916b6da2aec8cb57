"""Figures that are logged of a training step: over the whole batch, the same on every rank."""

import math
import resource
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from scsdpo.distributed import all_max, all_sum
from scsdpo.loss import LossOutput
from scsdpo.metrics.phases import MODEL_PHASES, PHASES, PhaseTimer
from scsdpo.types import Judged

SHOWN_TURNS = 8
"""Rewards and lengths of an episode's first turns are logged turn by turn; so many turns."""


def log_figures(
    module: L.LightningModule, prefix: str, figures: Mapping[str, float], *, shown: str = ""
) -> None:
    """Log figures that are equal on all ranks, each as `prefix/name`; `shown` in the bar too."""
    for name, value in figures.items():
        module.log(
            f"{prefix}/{name}",
            # A tensor on the host: Lightning would copy a number to the device, and wait.
            torch.tensor(value, dtype=torch.get_default_dtype()),
            prog_bar=name == shown,
            batch_size=1,
        )


def rollout_metrics(judged: Judged, weights: Tensor) -> dict[str, float]:
    """Figures of the batch over all ranks: pass rate, lengths, and so on.

    Shares of questions: `solve_none` (p = 0), `solve_all` (p = 1), `informative` (0 < p < 1),
    `medium` (1/8 <= p <= 7/8), `central` (2/8 <= p <= 6/8).

    `effective_questions` is the effective sample size of the question weights,
    (sum_j W_j)^2 / sum_j W_j^2: Q under uniform weights, 0 when all are 0.

    Figures of episodes (`episode_metrics`) follow.
    """
    p = judged.pass_rates
    of_questions = {
        "pass_rate": p,
        "solve_none": p == 0,
        "solve_all": p == 1,
        "informative": (p > 0) & (p < 1),
        "medium": (p >= 1 / 8) & (p <= 7 / 8),
        "central": (p >= 2 / 8) & (p <= 6 / 8),
    }
    of_rollouts = {
        "reward": judged.rewards,
        "response_length": judged.lengths,
        "truncated": ~judged.ended,
    }
    errors = sum(bool(verdict.error) for group in judged.verdicts for verdict in group)
    per_question = weights.double().mean(-1)
    others = [len(p), judged.rewards.numel(), errors]
    sums = [value.double().sum() for value in (*of_questions.values(), *of_rollouts.values())]
    sums += [per_question.sum(), per_question.square().sum(), *(p.new_tensor(n) for n in others)]
    *total, weight, square, questions, count, failed = all_sum(torch.stack(sums)).tolist()
    shares = dict(zip((*of_questions, *of_rollouts), total, strict=True))
    return {
        **{name: shares[name] / questions for name in of_questions},
        **{name: shares[name] / count for name in of_rollouts},
        "effective_questions": weight**2 / square if square > 0 else 0.0,
        "verifier_errors": failed,
        **episode_metrics(judged),
    }


def episode_metrics(judged: Judged) -> dict[str, float]:
    """Figures of the batch's episodes over all ranks; empty if there are none.

    `turns`, `calls` and `observation_tokens` are means over episodes, `failed_calls` is a share of
    calls, `out_of_turns` and `out_of_time` are shares of episodes (`Verdict.stopped`). For each of
    the first `SHOWN_TURNS` turns, means over the episodes that have it: `turn_K/reward`, what it
    earned, and `turn_K/length`, tokens that the policy drew in it. K counts from 1.
    """
    responses, sums = judged.responses, torch.zeros(7 + 3 * SHOWN_TURNS, dtype=torch.float64)
    played = [
        (q, g, episode)
        for q, group in enumerate(responses.episodes)
        for g, episode in enumerate(group)
        if episode.parts
    ]
    if played:
        rewards = judged.turn_rewards
        lengths = torch.stack(
            [
                (responses.sampled & (responses.turns == k)).sum(-1)
                for k in range(rewards.shape[-1])
            ],
            dim=-1,
        )
        observed = (responses.extents - responses.lengths).tolist()
        for q, g, episode in played:
            stopped = judged.verdicts[q][g].stopped
            found = [1, episode.turns, sum(part.calls for part in episode.parts)]
            found += [sum(part.failed for part in episode.parts), observed[q][g]]
            sums[:7] += torch.tensor([*found, stopped == "turns", stopped == "time"])
        rows = torch.tensor([(q, g) for q, g, _ in played], device=rewards.device).T
        here = rewards[*rows], lengths[*rows].double()
        has = ~here[0].isnan()
        by_turn = [has.double(), here[0].nan_to_num(0.0), torch.where(has, here[1], 0.0)]
        table = torch.stack([each.sum(0) for each in by_turn], dim=-1)[:SHOWN_TURNS].cpu()
        sums[7 : 7 + table.numel()] += table.flatten()
    totals = all_sum(sums)
    episodes, turns, called, failed, tokens, no_turns, no_time = totals[:7].tolist()
    if not episodes:
        return {}
    figures = {"turns": turns / episodes, "calls": called / episodes}
    if called:
        figures["failed_calls"] = failed / called
    figures["observation_tokens"] = tokens / episodes
    figures |= {"out_of_turns": no_turns / episodes, "out_of_time": no_time / episodes}
    for k, (count, reward, length) in enumerate(totals[7:].view(-1, 3).tolist(), start=1):
        if count:
            figures |= {f"turn_{k}/reward": reward / count, f"turn_{k}/length": length / count}
    return figures


def phase_metrics(timer: PhaseTimer, device: torch.device) -> dict[str, float]:
    """`seconds/PHASE` of the slowest rank and `tokens/PHASE` of all ranks since the last call, and
    `memory`: the largest peak of a rank so far, in GiB.
    """
    seconds, tokens = timer.take()
    most = [*(seconds.get(phase, 0.0) for phase in PHASES), peak_memory(device) / 2**30]
    taken = torch.tensor(most, dtype=torch.float64)
    counts = torch.tensor([tokens.get(phase, 0) for phase in MODEL_PHASES], dtype=torch.float64)
    *slowest, memory = all_max(taken).tolist()
    everyone = all_sum(counts)
    return {
        **{f"seconds/{phase}": s for phase, s in zip(PHASES, slowest, strict=True)},
        "memory": memory,
        **{f"tokens/{phase}": n for phase, n in zip(MODEL_PHASES, everyone.tolist(), strict=True)},
    }


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def token_metrics(
    outputs: Iterable[LossOutput], objective: str, cap: float = math.inf
) -> dict[str, float]:
    """Means over the tokens that were trained on, over all ranks; empty if there were none.

    Args:
        outputs: per micro-batch the kernel's output. `experts_differ` is the share of tokens that
            the trainer sends to other experts than the sampler did, in any layer, among those for
            which the sampler reported its experts.
        objective: name of the mean objective in the log.
        cap: cap on importance weights; `importance_capped` is the share of weights that reach it.
            inf: there is no cap, and no such figure.
    """
    rows = []
    for output in outputs:
        columns = output.objective.double(), output.entropy.double(), output.importance >= cap
        here = columns[0].sum()
        counts = torch.full_like(here, len(output.objective)), output.elsewhere.double().sum()
        noted = torch.full_like(here, len(output.elsewhere))
        rows.append(torch.stack([*(c.sum(dtype=torch.float64) for c in columns), *counts, noted]))
    sums = torch.stack(rows).sum(0) if rows else torch.zeros(6, dtype=torch.float64)
    *total, count, differ, noted = all_sum(sums).tolist()
    names = [objective, "entropy", *(["importance_capped"] if cap < math.inf else [])]
    shares = {"experts_differ": differ / noted} if noted else {}
    if not count:
        return {}
    return {n: value / count for n, value in zip(names, total, strict=False)} | shares


class TokenOrigin(NamedTuple):
    """The sampler's log-probs of N tokens, and the tokens' ages."""

    logprob: Tensor
    """[N] the sampler's log S(y), of the whole distribution, nats; nan: not known."""
    age: Tensor
    """[N, 2] int32: `Batch.ages`, in optimizer steps and in batches."""

    @property
    def of_present_weights(self) -> Tensor:
        """[N] `logprob` where the weights before the batch's first update drew the token, else nan.

        The trainer's log-probs must agree with these.
        """
        return self.logprob.where(self.age[:, 0] == 0, torch.nan)


def age_metrics(outputs: Iterable[tuple[LossOutput, TokenOrigin]]) -> dict[str, float]:
    """Ages of the tokens that were trained on, over all ranks; empty if there were none.

    With w the importance weights that were used and r = S(y) / S_sampler(y), over the n tokens,

        importance_ess = (sum w)^2 / (n sum w^2),   ratio_ess = (sum r)^2 / (n sum r^2),

    the effective sample size as a share: 1 where all weights agree. `logprob_drift` is the mean of
    |log r| over the tokens that other weights drew, nats.

    Args:
        outputs: per micro-batch the kernel's output, and its tokens' origin.
    """
    sums, most = torch.zeros(10, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for output, origin in outputs:
        age, w = origin.age.double(), output.importance.double()
        drift = output.logprob.double() - origin.logprob.double()
        known = ~drift.isnan()
        drift, old = drift.where(known, 0.0), age[:, 0] > 0
        r = drift.exp().where(known, 0.0)
        columns = (
            *(torch.ones_like(w), age[:, 0], age[:, 1], old.double()),
            *(w, w.square(), r, r.square(), drift.abs() * old, (known & old).double()),
        )
        sums = sums.to(w.device) + torch.stack([column.sum() for column in columns])
        most = torch.maximum(most.to(w.device), torch.cat([age, age.new_zeros(1, 2)]).amax(0))
    n, steps, batches, old_n, w, w2, r, r2, drift_sum, drifted = all_sum(sums).tolist()
    oldest = all_max(most).tolist()
    if not n:
        return {}
    return {
        "age_steps": steps / n,
        "age_steps_max": oldest[0],
        "age_batches": batches / n,
        "age_batches_max": oldest[1],
        "other_versions": old_n / n,
        **({"importance_ess": w**2 / (n * w2)} if w2 else {}),
        **({"ratio_ess": r**2 / (n * r2)} if r2 else {}),
        **({"logprob_drift": drift_sum / drifted} if drifted else {}),
    }
