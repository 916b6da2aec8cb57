"""The arithmetic of `scsdpo plan` against what fresh processes take, phase by phase.

    python benchmarks/plan.py [--model DIR] [--cases full lora ...] [--tolerance 0.1]

Each case trains two batches in a process of its own on CPU and reads the peak resident size of each
phase from the kernel (Linux). Without `--model` it is a model of SmolLM2-135M's shapes with random
weights, for memory does not see values. One JSON line a case and phase.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

CASES = {
    "tiny": {"shapes": "tiny"},
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "full, bf16-mixed": {"precision": "bf16-mixed"},
    "full, two teachers": {"reference": True},
    "lora": {"lora": True},
    "lora, checkpointing": {"lora": True, "checkpointing": True},
    "qwen3, full": {"shapes": "qwen3"},
    "qwen3, lora": {"shapes": "qwen3", "lora": True},
    "qwen3-0.6b, 4 bits": {"shapes": "qwen3-0.6b", "lora": True, "nf4": True, "merged": False},
    "qwen3-0.6b, 4 bits, merged": {"shapes": "qwen3-0.6b", "lora": True, "nf4": True},
    "full, two ranks": {"ranks": 2},
    "full, two ranks, checkpointing": {"ranks": 2, "checkpointing": True},
}
LOADING = "loading"
QUESTIONS, GROUP, RESPONSE = 4, 4, 40
"""A rank."""
SHAPES = {
    # SmolLM2-135M: grouped queries, tied.
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    # Next to nothing: what is measured is what the process takes by itself.
    "tiny": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 128,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
    # Qwen3: norms of queries and keys, heads wider than the hidden state, untied.
    "qwen3": {
        "model_type": "qwen3",
        "num_hidden_layers": 16,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 1536,
        "vocab_size": 65536,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
_RANK = "SCSDPO_PLAN_CASE"
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc otherwise keeps freed blocks of up to 32 MiB, and resident memory does not fall."""


def make_model(kind: str, folder: Path) -> Path:
    """Random weights, with the tokenizer of the policy that ships with the package."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from scsdpo.policy import TINY_FOLDER

    settings = {"max_position_embeddings": 4096, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(**SHAPES[kind], **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
    return folder


def resident(name: str) -> int:
    """Bytes, `VmRSS` or `VmHWM`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status: this needs Linux")


class PhasePeaks:
    """Peak resident size of each phase, by the marks of the module's timer.

    Before the first mark weights are loaded. On a CPU the pages of the checkpoint's mapped file are
    then resident beside what is made of them; the kernel takes them back where memory is needed.
    """

    def __init__(self, module) -> None:
        self.peaks: dict[str, int] = {}
        self._phase, self._mark = LOADING, module.timer._mark
        module.timer._mark = self.mark

    def mark(self, phase: str) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), resident("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is now what is resident
        self._phase = phase
        self._mark(phase)


def build(model: Path, case: dict):
    """The module of a case, its weights not loaded."""
    from scsdpo.advantage import Blend, ReferenceAnchor, SelfDistillation, Weighted
    from scsdpo.policy import NF4, CausalLM, FullFineTune, Lora, Unquantized
    from scsdpo.rollout import HFRollout
    from scsdpo.teacher import EMA, Frozen, NoTeacher, PlainPrompt
    from scsdpo.training import Limits, PolicyOptimizer
    from scsdpo.types import Sampling

    advantage, reference = SelfDistillation(), NoTeacher()
    if case.get("reference"):
        anchored = Weighted(advantage=ReferenceAnchor(), weight=0.1)
        advantage = Blend(parts=(Weighted(advantage=advantage), anchored))
        reference = Frozen(PlainPrompt())
    sampling = Sampling(n=GROUP, max_new_tokens=RESPONSE)
    return PolicyOptimizer(
        CausalLM(
            str(model),
            adapter=Lora(r=16) if case.get("lora") else FullFineTune(),
            quantization=NF4() if case.get("nf4") else Unquantized(),
            gradient_checkpointing=case.get("checkpointing", False),
        ),
        advantage,
        EMA(context=PlainPrompt()),
        reference=reference,
        rollout=HFRollout(merged=case.get("merged", True)),
        sampling=sampling,
        val_sampling=sampling,
        limits=Limits(max_tokens=case.get("budget", 512)),
    )


def plan(model: Path, case: dict, prompt: int, before: int):
    """The arithmetic for a case."""
    from scsdpo.planning import Devices, Lengths, memory_of, setup_of
    from scsdpo.planning.setup import LATE_BYTES

    setup = setup_of(
        build(model, case),
        devices=Devices(
            ranks=case.get("ranks", 1), kind="cpu", memory=2**40, process=before + LATE_BYTES
        ),
        autocast="mixed" in case.get("precision", ""),
        questions=case.get("ranks", 1) * QUESTIONS,
        validation=QUESTIONS,
        lengths=Lengths(prompt=prompt, teacher_prompt=prompt, response=RESPONSE),
    )
    return memory_of(setup)


def train(model: Path, case: dict, folder: Path) -> None:
    """Two batches; rank 0 prints a line a phase."""
    import lightning as L

    from scsdpo.data import TaskDataModule
    from scsdpo.lab import LabTasks

    module, ranks = build(model, case), case.get("ranks", 1)
    data = TaskDataModule(
        LabTasks(split="train"),
        LabTasks(split="val", size=2),
        questions_per_batch=ranks * QUESTIONS,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision=case.get("precision", "32-true"),
        limit_train_batches=2,
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    measured, before = PhasePeaks(module), resident("VmRSS")
    prompts: list[int] = []
    sample = module.sample

    def sampled(asked, how):
        chat = module.policy.chat
        module.policy.chat = replace(chat, eos_ids=(10**6,))  # all as long as they may be
        prompts.extend(len(prompt.ids) for prompt in asked)
        return sample(asked, how)

    module.sample = sampled
    trainer.fit(module, data)
    if trainer.is_global_zero:
        report(model, case, sum(prompts) // len(prompts), before, measured.peaks)


def report(model: Path, case: dict, prompt: int, before: int, peaks: dict[str, int]) -> None:
    memory, gib = plan(model, case, prompt, before), 2**30
    marks = {"sampling": "rollout", "teacher": "teacher", "update": "student"}
    marks["optimizer step"] = "step"
    pairs = {phase: (memory.phases[phase], peaks[mark]) for phase, mark in marks.items()}
    loading = peaks.pop(LOADING)
    pairs["peak"] = memory.peak, max(peaks.values())
    for phase, (planned, found) in pairs.items():
        line = {
            "case": case["name"],
            "phase": phase,
            "planned_gib": round(planned / gib, 3),
            "measured_gib": round(found / gib, 3),
            "process_gib": round(before / gib, 3),
            "loading_gib": round(loading / gib, 3),
            "planned_over_measured": round(planned / found, 3),
            "without_process": round((planned - before) / (found - before), 3),
            "prompt_tokens": prompt,
        }
        print("PLAN " + json.dumps(line), flush=True)


def run_case(name: str, model: Path | None, folder: Path) -> list[dict]:
    """Run a case in a process of its own."""
    case = CASES[name]
    kind = case.get("shapes", "llama")
    if model is None or kind != "llama":
        model = folder / kind
        if not model.exists():
            code = f"import plan, pathlib; plan.make_model({kind!r}, pathlib.Path({str(model)!r}))"
            here = str(Path(__file__).parent)
            subprocess.run([sys.executable, "-c", code], check=True, cwd=here, capture_output=True)
    described = json.dumps({"name": name, "model": str(model.resolve()), **case})
    environment = {**os.environ, **_RETURNED, _RANK: described, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    lines = [x.removeprefix("PLAN ") for x in done.stdout.splitlines() if x.startswith("PLAN ")]
    if done.returncode or not lines:
        raise RuntimeError(f"case {name!r} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in lines]


def _bound(given: argparse.Namespace) -> float:
    return float("inf") if given.tolerance is None else given.tolerance


def main() -> None:
    if _RANK in os.environ:
        case = json.loads(os.environ[_RANK])
        train(Path(case["model"]), case, Path.cwd())
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder for the llama cases")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="file for all lines")
    parser.add_argument("--tolerance", type=float, help="fail if a phase is further off, e.g. 0.1")
    given = parser.parse_args()
    lines: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.cases:
            found = run_case(name, given.model, Path(folder))
            lines += found
            for line in found:
                print(json.dumps(line), flush=True)
    off = [x for x in lines if abs(x["planned_over_measured"] - 1) > _bound(given)]
    wrong = [f"{x['case']} ({x['phase']})" for x in off]
    if given.out:
        given.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if wrong:
        sys.exit(f"further off than {given.tolerance}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
