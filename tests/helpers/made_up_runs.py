"""Folders of runs that nobody made: everything that a report reads, without training anything.

Responses say what a page must survive: ends of scripts, markup, signs that turn the line.
"""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import yaml

from scsdpo.records import SCHEMA_VERSION
from scsdpo.statistics import score_interval

HOSTILE = '</script><img src="x" onerror="fetch(1)"> \u202e & <b>ü𝛼</b> \u2028{{ 7 * 7 }}'
WORDS = ["the", " answer", " is", " B", ".\n", " carbon", " 12", " ✓", " because", " of", "", "é"]
VALIDATE_EVERY = 20


def made_up_run(
    folder: Path, *, batches=200, seed=0, alarm=False, text=HOSTILE, trace_every=10, turns=False
) -> Path:
    """A run of so many batches: 16 questions, of which 2 are written with 8 responses each.

    With `turns` each response is an episode of two turns, between which a tool says `text`.
    """
    draw = random.Random(seed)
    for name in ("rollouts", "tokens"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config(seed)))
    lines = [{"batch": 0, "step": 0, "time": 1e9} | evaluation(folder, draw, 0, 0.0)]
    for batch in range(1, batches + 1):
        share = batch / batches
        lines.append(
            {"batch": batch, "step": batch, "time": 1e9 + 2 * batch}
            | figures(draw, share)
            | (figures_of_turns(share) if turns else {})
        )
        traced = (batch - 1) % trace_every == 0
        responses(folder, draw, "train", batch, share, traced=traced, text=text, turns=turns)
        if batch % VALIDATE_EVERY == 0:
            lines[-1] |= evaluation(folder, draw, batch, share)
            responses(folder, draw, "val", batch, share, traced=False, text=text, turns=turns)
    write_lines(folder / "metrics.jsonl", lines)
    if alarm:
        write_lines(folder / "health.jsonl", [warning(batches)])
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def config(seed):
    model = {
        "policy": {"class_path": "scsdpo.policy.CausalLM", "init_args": {"name_or_path": "tiny"}},
        "teacher": {"class_path": "scsdpo.teacher.EMA", "init_args": {"rate": 0.05}},
        "advantage": {"class_path": "scsdpo.advantage.SelfDistillation", "init_args": {}},
        "weighting": {"class_path": "scsdpo.weighting.PassRate", "init_args": {"power": seed / 2}},
    }
    return {"seed_everything": seed, "model": model, "data": {"note": HOSTILE}}


def figures(draw, share):
    p = min(1.0, max(0.0, 0.3 + 0.4 * share + draw.gauss(0, 0.06)))
    none, every = max(0.0, 0.4 - 0.3 * share), 0.05 + 0.3 * share
    middle = 1 - none - every
    found = {
        "pass_rate": p, "reward": p, "solve_none": none, "solve_all": every, "informative": middle,
        "medium": middle, "central": 0.7 * middle, "effective_questions": 16 * middle,
        "response_length": 30 + 8 * share + draw.gauss(0, 2), "truncated": 0.01 * draw.random(),
        "verifier_errors": 0.0, "loss": 0.02 * (1 - share) + 0.002, "entropy": 0.1 + 0.02 * share,
        "divergence": 0.02 * math.exp(-3 * share) * (1 + 0.2 * draw.random()),
        "gradient_norm": 0.05 * math.exp(draw.gauss(0, 0.3)), "logprob_gap": 4e-7,
        "logprob_gap_max": 1e-5, "logprob_gap_share": 0.0, "trained_rollouts": 128 * middle,
        "trained_tokens": 3800 * middle, "skipped": 0.0, "tokens/rollout": 3800.0,
        "tokens/teacher": 4000.0 * middle, "tokens/student": 3700.0 * middle,
        "seconds/rollout": 0.6, "seconds/verify": 0.02, "seconds/teacher": 0.3,
        "seconds/student": 0.9, "memory": 1.5, "seconds/step": 0.05,
    }  # fmt: skip
    return {f"train/{name}": value for name, value in found.items()}


def figures_of_turns(share):
    found = {
        "turns": 2.0, "calls": 1 + share, "failed_calls": 0.2 * (1 - share),
        "observation_tokens": 12.0, "out_of_turns": 0.125, "out_of_time": 0.0,
        "turn_1/reward": 0.25, "turn_2/reward": share - 0.25, "turn_1/length": 20.0,
        "turn_2/length": 30 - 8 * share,
    }  # fmt: skip
    return {f"train/{name}": value for name, value in found.items()}


def evaluation(folder, draw, batch, share, questions=40):
    """A validation, its file and what is logged of it: mean@4 over four levels."""
    rows = []
    for i in range(questions):
        chance = (0.6, 0.35, 0.2, 0.1)[i % 4] + 0.3 * share
        rewards = [float(draw.random() < chance) for _ in range(4)]
        row = {"key": f"val/{i}", "category": f"level{1 + i % 4}", "rewards": rewards}
        rows.append(row | {"successes": [reward == 1 for reward in rewards]})
    figures = {"all": estimates(rows)}
    for level in range(1, 5):
        name = f"level{level}"
        figures[name] = estimates([row for row in rows if row["category"] == name])
    content = {"schema_version": 1, "kind": "evaluation", "batch": batch, "figures": figures}
    path = folder / "evaluations" / f"val-{batch}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | {"questions": rows}))
    logged = {"val/mean@4": figures["all"]["mean@4"]["value"], "val/maj@4": 0.4 + 0.2 * share}
    for level in range(1, 5):
        logged[f"val/level{level}/mean@4"] = figures[f"level{level}"]["mean@4"]["value"]
    return logged


def estimates(rows):
    scores = [sum(row["rewards"]) / 4 for row in rows]
    found = {"mean@4": score_interval(scores), "pass@1": score_interval(scores)}
    found["pass@4"] = score_interval([max(row["rewards"]) for row in rows])
    return {name: asdict(estimate) for name, estimate in found.items()}


def responses(folder, draw, split, batch, share, *, traced, text, turns):
    lines, tokens = [], []
    for q in range(2):
        key = f"lab/{batch}/{q}" if split == "train" else f"lab/val/{q}"
        right = [draw.random() < 0.3 + 0.4 * share for _ in range(8)]
        for sample in range(8):
            place = {
                "schema_version": SCHEMA_VERSION, "run": folder.name, "split": split,
                "batch": batch, "step": batch - 1, "key": key, "sample": sample,
            }  # fmt: skip
            own = traced and sample < 2
            line, pieces = response(draw, place, right, own, text)
            played = {"turns": episode(pieces, text), "stopped": "turns" if sample == 2 else ""}
            lines.append(line | (played if turns else {"turns": [], "stopped": ""}))
            if own:
                second = len(pieces) // 2 if turns else len(pieces)
                turn = [int(i >= second) for i in range(len(pieces))]
                tokens.append(trace(draw, place, pieces) | {"turn": turn})
    name = f"{split}_{batch:06}.jsonl"
    write_lines(folder / "rollouts" / name, lines)
    if tokens:
        write_lines(folder / "tokens" / name, tokens)


def response(draw, place, right, traced, text):
    pieces = [draw.choice(WORDS) for _ in range(draw.randrange(24, 64))]
    pieces += [text, "<|im_end|>"]
    sample, rate = place["sample"], sum(right) / len(right)
    training = place["split"] == "train"
    line = place | {
        "category": f"level{1 + place['batch'] % 4}", "gold": "B",
        "messages": [{"role": "user", "content": f"Which letter is {place['key']}? {text}"}],
        "response": "".join(pieces[:-1]), "answer": "B" if right[sample] else "A",
        "reward": float(right[sample]), "success": right[sample], "error": "",
        "feedback": "" if right[sample] else f"not B {text}", "finished": True,
        "n_tokens": len(pieces), "samples": len(right), "pass_rate": rate,
        "weight": math.sqrt(rate * (1 - rate)) if training else 1.0, "active": training,
        "teacher_prompt": f"Correct solution: {text}" if training and any(right) else None,
        "version": "0123abcd", "traced": traced,
    }  # fmt: skip
    return line, pieces


def episode(pieces, text):
    """What was said in two turns; the tool's answer earns something, and has feedback."""
    first, second = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 : -1]
    said = {"role": "assistant", "name": "", "feedback": "", "reward": 0.0}
    said |= {"calls": 0, "failed": 0}
    tool = said | {"role": "tool", "name": "look_up", "feedback": f"too late {text}"}
    tool |= {"reward": 0.25, "calls": 1}
    return [
        said | {"text": "".join(first)},
        tool | {"text": f"3 results {text}"},
        said | {"text": "".join(second)},
    ]


def trace(draw, place, pieces):
    """Numbers that no two tokens share, so that a page cannot show one for another."""
    n = len(pieces)

    def column(scale, shift=0.0):
        return [shift + scale * draw.gauss(0, 1) for _ in range(n)]

    def spread():
        parts = [draw.random() ** 3 for _ in range(6)]
        return [0.98 * part / sum(parts) for part in parts]

    ids = [draw.randrange(100, 200) for _ in range(n)]
    top_ids = [[i, *draw.sample(range(200, 300), 5)] for i in ids]
    logprob = [-abs(draw.gauss(0.3, 0.3)) for _ in ids]
    return place | {
        "temperature": 1.0, "objective_name": "divergence", "coefficient": 1e-4, "weight": 0.5,
        "ids": ids, "text": pieces, "credit": column(1e-4), "magnitude": column(1e-5, 3e-4),
        "objective": column(0.001, 0.02), "token_weight": [1.0] * n, "importance": [1.0] * n,
        "logprob": logprob, "teacher_logprob": [v - abs(draw.gauss(0, 0.2)) for v in logprob],
        "sampler_logprob": logprob, "gap": column(1e-7), "entropy": column(0.02, 0.2),
        "teacher_entropy": column(0.02, 0.2), "forward_kl": column(0.002, 0.03),
        "reverse_kl": column(0.002, 0.03), "jsd": column(0.001, 0.015), "top_ids": top_ids,
        "top_probs": [spread() for _ in ids], "top_teacher_probs": [spread() for _ in ids],
        "top_credit": [[1e-4 * draw.gauss(0, 1) for _ in range(6)] for _ in ids],
        "vocabulary": {str(i): f" t{i}" for row in top_ids for i in row} | {"105": HOSTILE},
    }  # fmt: skip


def warning(batch):
    return {
        "schema_version": SCHEMA_VERSION, "batch": batch, "step": batch, "time": 1e9,
        "rule": "divergence", "message": f"the divergence fell while the pass rate fell {HOSTILE}",
        "remedy": "Lower the learning rate.", "values": {"pass_rate": 0.1},
    }  # fmt: skip
