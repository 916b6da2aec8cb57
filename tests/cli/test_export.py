"""`scsdpo export`: the folder holds the trained policy, and nothing else passes for it."""

import shutil
import sys
from datetime import datetime

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from models import qwen3_folder
from runs import ARGUMENTS
from scsdpo.__main__ import main as command
from scsdpo.checkpoints import Saved
from scsdpo.cli.export import export, load_weights, make_policy
from scsdpo.cli.model_card import model_card
from scsdpo.errors import ConfigurationError
from scsdpo.policy.adapter import STUDENT


def scsdpo(*args):
    """Exit code of the command, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scsdpo", *map(str, args)])
        return command()


def train(folder, root, *args):
    """The checkpoint of a run of three steps."""
    policy = [f"--model.policy.name_or_path={folder}", "--model.optimizer.lr=0.01"]
    assert scsdpo("fit", *ARGUMENTS, *policy, f"--trainer.default_root_dir={root}", *args) == 0
    return root / "checkpoints" / "last.ckpt"


LORA = ["--model.policy.adapter=Lora", "--model.policy.adapter.r=4"]


@pytest.fixture(scope="module")
def full(qwen3, tmp_path_factory):
    return train(qwen3, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(qwen3, tmp_path_factory):
    return train(qwen3, tmp_path_factory.mktemp("lora"), *LORA)


IDS = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def trained(ckpt, dtype=torch.float32):
    """Logits of a checkpoint, by Lightning's own way of loading it, and of its base."""
    from scsdpo.training import PolicyOptimizer

    module = PolicyOptimizer.load_from_checkpoint(ckpt)
    return logits(module.policy.language_model.to(dtype))


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_full_fine_tune_reloads_with_its_logits(full, qwen3, tmp_path):
    assert scsdpo("export", "--ckpt", full, "--out", tmp_path / "out") == 0
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.equal(exported, trained(full))
    assert not torch.allclose(exported, logits(base(qwen3)), atol=1e-3)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict")
def test_lora_is_merged_or_kept_with_its_logits(lora, qwen3, tmp_path):
    expected = trained(lora)
    assert not torch.allclose(expected, logits(base(qwen3)), atol=1e-3)
    export(lora, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # In float64, where what differs is the rounding of the merged weights alone: two float32
    # forwards with logits up to 7 may differ by more than that.
    exact = trained(lora, torch.float64)
    torch.testing.assert_close(logits(merged.double()), exact, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    export(lora, tmp_path / "kept", adapter=True)
    kept = PeftModel.from_pretrained(base(qwen3), tmp_path / "kept")
    assert torch.equal(logits(kept), expected)
    size = (tmp_path / "kept" / "adapter_model.safetensors").stat().st_size
    assert size < (tmp_path / "merged" / "model.safetensors").stat().st_size / 5
    assert kept.peft_config["default"].base_model_name_or_path == str(qwen3)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_folder_is_complete(adapter, lora, qwen3, tmp_path):
    export(lora, tmp_path / "out", adapter=adapter)
    tokenizer, original = map(AutoTokenizer.from_pretrained, (tmp_path / "out", qwen3))
    chat = [{"role": "user", "content": "Why?"}]
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.apply_chat_template(chat) == original.apply_chat_template(chat)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 0]


def test_the_model_card_holds_method_and_metrics(full, lora, qwen3, tmp_path):
    export(full, tmp_path / "full")
    export(lora, tmp_path / "lora", adapter=True)
    card = (tmp_path / "full" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "tags": ["scsdpo"],
        "pipeline_tag": "text-generation",
    }
    assert f"From {qwen3}, after 3 optimizer steps." in card
    assert "| teacher | EMA(rate=0.05, context=PlainPrompt()) |" in card
    metrics = Saved.read(full).metrics
    assert f"| mean@2 | {metrics['val/mean@2']:.4f} |" in card
    settings = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert settings["model"] == Saved.read(full).model
    assert "PeftModel.from_pretrained" in (tmp_path / "lora" / "README.md").read_text()


def test_the_model_card_says_how_the_template_was_filled(full):
    saved = Saved.read(full)
    saved.model["policy"]["init_args"]["chat_template_kwargs"] = {
        "strftime_now": "2026-01-31",
        "enable_thinking": False,
    }
    (line,) = [one for one in model_card(saved, adapter=False).split("\n") if "Trained with" in one]
    filled = line.removeprefix("# Trained with tokenizer.apply_chat_template(..., ").removesuffix(
        ")"
    )
    arguments = eval(f"dict({filled})", {"datetime": datetime})
    assert arguments.pop("strftime_now")("%d %b %Y") == "31 Jan 2026"
    assert arguments == {"enable_thinking": False}


def test_weights_are_written_in_the_dtype_that_training_started_from(tmp_path):
    folder = qwen3_folder(tmp_path / "base", dtype=torch.bfloat16)
    ckpt = train(folder, tmp_path / "run")
    assert Saved.read(ckpt).weights["policy.model.model.norm.weight"].dtype == torch.float32
    export(ckpt, tmp_path / "auto")
    export(ckpt, tmp_path / "exact", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "auto").dtype == torch.bfloat16
    exact = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    assert torch.equal(logits(exact), trained(ckpt))


def test_a_tied_and_an_untied_head_come_back_as_they_were(full, qwen3_untied, tmp_path):
    export(full, tmp_path / "tied")
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    ckpt = train(qwen3_untied, tmp_path / "run")
    export(ckpt, tmp_path / "untied")
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    assert torch.equal(logits(untied), trained(ckpt))


def test_factors_of_a_lora_teacher_are_left_out(lora):
    saved = Saved.read(lora)
    assert any(".teacher." in key for key in saved.weights)
    policy = make_policy(saved)
    load_weights(policy, saved)
    names = [name for name, _ in policy.named_parameters() if "lora_" in name]
    assert names
    assert all(STUDENT in name.split(".") for name in names)


def refusal(capsys, *args):
    capsys.readouterr()
    assert scsdpo("export", *args) == 2
    return capsys.readouterr().err.removeprefix("scsdpo: error: ").rstrip("\n")


def test_bad_arguments_are_one_line(full, tmp_path, capsys):
    out = tmp_path / "out"
    assert refusal(capsys, "--out", out) == "the following arguments are required: --ckpt"
    assert refusal(capsys, "--ckpt", out, "--out", out) == f"--ckpt: {out} does not exist"
    assert refusal(capsys, "--ckpt", tmp_path, "--out", out) == f"--ckpt: {tmp_path} is a folder"
    assert refusal(capsys, "--ckpt", full, "--out", full.parent) == (
        f"--out: {full.parent} is not empty; choose a new folder"
    )
    assert refusal(capsys, "--ckpt", full, "--out", out, "--adapter") == (
        "--adapter: this policy has no adapter, because all its weights were trained: leave "
        "--adapter out"
    )
    (tmp_path / "notes.ckpt").write_text("hello")
    assert refusal(capsys, "--ckpt", tmp_path / "notes.ckpt", "--out", out) == (
        f"--ckpt: {tmp_path / 'notes.ckpt'} is not a checkpoint of `scsdpo fit`"
    )
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    (sharded / "meta.pt").touch()
    assert "is incomplete" in refusal(capsys, "--ckpt", sharded, "--out", out)
    assert not out.exists()


def altered(ckpt, path, change):
    content = torch.load(ckpt, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("policy.model.model.norm.weight"),
        lambda state: state.update({"policy.model.more": torch.zeros(1)}),
        lambda state: state.update({"policy.model.model.norm.weight": torch.zeros(1)}),
    ],
    ids=["missing", "left over", "another shape"],
)
def test_weights_that_do_not_fit_are_refused(change, full, tmp_path):
    ckpt = altered(full, tmp_path / "odd.ckpt", change)
    with pytest.raises(ConfigurationError, match=r"^--ckpt: 1 tensors of .* do not fit"):
        export(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_is_named(tmp_path):
    folder = qwen3_folder(tmp_path / "base")
    ckpt = train(folder, tmp_path / "run", *LORA)
    shutil.rmtree(folder)
    with pytest.raises(ConfigurationError, match=r"^model\.policy of the checkpoint: `CausalLM"):
        export(ckpt, tmp_path / "out")


def test_a_checkpoint_of_weights_alone_is_enough(qwen3, tmp_path):
    ckpt = train(qwen3, tmp_path / "run", "--checkpoint.save_weights_only=true")
    export(ckpt, tmp_path / "out")
    assert "Not measured." in (tmp_path / "out" / "README.md").read_text()
