"""A teacher that is another model: its numbers, its vocabulary, where it lies and what it costs."""

import json
import shutil

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.olmo3 import modeling_olmo3
from transformers.models.qwen3 import modeling_qwen3

import scsdpo
from batches import G, Q, double_policy, exact_norm, gradient, parts
from models import TOKENS, larger_folder, olmo3_folder
from oracle import divergence
from runs import Toys, data, module, trainer, weights
from scsdpo.advantage import Blend, Divergence, Full, ReferenceAnchor, SelfDistillation, Weighted
from scsdpo.errors import ConfigurationError
from scsdpo.planning import memory_of
from scsdpo.policy import Lora
from scsdpo.policy.adapter import leave_out_of_ddp
from scsdpo.reduction import SequenceMean
from scsdpo.teacher import EMA, External, GoldSolution, PlainPrompt
from scsdpo.weighting import TeacherEntropy
from test_configs import CONFIGS
from test_configs import scsdpo as command  # noqa: F401 - a fixture
from test_planning import planned

FULL = {"support": Full()}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    return larger_folder(tmp_path_factory.mktemp("larger"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, larger):
    """Sizes, architectures, ties, and rows of the head."""
    root = tmp_path_factory.mktemp("teachers")
    return {
        "larger": larger,
        "tied, more rows": larger_folder(root / "rows", tie=True, vocab=TOKENS + 16),
        "windows, more rows": olmo3_folder(root / "olmo3", vocab=TOKENS + 9),
    }


@pytest.fixture
def exact(monkeypatch):
    for norm in (modeling_qwen3.Qwen3RMSNorm, modeling_olmo3.Olmo3RMSNorm):
        monkeypatch.setattr(norm, "forward", exact_norm)


def log_probs(model, prompt, response, temperature, vocabulary):
    """[n, V] after a prompt, by transformers alone."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return (logits[:, :vocabulary] / temperature).log_softmax(-1)


def enumerated(student, teacher, judged, contexts, alpha):
    """Mean over rollouts of each one's mean divergence; one without a context or token counts 0."""
    total = torch.zeros((), dtype=torch.float64)
    rollouts, vocabulary = judged.responses, student.config.vocab_size
    for q, prompt in enumerate(judged.prompts):
        for g in range(G):
            response = rollouts.ids[q, g][rollouts.sampled[q, g]].tolist()
            told = contexts.ids[q][g]
            if response and told:
                pair = (
                    log_probs(model, ids, response, rollouts.temperature, vocabulary)
                    for model, ids in ((student, prompt.ids), (teacher, told))
                )
                total = total + divergence(alpha, *pair).mean() / (Q * G)
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["larger", "tied, more rows", "windows, more rows"])
def test_loss_and_gradient_are_autograds_of_two_transformers_models(
    qwen3, teachers, exact, name, alpha
):
    policy = double_policy(qwen3)
    teacher = External(str(teachers[name]))
    advantage = SelfDistillation(divergence=Divergence(alpha=alpha), **FULL)
    batch, update = parts(policy, advantage, teacher=teacher, reduction=SequenceMean(over="all"))
    teacher.double()
    loss, ours, count = gradient(policy, batch, update, budget=60)
    assert count > 1
    student, other = (
        AutoModelForCausalLM.from_pretrained(folder).double() for folder in (qwen3, teachers[name])
    )
    expected = enumerated(student, other.requires_grad_(False), batch.judged, batch.teacher, alpha)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for key, value in student.named_parameters():
        torch.testing.assert_close(ours[f"model.{key}"], value.grad, rtol=1e-9, atol=1e-11)


def test_a_lora_student_learns_the_same_from_it(qwen3, larger, exact):
    """With B = 0 the student is its base: the loss is the full fine-tune's, the gradient A's."""
    settings = {"reduction": SequenceMean(over="all")}
    losses = []
    for adapter in ({}, {"adapter": Lora(r=2)}):
        policy, teacher = double_policy(qwen3, **adapter), External(str(larger))
        batch, update = parts(policy, SelfDistillation(**FULL), teacher=teacher, **settings)
        teacher.double()
        loss, ours, _ = gradient(policy, batch, update, budget=60)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert ours and all("lora_" in name for name in ours)


def with_anchor(folder, again):
    """Distillation from a model, and an anchor to what `again` names."""
    advantage = Blend(
        parts=(
            Weighted(advantage=SelfDistillation(**FULL), weight=1.0),
            Weighted(advantage=ReferenceAnchor(), weight=0.5),
        )
    )
    return {
        "advantage": advantage,
        "teacher": External(str(folder)),
        "reference": External(str(again)),
    }


def test_two_slots_of_one_folder_share_a_copy_and_a_forward(qwen3, larger, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(larger)
    tokens, found = [], []
    for again in (link, shutil.copytree(larger, tmp_path / "another")):
        model = module(qwen3, **with_anchor(larger, again))
        model.configure_model()
        copies = {id(each.weights) for each in (model.teacher, model.reference)}
        found.append(len(copies))
        read = []
        for each in {id(t.weights): t.weights for t in (model.teacher, model.reference)}.values():
            each.copy.get_decoder().register_forward_hook(
                lambda m, given, out, read=read: read.append(out.last_hidden_state.shape[1])
            )
        model.policy.double(), model.teacher.double(), model.reference.double()
        batch, update = parts(
            model.policy, model.advantage, teacher=model.teacher, reference=model.reference
        )
        loss, *_ = gradient(model.policy, batch, update)
        tokens.append((sum(read), loss))
    assert found == [1, 2]
    assert tokens[1][0] == 2 * tokens[0][0] > 0
    assert tokens[1][1] == pytest.approx(tokens[0][1], rel=1e-12)


@pytest.mark.parametrize("on_host", [False, True])
def test_it_runs_in_its_own_dtype_wherever_it_lies(policy, larger, on_host):
    ids = torch.arange(2, 22).view(2, 10)
    teacher = External(str(larger), dtype="bfloat16", on_host=on_host)
    teacher.configure(policy, "teacher")
    teacher.to("cpu")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters())
    own = AutoModelForCausalLM.from_pretrained(larger, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(
            policy.run(teacher.weights, lambda model: model(ids).logits), own(ids).logits
        )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_its_attention_is_its_own(qwen3, larger, exact, attention):
    """Rows that share nothing give what shared prefixes give."""
    losses = []
    for own in ("sdpa", attention):
        policy = double_policy(qwen3)
        teacher = External(str(larger), attn_implementation=own)
        batch, update = parts(policy, SelfDistillation(**FULL), teacher=teacher)
        teacher.double()
        losses.append(gradient(policy, batch, update, budget=60)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)  # `eager` takes softmax in float32


def test_a_measured_teacher_and_a_context_work_as_with_other_teachers(qwen3, larger, tmp_path):
    model = module(
        qwen3,
        teacher=External(str(larger), context=GoldSolution()),
        token_weighting=TeacherEntropy(),
    )
    model.configure_model()
    batch, update = parts(
        model.policy,
        SelfDistillation(),
        teacher=External(str(larger)),
        token_weighting=TeacherEntropy(),
    )
    loss, ours, _ = gradient(model.policy, batch, update)
    assert loss > 0 and ours


# --------------------------------------------------------------------------------- vocabulary


def renamed(folder, change):
    """The folder with its tokenizer's file changed."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap(content):
    table = content["model"]["vocab"]
    table["a"], table["b"] = table["b"], table["a"]


def add(content):
    token = {"id": TOKENS, "content": "<new>", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append(token | flags)


def respell(content):
    """An added token by another name, at the same id."""
    content["added_tokens"][1]["content"] = "<|begin|>"
    table = content["model"]["vocab"]
    table["<|begin|>"] = table.pop("<|im_start|>")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "id 67 is 'b' in it and 'a' in the policy's (2 of 259 ids differ)"),
        (add, "id 259 is '<new>' in it and nothing in the policy's (1 of 259 ids differ)"),
        (respell, "id 1 is '<|begin|>' in it and '<|im_start|>' in the policy's"),
    ],
)
@pytest.mark.parametrize("slot", ["teacher", "reference"])
def test_another_vocabulary_is_refused_before_any_weight_is_loaded(
    qwen3, larger, tmp_path, change, said, slot
):
    folder = shutil.copytree(larger, tmp_path / "other")
    renamed(folder, change)
    settings = with_anchor(larger, larger) | {slot: External(str(folder))}
    with pytest.raises(ConfigurationError) as caught:
        module(qwen3, **settings)
    line = str(caught.value)
    assert line.startswith(
        f"model.{slot}: External({folder}): its vocabulary is not model.policy's"
    )
    assert said in line and "\n" not in line and "name a model with the policy's own" in line


def test_a_table_with_fewer_rows_than_the_policys_is_refused(qwen3, tmp_path):
    folder = larger_folder(tmp_path / "few", vocab=TOKENS)
    with pytest.raises(ConfigurationError, match=r"has 259 rows, fewer than the 264 of model.pol"):
        module(qwen3, teacher=External(str(folder)))


def test_flags_of_added_tokens_and_a_missing_chat_template_are_no_other_vocabulary(
    qwen3, larger, tmp_path
):
    folder = shutil.copytree(larger, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    renamed(folder, lambda content: content["added_tokens"][1].update(lstrip=True, special=False))
    assert module(qwen3, teacher=External(str(folder))).teacher.exists


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (None, "there is no such folder"),
        (["model.safetensors"], "the folder lacks weights (*.safetensors)"),
        (["config.json", "model.safetensors"], "is an adapter without the weights of Qwen/Qwen3"),
        (["model.safetensors", "adapter"], "the folder lacks weights (*.safetensors)"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line_that_names_the_key(
    gone,
    said,
    larger,
    tmp_path,
    command,  # noqa: F811
    capsys,
):
    folder = tmp_path / "teacher"
    if gone is not None:
        shutil.copytree(larger, folder)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        (folder / "adapter_model.safetensors").touch()
        described = {"base_model_name_or_path": "Qwen/Qwen3-8B"}
        (folder / "adapter_config.json").write_text(json.dumps(described))
    teacher = ["--model.teacher=External", f"--model.teacher.name_or_path={folder}"]
    assert command("fit", "--config", CONFIGS / "tiny.yaml", *teacher) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("scsdpo: error: model.teacher: `External(name_or_path=") and said in line


def test_weights_that_are_not_all_there_are_refused(qwen3, larger, tmp_path):
    """They would be drawn at random, and teach that."""
    folder = shutil.copytree(larger, tmp_path / "shallow")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    (folder / "config.json").write_text(json.dumps(config))
    model = module(qwen3, teacher=External(str(folder)))
    with pytest.raises(ConfigurationError, match=r"model.teacher: External\(.* more weights"):
        model.configure_model()


# ---------------------------------------------------------------------- checkpoints and ranks


def test_it_is_not_in_checkpoints_and_a_resumed_run_loads_it_again(qwen3, larger, tmp_path):
    class SaveHalfWay(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def fit(model, *callbacks, **kwargs):
        torch.manual_seed(0)
        run = trainer(tmp_path, limit_val_batches=0, callbacks=list(callbacks))
        run.fit(model, data(Toys(16)), **kwargs)

    whole, resumed = (module(qwen3, teacher=External(str(larger))) for _ in range(2))
    fit(whole, SaveHalfWay())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if key.startswith("teacher")]
    fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    ours, theirs = weights(resumed.policy), weights(whole.policy)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    before = AutoModelForCausalLM.from_pretrained(larger)
    for own, first in zip(resumed.teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, first)


def test_ddp_leaves_it_alone(qwen3, larger):
    model = module(qwen3, teacher=External(str(larger)))
    model.configure_model()
    leave_out_of_ddp(model)
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    named = [name for name, _ in model.named_parameters() if name.startswith("teacher")]
    assert named and ignored == set(named)


# ------------------------------------------------------------------------------------ planning


def test_its_memory_is_counted_by_its_own_shapes(qwen3, larger):
    own = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(larger).parameters())
    setup = planned(qwen3, teacher=External(str(larger)))
    (second,) = setup.seconds
    assert (second.kind, second.forwards, second.width) == ("external", 1, 2)  # bf16 on a GPU
    assert memory_of(setup).parts.teacher == 2 * own
    wide = planned(qwen3, teacher=External(str(larger), dtype="float32"))
    assert memory_of(wide).parts.teacher == 4 * own
    shards = wide.on(ranks=2, sharded=True)
    assert memory_of(shards).parts.teacher == 2 * own
    hosted = planned(qwen3, teacher=External(str(larger), on_host=True))
    assert memory_of(hosted).parts.teacher == 0
    assert memory_of(hosted).parts.teaching > memory_of(setup).parts.teaching
    small = planned(qwen3, teacher=EMA(context=PlainPrompt()))
    assert memory_of(wide).parts.teaching > memory_of(small).parts.teaching


def test_a_model_that_two_slots_name_is_counted_once(qwen3, larger, tmp_path):
    once = planned(qwen3, **with_anchor(larger, larger))
    twice = planned(qwen3, **with_anchor(larger, shutil.copytree(larger, tmp_path / "copy")))
    assert [second.kind for second in once.seconds] == ["external", "none"]
    parts_of = [memory_of(each).parts for each in (once, twice)]
    assert parts_of[0].reference == 0 < parts_of[1].reference == parts_of[1].teacher
    assert all(second.another for second in once.seconds)


def test_a_larger_teacher_is_planned_without_the_hub(command, capsys):  # noqa: F811
    teacher = ["--model.teacher=External", "--model.teacher.name_or_path=Qwen/Qwen3-32B"]
    base = CONFIGS / "qwen3-lora.yaml"
    assert command("plan", "--config", base, *teacher) in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "weights of the teacher │ 61.02 │ all │ │ (external, bfloat16)" in said
    assert "model.teacher.on_host=true" in said
    teacher[1] = "--model.teacher.name_or_path=no/such-model"
    assert command("plan", "--config", base, *teacher) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: model.teacher.name_or_path: no/such-model is not a folder" in line


def test_it_is_a_name_of_the_package():
    assert scsdpo.External is External
