"""The benchmark for GPUs, run here with small shapes: what it measures is real, and it ends."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from batches import ALL, METHODS, parts
from scsdpo.policy import CausalLM, Lora
from scsdpo.training.step import OptimizerSteps

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
from work_order import forward_flops, minimal_flops

MEASURED = [name for name, part in gpu.PARTS.items() if part.size]


def measured(name, capsys):
    gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", "--one", name])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loggers and workers
@pytest.mark.parametrize("name", MEASURED)
def test_every_part_trains_and_samples_as_lightning_would(name, capsys, monkeypatch):
    part = gpu.tiny(gpu.PARTS[name])
    if why := gpu.lacks(part):
        assert measured(name, capsys) == [{"skipped": why}]
        return
    learn, seen = OptimizerSteps.learn, []

    def watched(self, host, policy, batch):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
        before = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
        learn(self, host, policy, batch)
        after = [p for p in policy.parameters() if p.requires_grad]
        moved = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        flags = [getattr(m, "gradient_checkpointing", False) for m in policy.modules()]
        seen.append((moved, any(flags)))

    monkeypatch.setattr(OptimizerSteps, "learn", watched)
    update, *rollout = measured(name, capsys)
    assert seen == [(True, part.checkpointing)] * 3  # to warm up, to time, to profile
    assert update["measured"] == "update" and update["update_s"] > 0
    assert update["trained_tokens"] == update["trained_rows"] * part.tokens
    assert 0 < update["trained_rows"] <= part.questions * part.rollouts
    assert math.isclose(update["of_790"] * 790, update["of_989"] * 989)
    assert (update["of_989_as_trained"] > update["of_989"]) == (part.lora > 0)
    assert update["trained_tokens_per_s"] * update["update_s"] == pytest.approx(
        update["trained_tokens"]
    )
    assert bool(rollout) == bool(part.sampled)
    for line in rollout:
        assert line["rollout_tokens_per_s"] > 0 and line["rollout_rows"] == 4


def test_the_ceilings_name_machine_and_versions(capsys):
    (line,) = measured("ceilings", capsys)
    assert line["torch"] == torch.__version__ and line["device"] == "cpu" and line["commit"]
    assert line["bf16_tflops"] > 0 and line["copy_tb_s"] > 0 and line["launch_us"] > 0


@pytest.mark.parametrize("adapter", [None, Lora(r=1)], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sc-sdpo", "grpo"])
def test_useful_operations_are_those_of_the_products_that_an_update_runs(adapter, method, qwen3):
    """With weights, as torch counts them."""
    policy = CausalLM(str(qwen3), **({"adapter": adapter} if adapter else {}))
    policy.configure_model()
    advantage, rest = METHODS[method]()
    batch, update = parts(policy, advantage, **rest)
    with FlopCounterMode(display=False) as counter:
        for output, _ in update.losses(policy, batch, ALL, 10**6):
            output.loss.backward()
    found = counter.get_flop_counts()["Global"]
    run = found[torch.ops.aten.mm] + found.get(torch.ops.aten.addmm, 0)
    student = forward_flops(policy, batch, batch.student_prompts(), batch.active)
    attention = 3 * student.attention
    if method == "sc-sdpo":
        told = [ids for group in batch.teacher.ids for ids in group]
        attention += forward_flops(policy, batch, told, batch.active).attention
    useful = minimal_flops(policy, batch) - attention
    if adapter is None:
        assert run == useful
    else:  # factors are more; the first layer's inputs need no gradient where nothing is below
        assert 0.9 < run / useful < 1.1
    as_trained = minimal_flops(policy, batch, as_trained=True) - minimal_flops(policy, batch)
    assert as_trained == (student.layers + student.head if adapter else 0)


def row(key, count, device=DeviceType.CPU, microseconds=0.0, note=False):
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=device,
        self_device_time_total=microseconds,
        is_user_annotation=note,
    )


def test_a_profile_counts_each_kernel_once():
    rows = [
        row("aten::mm", 4, microseconds=300.0),  # the operator of the kernel below
        row("gemm", 4, DeviceType.CUDA, 300.0),
        row("Memcpy HtoD", 1, DeviceType.CUDA, 100.0),
        row("a phase", 1, DeviceType.CUDA, 900.0, note=True),
        row("cudaLaunchKernel", 4),
        row("cudaLaunchKernelExC", 2),
        row("cudaStreamSynchronize", 3),
        row("cudaDeviceSynchronize", 2),
    ]
    found = gpu.Profile.of(rows, seconds=1e-3)
    assert math.isclose(found.busy, 0.4)
    assert (found.kernels, found.waits) == (6, 3)
    assert [name for name, *_ in found.longest] == ["gemm", "Memcpy HtoD"]


CHILD = """
import json, sys, time
name = sys.argv[-1]
print(json.dumps({"measured": "update", "update_s": 0.5, "of_989": 0.3}), flush=True)
if name == "8b-lora":
    time.sleep(60)
if name == "4b-lora":
    sys.exit("no memory left")
"""


def test_a_part_that_hangs_or_fails_costs_its_own_figures_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "8b-lora", gpu.Part(limit=1, size="8B", sampled=8))
    out = tmp_path / "lines.jsonl"
    names = ["8b-lora", "4b-lora", "0.6b-full"]
    run = gpu.Run(command=(sys.executable, "-c", CHILD), seconds=600, out=out)
    lines = run.lines(names)
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    said = [(line["part"], next(k for k in line if k != "part")) for line in lines]
    hung, failed, fine = ([key for part, key in said if part == name] for name in names)
    assert hung == failed == ["measured", "failed", "took_s"] and fine == ["measured", "took_s"]
    words = [line["failed"] for line in lines if "failed" in line]
    assert words == ["took more than 1 s", "no memory left"]
    said, _, _, _, shown, *_ = gpu.table(lines, names).splitlines()
    assert said == "machine and versions: not run"
    assert shown.startswith("| 8b-lora | 0.500 | not run | not run | not run | 30.0%")
    assert shown.endswith("not run | not run | not run |")


def test_parts_for_which_no_time_is_left_are_named(tmp_path, capsys):
    run = gpu.Run(command=("false",), seconds=0, out=None)
    lines = run.lines(["8b-lora"])
    assert lines == [{"part": "8b-lora", "skipped": "no time left"}]
    assert json.loads(capsys.readouterr().out) == lines[0]


def test_without_a_gpu_it_says_what_to_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU: --device cpu --tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_all_parts_fit_into_ten_minutes():
    assert sum(part.limit for part in gpu.PARTS.values()) <= 660  # most take less
