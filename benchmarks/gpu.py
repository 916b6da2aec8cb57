"""Training steps and rollouts at Qwen3's shapes on one GPU: seconds, useful operations, memory.

    python benchmarks/gpu.py [--parts 0.6b-full ...] [--seconds 600] [--repeats 3] [--out FILE]
    python benchmarks/gpu.py --device cpu --tiny

Weights are random and made on the device; nothing is downloaded. Each part is a process of its own
with a time limit, and all of them together end within `--seconds`: what there was no time for is
said. JSON lines come as they are measured, and go to FILE too; a table for docs/benchmarks.md
follows. `--tiny` takes the same way with small shapes: it shows that each part runs, and measures
nothing.

An update runs as `scsdpo fit` runs it: `PolicyOptimizer` in Lightning's trainer under bf16-mixed,
which casts weights anew in each forward, with a fused AdamW. Its responses are made up, all of the
full length, and half of those to a question pass. The first step warms up, the median of the next
ones counts, and the last one is profiled. Useful operations are those of the rows that run, each
distinct token once (`work_order.minimal_flops`): what is computed again, and products with
FlashAttention's blocks that are hidden, count as nothing. `as_trained` counts frozen weights as if
they were trained (6 N a token), as benchmarks of other systems do. Rollouts are `HFRollout`'s.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config
from work_order import Order, minimal_flops, now, random_rollouts

from scsdpo.advantage import Batch, GroupRelative, SelfDistillation
from scsdpo.data import Source, TaskDataModule
from scsdpo.policy import NF4, TINY_FOLDER, CausalLM, FullFineTune, Lora, Unquantized
from scsdpo.rollout import HFRollout, Rollout
from scsdpo.teacher import EMA, NoTeacher
from scsdpo.training import Limits, PolicyOptimizer
from scsdpo.training.step import OptimizerSteps
from scsdpo.types import Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import Verification, Verifier

ROOT = Path(__file__).resolve().parents[1]
MEASURED, SHEET = 790e12, 989e12
"""bf16 products a second: of an 8,192-square product on one H200 (2026-11-28), and by the data
sheet of H100 and H200 SXM."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a Qwen3 model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936


SHAPES = {
    "0.6B": Shape(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "4B": Shape(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=True,
    ),
    "8B": Shape(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The measurement of one process."""

    limit: int
    """Seconds that it may take."""
    size: str = ""
    """Name in `SHAPES`; empty: the device alone."""
    lora: int = 0
    """Rank; 0: every parameter is trained."""
    in_4_bits: bool = False
    checkpointing: bool = False
    questions: int = 8
    rollouts: int = 8
    tokens: int = 512
    """Number of tokens of each response."""
    prompt_words: int = 170
    max_tokens: int = 0
    """`limits.max_tokens`; 0: auto."""
    teacher: bool = True
    """SDPO with an EMA teacher; otherwise GRPO."""
    sampled: int = 0
    """Tokens of each response of the rollout; 0: there is none."""


PARTS = {
    "ceilings": Part(limit=40),
    "0.6b-full": Part(limit=90, size="0.6B", sampled=256),
    "4b-lora-16k": Part(
        limit=100,
        size="4B",
        lora=16,
        checkpointing=True,
        questions=1,
        rollouts=2,
        tokens=16384,
        max_tokens=16384,
        teacher=False,
    ),
    "8b-lora": Part(limit=130, size="8B", lora=32, checkpointing=True, sampled=256),
    "8b-qlora": Part(
        limit=140, size="8B", lora=32, in_4_bits=True, checkpointing=True, sampled=128
    ),
    "0.6b-full-checkpointing": Part(limit=60, size="0.6B", checkpointing=True),
    "4b-lora": Part(limit=90, size="4B", lora=16, checkpointing=True, tokens=256),
}
"""The most telling ones first. 4b-lora-16k is prime-rl's order of work: two sequences of 16,384
tokens, each a micro-batch of its own, without a teacher. 4b-lora trains on as many tokens."""


def tiny(part: Part) -> Part:
    """The part with a few tokens."""
    return replace(
        part,
        questions=min(part.questions, 2),
        rollouts=2,
        tokens=8,
        prompt_words=4,
        max_tokens=16 if part.max_tokens else 0,
        sampled=min(part.sampled, 4),
    )


TINY = Shape(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    tie_word_embeddings=True,
    vocab_size=800,
)


# ------------------------------------------------------------------------------------ the device


def ceilings(device: str) -> dict[str, float]:
    """Rates that the device reaches: products, copies, and launches from Python."""
    size = 8192 if device == "cuda" else 256
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = 2 * size**3 / median_seconds(partial(torch.mm, a, b)) / 1e12
    table = torch.randn(16 * size**2, device=device)
    other = torch.empty_like(table)
    found["copy_tb_s"] = 2 * table.nbytes / median_seconds(lambda: other.copy_(table)) / 1e12
    one = torch.zeros(1, device=device)
    found["launch_us"] = median_seconds(lambda: [one.add_(1) for _ in range(1000)]) * 1e3
    return found


def median_seconds(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of `work`, once it has run, with all that it queued on the GPU."""
    seconds = []
    for _ in range(times + 1):
        start = now()
        work()
        seconds.append(now() - start)
    return statistics.median(seconds[1:])


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profile of some work on a GPU."""

    busy: float
    """Share of the time in which a kernel or a copy ran."""
    kernels: int
    """Launches."""
    waits: int
    """The host's waits for the stream or an event in it."""
    longest: list[tuple[str, float, int]]
    """The kernels that took most: milliseconds and calls."""

    @staticmethod
    def of(rows: Sequence[Any], seconds: float) -> "Profile":
        """Read a profiler's averages by name: operators name their kernels' time once more."""
        of_device = [row for row in rows if row.device_type is DeviceType.CUDA]
        on_device = [row for row in of_device if not row.is_user_annotation]
        on_device.sort(key=lambda row: -row.self_device_time_total)
        return Profile(
            busy=sum(row.self_device_time_total for row in on_device) / 1e6 / seconds,
            kernels=sum(row.count for row in rows if "LaunchKernel" in row.key),
            waits=sum(row.count for row in rows if row.key in WAITS),
            longest=[
                (row.key[:80], round(row.self_device_time_total / 1e3, 1), row.count)
                for row in on_device[:10]
            ],
        )


WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls in which the host waits; the one for the whole device is this script's own."""


def profiled(work: Callable[[], object], device: str) -> Profile | None:
    """Do the work once, watched; None: there is no GPU to watch."""
    if device != "cuda":
        work()
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        start = now()
        work()
        seconds = now() - start
    return Profile.of(watched.key_averages(), seconds)


def peak_gib(device: str) -> float | None:
    """Allocated at the most since `reset_peak`."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------------------------------------------- the model


def write_folder(shape: Shape, folder: Path) -> None:
    """A checkpoint without weights: the shape, and the shipped policy's tokenizer."""
    for path in Path(TINY_FOLDER).glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            copyfile(path, folder / path.name)
    (folder / "model.safetensors").touch()
    Qwen3Config(
        **asdict(shape),
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    ).save_pretrained(folder)


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """`from_pretrained` makes weights where they will be, from the config alone."""

    def make(path: str, *, output_loading_info: bool, **settings: Any) -> Any:
        assert output_loading_info
        in_4_bits = settings.pop("quantization_config", None)
        settings.pop("device_map", None)
        config = AutoConfig.from_pretrained(path)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, **settings).eval()
        if in_4_bits is not None:
            quantize(model, in_4_bits)
        return model, {"missing_keys": set()}

    with patch.object(AutoModelForCausalLM, "from_pretrained", make):
        yield


def quantize(model: Any, config: Any) -> None:
    """Linear layers but the head in 4 bits, in place; as transformers leaves them."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.integrations import replace_with_bnb_linear

    plain = {name: m.weight for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    replace_with_bnb_linear(model, [head], config)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = plain.pop(name)
            kept = ("quant_type", "compress_statistics", "module")
            settings = {key: getattr(layer.weight, key) for key in kept}
            made = Params4bit(weight.detach(), requires_grad=False, **settings)
            layer.weight = made.to(weight.device)  # where it goes it is quantised
    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = config


def make_policy(part: Part, shape: Shape, folder: Path) -> CausalLM:
    """Without weights: the trainer asks for them."""
    write_folder(shape, folder)
    return CausalLM(
        str(folder),
        adapter=Lora(r=part.lora, lora_alpha=2 * part.lora) if part.lora else FullFineTune(),
        quantization=NF4() if part.in_4_bits else Unquantized(),
        gradient_checkpointing=part.checkpointing,
        self_check=False,
    )


def lacks(part: Part) -> str:
    """The missing requirement of a part; empty: none."""
    if part.in_4_bits and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return ""


# --------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class Says(Verifier):
    """A response passes if it ends with the word."""

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        return Verdict(reward=float(response.endswith(" right")))


class Questions(Source):
    """Made-up ones of about as many tokens as words.

    Args:
        words: of each.
    """

    name = "questions"

    def __init__(self, words: int) -> None:
        self.words = words

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Prompt:
        content = f"{index}: " + "what " * self.words
        messages = ({"role": "user", "content": content},)
        return Prompt(key=str(index), messages=messages, verifier=Says(), answer="")


@dataclass(frozen=True)
class MadeUp(Rollout):
    """Responses of random tokens, all of the full length; every other one to a question passes."""

    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        order = Order(questions=len(prompts), rollouts=sampling.n, tokens=sampling.max_new_tokens)
        made = random_rollouts(policy, list(prompts), order, seed=int(prompts[0].key))
        texts = tuple(
            tuple(f"{text} {'wrong' if g % 2 else 'right'}" for g, text in enumerate(group))
            for group in made.texts
        )
        # No sampler, and so no gap between it and the trainer.
        unknown = torch.full_like(made.policy_logprobs, torch.nan)
        return replace(made, texts=texts, policy_logprobs=unknown)


def made_up_module(part: Part, policy: CausalLM) -> tuple[PolicyOptimizer, TaskDataModule]:
    """SDPO (top-100 + tail JSD, an EMA teacher) or GRPO, and its questions."""
    sdpo = {"advantage": SelfDistillation(), "teacher": EMA()}
    grpo = {"advantage": GroupRelative(), "teacher": NoTeacher()}
    module = PolicyOptimizer(
        policy,
        **(sdpo if part.teacher else grpo),
        rollout=MadeUp(),
        sampling=Sampling(n=part.rollouts, max_new_tokens=part.tokens),
        val_sampling=Sampling(n=1, max_new_tokens=1),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.01, fused=True),
        verification=Verification(workers=0),  # a word is no work to hand out
        limits=Limits(max_tokens=part.max_tokens or "auto"),
    )
    source = Questions(part.prompt_words)
    data = TaskDataModule(
        source, source, questions_per_batch=part.questions, val_questions_per_batch=1
    )
    return module, data


# ------------------------------------------------------------------------------------ the update


Say = Callable[[dict[str, Any]], None]
"""Takes a line as soon as it is measured."""


class Watch(L.Callback):
    """Measures each `OptimizerSteps.learn`, which is the update of one batch, and then the rollout.

    Args:
        part: what is measured.
        device: cpu or cuda.
        steps: how many there will be: the first warms up, the last is profiled.
        say: takes the lines.
    """

    def __init__(self, part: Part, device: str, steps: int, say: Say) -> None:
        self.part, self.device, self.steps, self.say = part, device, steps, say
        self.seconds: list[float] = []
        self.figures: dict[str, Any] = {}
        self.micro_batches = 0

    def on_before_backward(self, *args: Any) -> None:
        """The figures of a micro-batch."""
        self.micro_batches += 1

    def learn(self, plain: Callable[..., None], host: Any, policy: CausalLM, batch: Batch) -> None:
        """Stand in for `OptimizerSteps.learn`, bound to its object."""
        step, work = len(self.seconds), partial(plain, host, policy, batch)
        self.micro_batches = 0
        if step == 1:
            reset_peak(self.device)
        if step == self.steps - 1:
            self.figures["peak_gib"] = peak_gib(self.device)
            watched = profiled(work, self.device)
            self.figures |= asdict(watched) if watched else {}
            self.figures |= operations(policy, batch)
            return
        start = now()
        work()
        self.seconds.append(now() - start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Optimizer and teacher are still there, as beside any rollout."""
        if len(self.seconds) != self.steps - 1:
            raise RuntimeError(f"{len(self.seconds)} of {self.steps - 1} updates ran")
        self.say({"measured": "update", **self._update()})
        if self.part.sampled:
            line = measure_rollout(self.part, pl_module.policy, self.device)
            self.say({"measured": "rollout", **line})

    def _update(self) -> dict[str, Any]:
        seconds, figures = statistics.median(self.seconds[1:]), self.figures
        useful, as_trained = (
            figures[key] * 1e12 / seconds for key in ("useful_tflop", "as_trained_tflop")
        )
        return {
            "update_s": seconds,
            "all_s": [round(s, 4) for s in self.seconds],
            "trained_tokens_per_s": figures["trained_tokens"] / seconds,
            "useful_tflops_s": useful / 1e12,
            "of_790": useful / MEASURED,
            "of_989": useful / SHEET,
            "of_989_as_trained": as_trained / SHEET,
            "micro_batches": self.micro_batches,
            **figures,
        }


def operations(policy: CausalLM, batch: Batch) -> dict[str, Any]:
    """Useful ones of an update, and the tokens that it trains on."""
    told = [len(ids) for slot in batch.contexts.values() for group in slot.ids for ids in group]
    return {
        "useful_tflop": minimal_flops(policy, batch) / 1e12,
        "as_trained_tflop": minimal_flops(policy, batch, as_trained=True) / 1e12,
        "trained_tokens": int(batch.sampled[batch.active].sum()),
        "trained_rows": int(batch.active.sum()),
        "prompt_tokens": max(len(ids) for ids in batch.student_prompts()),
        "teacher_prompt_tokens": max(told, default=0),
    }


def train(part: Part, policy: CausalLM, watch: Watch, folder: Path) -> None:
    """Run a batch as `scsdpo fit` does."""
    module, data = made_up_module(part, policy)
    trainer = L.Trainer(
        accelerator="gpu" if watch.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=watch.steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    plain = OptimizerSteps.learn

    def learn(self: OptimizerSteps, *args: Any) -> None:
        watch.learn(partial(plain, self), *args)

    with patch.object(OptimizerSteps, "learn", learn):
        trainer.fit(module, data)


# ----------------------------------------------------------------------------------- the rollout


def measure_rollout(part: Part, policy: CausalLM, device: str) -> dict[str, Any]:
    """`HFRollout`, as a step samples: all responses in flight, of equal length."""
    asked = [Questions(part.prompt_words)[i] for i in range(part.questions)]
    prompts = [replace(each, ids=policy.chat.render(each.messages)) for each in asked]
    rows = part.questions * part.rollouts

    def sample(tokens: int) -> Any:
        sampling = Sampling(n=part.rollouts, max_new_tokens=tokens, seed=0)
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):  # as Lightning
            return HFRollout().sample(policy, prompts, sampling)

    sample(2)
    reset_peak(device)
    start = now()
    drawn = int(sample(part.sampled).sampled.sum())
    seconds, peak = now() - start, peak_gib(device)
    few, more = (profiled(partial(sample, tokens), device) for tokens in (4, 12))
    return {
        "rollout_s": seconds,
        "rollout_rows": rows,
        "rollout_tokens_per_s": drawn / seconds,
        "ms_a_step": seconds / part.sampled * 1e3,
        "peak_gib": peak,
        "busy": more and more.busy,
        "kernels_a_step": more and few and (more.kernels - few.kernels) / 8,
        "waits_a_step": more and few and (more.waits - few.waits) / 8,
    }


# ------------------------------------------------------------------------------------- the parts


def measure(name: str, device: str, repeats: int, say: Say, *, is_tiny: bool) -> None:
    """One part."""
    part = tiny(PARTS[name]) if is_tiny else PARTS[name]
    if not part.size:
        say({**versions(device), **ceilings(device)})
        return
    if missing := lacks(part):
        say({"skipped": missing})
        return
    shape = SHAPES[part.size]
    if is_tiny:
        shape = replace(TINY, tie_word_embeddings=shape.tie_word_embeddings)
    with tempfile.TemporaryDirectory() as folder, random_weights(device):
        path = Path(folder)
        (path / "model").mkdir()
        policy = make_policy(part, shape, path / "model")
        train(part, policy, Watch(part, device, repeats + 2, say), path)


def versions(device: str) -> dict[str, str]:
    """Describe what is measured, and on what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


@dataclass(frozen=True, kw_only=True)
class Run:
    """All parts, one process after the other.

    Args:
        command: of a part, but for its name.
        seconds: for all of them.
        out: where lines go, beside stdout; None: nowhere.
    """

    command: tuple[str, ...]
    seconds: float
    out: Path | None

    def lines(self, names: list[str]) -> list[dict[str, Any]]:
        """Lines of each part, or the reason why it has none."""
        end, found = time.monotonic() + self.seconds, []
        for name in names:
            left = end - time.monotonic()
            for line in self._part(name, left):
                line = {"part": name, **line}
                found.append(line)
                self._say(line)
        return found

    def _part(self, name: str, left: float) -> Iterator[dict[str, Any]]:
        limit = min(PARTS[name].limit, left)
        if limit < min(PARTS[name].limit, 30):
            yield {"skipped": "no time left"}
            return
        start = time.monotonic()
        process = subprocess.Popen(
            [*self.command, "--one", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        failed = ""
        try:
            out, err = process.communicate(timeout=limit)
            if process.returncode:
                failed = err.strip()[-600:] or f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, _ = process.communicate()
            failed = f"took more than {limit:.0f} s"
        yield from (json.loads(line) for line in out.splitlines() if line.startswith("{"))
        if failed:
            yield {"failed": failed}
        yield {"took_s": round(time.monotonic() - start, 1)}

    def _say(self, line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text + "\n")


COLUMNS = {
    "update, s": ("update", "update_s", "{:.3f}"),
    "trained tokens/s": ("update", "trained_tokens_per_s", "{:,.0f}"),
    "useful TFLOP/s": ("update", "useful_tflops_s", "{:.0f}"),
    "of 790": ("update", "of_790", "{:.1%}"),
    "of 989": ("update", "of_989", "{:.1%}"),
    "of 989, as trained": ("update", "of_989_as_trained", "{:.1%}"),
    "device busy": ("update", "busy", "{:.0%}"),
    "waits": ("update", "waits", "{}"),
    "GiB": ("update", "peak_gib", "{:.1f}"),
    "rollout, tokens/s": ("rollout", "rollout_tokens_per_s", "{:,.0f}"),
    "ms a step": ("rollout", "ms_a_step", "{:.1f}"),
    "GiB of rollout": ("rollout", "peak_gib", "{:.1f}"),
}
"""A cell of the table: which line has the figure, its name there, and how it is written."""


def table(lines: list[dict[str, Any]], names: list[str]) -> str:
    """Markdown, with machine and versions; a figure that is not there was not run."""
    machine = next((line for line in lines if "device" in line), {})
    keys = ("device", "torch", "transformers", "commit") if machine else ()
    said = ", ".join(f"{key} {machine[key]}" for key in keys) or "machine and versions: not run"
    rows = [["part", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name in [name for name in names if PARTS[name].size]:
        row = [name]
        for kind, key, form in COLUMNS.values():
            mine = [x for x in lines if x["part"] == name and x.get("measured") == kind]
            figure = mine[0].get(key) if mine else None
            wanted = kind == "update" or PARTS[name].sampled
            row.append(form.format(figure) if figure is not None else "not run" if wanted else "")
        rows.append(row)
    return "\n".join([said, "", *(f"| {' | '.join(row)} |" for row in rows)])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=3, help="updates that are timed")
    parser.add_argument("--seconds", type=float, default=600, help="for all parts together")
    parser.add_argument("--out", type=Path, help="a file that lines are added to")
    parser.add_argument("--one", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --tiny shows that each part runs")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: the shapes are those of a GPU")
    if args.one:
        out = sys.stdout
        with redirect_stdout(sys.stderr):  # a run's own lines
            say = lambda line: print(json.dumps(line), file=out, flush=True)  # noqa: E731
            measure(args.one, args.device, args.repeats, say, is_tiny=args.tiny)
        return
    own = [sys.executable, "-W", "ignore", __file__, f"--device={args.device}"]
    own += [f"--repeats={args.repeats}", *(["--tiny"] if args.tiny else [])]
    run = Run(command=tuple(own), seconds=args.seconds, out=args.out)
    lines = run.lines(args.parts)
    print(table(lines, args.parts))


if __name__ == "__main__":
    main()
