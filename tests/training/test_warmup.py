"""The warm-up: what it learns, when it ends, and the check before the first step."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from batches import double_policy, exact_norm, gradient, judged
from runs import Toys, data, module, trainer, weights
from scsdpo.advantage import GroupRelative
from scsdpo.checkpoints import Checkpoint
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.health import Health, Rule
from scsdpo.metrics import PhaseTimer
from scsdpo.policy import Lora
from scsdpo.statistics import Estimate
from scsdpo.teacher import EMA, Feedback, Frozen, GoldSolution, NoTeacher, SiblingDemonstration
from scsdpo.training import Limits
from scsdpo.training.teacher_gain import TeacherCheck, TeacherGain, measure_teacher_gain, pass_rates
from scsdpo.training.warmup import GoldAnswers, Warmup, WarmupStage
from scsdpo.types import Prompt, Sampling


def stage(teacher, **settings):
    return WarmupStage(
        Warmup(steps=3, **settings),
        teacher=teacher,
        reference=NoTeacher(),
        limits=Limits(),
        timer=PhaseTimer(),
    )


def plain_loss(policy, batch):
    """Mean over questions of each one's mean over its examples of mean_t - log S(y_t)."""
    by_question = {}
    responses = batch.judged.responses
    for row, prompt in enumerate(responses.prompts):
        ids = responses.ids[row, 0][responses.sampled[row, 0]].tolist()
        logits = policy.language_model(torch.tensor([[*prompt.ids, *ids]])).logits[0]
        said = cross_entropy(logits[len(prompt.ids) - 1 : -1], torch.tensor(ids))
        by_question.setdefault(prompt.key, []).append(said)
    means = [torch.stack(each).mean() for each in by_question.values()]
    return torch.stack(means).mean(), len(by_question)


@pytest.mark.parametrize("budget", [10**6, 40])
def test_loss_and_gradient_are_autograds_of_the_cross_entropy_after_the_teachers_prompt(
    qwen3, monkeypatch, budget
):
    monkeypatch.setattr(Qwen3RMSNorm, "forward", exact_norm)
    policy = double_policy(qwen3)
    batch = (warm := stage(EMA())).batch(policy.chat, judged(policy))
    loss, grads, _ = gradient(policy, batch, warm.steps.update, range(len(batch.active)), budget)
    policy.zero_grad()
    expected, questions = plain_loss(policy, batch)
    expected.backward()
    assert questions == 3  # one of the four has no success
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-8, atol=1e-11, msg=name)


def test_a_success_is_read_after_another_one_and_an_only_one_after_itself(qwen3):
    policy = double_policy(qwen3)
    seen = judged(policy)
    batch = stage(EMA()).batch(policy.chat, seen)
    counts = seen.successes.sum(-1).tolist()
    assert len(batch.active) == sum(counts)
    context = SiblingDemonstration()
    for row, prompt in enumerate(batch.judged.prompts):
        q = seen.keys.index(prompt.key)
        text = batch.judged.texts[row][0]
        others = [t for g, t in enumerate(seen.texts[q]) if seen.successes[q, g] and t != text]
        shown = [context.show(policy.chat, seen.prompts[q], t) for t in (others or [text])]
        assert prompt.ids in shown
    assert batch.judged.responses.policy_logprobs.isnan().all()  # they were drawn after others


def asking(policy, sampling=Sampling()):
    class Model:
        device = torch.device("cpu")
        batches = torch.zeros(())

    Model.policy, Model.sampling = policy, sampling
    return Model()


def question(chat, answer, key="q", **more):
    messages = ({"role": "user", "content": f"{key}?"},)
    prompt = Prompt(key=key, messages=messages, verifier=Toys().verifier, answer=answer, **more)
    return replace(prompt, ids=chat.render(messages))


def test_gold_answers_end_as_responses_do_and_questions_without_one_are_left_out(qwen3):
    policy = double_policy(qwen3)
    chat = policy.chat
    asked = [
        question(chat, "7", "a"),
        question(chat, " ", "b"),
        question(chat, "12", "c", stop=("\n",)),
    ]
    made = GoldAnswers(response="It is {answer}.").responses(asking(policy), asked)
    assert made.successes.tolist() == [[True], [False], [True]]
    ids = [made.responses.ids[q, 0][made.responses.sampled[q, 0]].tolist() for q in range(3)]
    assert ids[0] == [*chat.encode("It is 7."), chat.eos_ids[0]]
    assert ids[1] == [] and ids[2] == [*chat.encode("It is 12.\n")]
    told = stage(EMA(context=GoldSolution())).batch(chat, made)
    shown = [GoldSolution().show(chat, asked[q], asked[q].answer) for q in (0, 2)]
    assert [prompt.ids for prompt in told.judged.prompts] == shown
    told = stage(EMA()).batch(chat, made)
    shown = [
        SiblingDemonstration().show(chat, asked[q], f"It is {asked[q].answer}.") for q in (0, 2)
    ]
    assert [prompt.ids for prompt in told.judged.prompts] == shown


@pytest.mark.parametrize("adapter", [None, Lora(r=4)], ids=["full", "lora"])
def test_after_the_last_step_the_teacher_is_the_policy_and_training_begins(
    qwen3, tmp_path, adapter
):
    from scsdpo.policy import CausalLM

    extra = {"adapter": adapter} if adapter else {}
    policy = CausalLM(str(qwen3), self_check=False, **extra)
    model = module(qwen3, policy, teacher=EMA(rate=0), warmup=Warmup(steps=2, questions=4))
    seen = []
    begin = EMA.begin_anew
    model.teacher.begin_anew = lambda p: (begin(model.teacher, p), seen.append(weights(policy)))
    begun = trainer(tmp_path, max_steps=3)
    begun.fit(model, data())
    assert begun.global_step == 3 and int(model.warmup.taken) == 2 and bool(model.warmup.over)
    assert len(seen) == 1
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    moved = {n for n in trained if not torch.equal(seen[0][n], weights(policy)[n])}
    assert moved  # the third step
    # A teacher of rate 0 stays what the policy was at the end of the warm-up.
    model.teacher.weights_to_run(policy)[0]
    with model.teacher.weights_to_run(policy)[0].active(policy.wrapped) as teacher:
        ids = torch.arange(8)[None]
        told = teacher(ids).logits.clone()
    for name, parameter in policy.named_parameters():
        parameter.data.copy_(seen[0][name])
    torch.testing.assert_close(policy.language_model.eval()(ids).logits, told, rtol=0, atol=1e-6)
    names = set(begun.callback_metrics)
    assert {"warmup/gain", "warmup/cross_entropy", "warmup/examples", "train/divergence"} <= names


def test_a_run_that_goes_on_amid_the_warm_up_ends_with_the_same_bits(qwen3, tmp_path):
    settings = {"warmup": Warmup(steps=3, questions=4, measure_every=2)}
    whole = module(qwen3, **settings)
    trainer(tmp_path / "whole", max_steps=5, max_epochs=-1).fit(whole, data())
    saved = Checkpoint(dirpath=tmp_path / "half", save_last=True)
    options = {"enable_checkpointing": True, "callbacks": [saved]}
    half = module(qwen3, **settings)
    trainer(tmp_path, max_steps=2, max_epochs=-1, **options).fit(half, data())
    again = module(qwen3, **settings)
    last = next((tmp_path / "half").rglob("last.ckpt"))
    options["callbacks"] = [Checkpoint(dirpath=tmp_path / "again", save_last=True)]
    trainer(tmp_path / "again", max_steps=5, max_epochs=-1, **options).fit(
        again, data(), ckpt_path=last
    )
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


class Watcher(Rule):
    """Notes the held-out accuracies that a rule sees at each batch and validation."""

    remedy = "none"

    def __init__(self):
        self.seen = []

    def look(self, past):
        self.seen.append(len(past["val/mean"]))
        return None


def test_health_compares_with_the_last_validation_of_the_warm_up(qwen3, tmp_path):
    """Validations at batches 1, 2, 3 and 4; the warm-up takes batches 1 and 2."""
    watcher = Watcher()
    model = module(qwen3, warmup=Warmup(steps=2, questions=4))
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_epochs": -1}
    trainer(tmp_path, max_steps=4, callbacks=[Health(rules=(watcher,))], **options).fit(
        model, data()
    )
    assert watcher.seen == [0, 1, 1, 1, 1, 2, 2, 3]  # a batch, its validation, the next batch


def test_the_stage_ends_early_when_the_gain_is_enough(qwen3, tmp_path, monkeypatch):
    gain = iter(
        [Estimate(value=0.1, low=-0.1, high=0.3, n=8), Estimate(value=0.6, low=0.4, high=0.8, n=8)]
    )
    flat = Estimate(value=0.5, low=0.4, high=0.6, n=8)
    monkeypatch.setattr(
        "scsdpo.training.module.measure_teacher_gain",
        lambda *_: TeacherGain(without=flat, told=flat, gain=next(gain)),
    )
    model = module(qwen3, warmup=Warmup(steps=9, enough=0.3, measure_every=1))
    run = trainer(tmp_path, max_steps=3)
    run.fit(model, data())
    assert int(model.warmup.taken) == 1 and bool(model.warmup.over) and run.global_step == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": Frozen()}, r"model\.warmup: .* model\.teacher .* Frozen does not .* EMA"),
        ({"teacher": EMA(context=Feedback())}, r"model\.warmup: .* Feedback\) shows none"),
        (
            {"teacher": NoTeacher(), "advantage": GroupRelative()},
            r"model\.warmup: .*\(NoTeacher, .* or model\.warmup\.steps to 0",
        ),
    ],
)
def test_a_teacher_that_cannot_be_warmed_up_is_refused(qwen3, settings, said):
    with pytest.raises(ConfigurationError, match=said):
        module(qwen3, warmup=Warmup(steps=1), **settings)


def test_a_method_that_reads_no_teacher_may_be_warmed_up_on_one(qwen3, tmp_path):
    settings = {"advantage": GroupRelative(), "teacher": EMA(context=SiblingDemonstration())}
    with pytest.raises(ConfigurationError, match=r"EMA is never used, because model\.advantage"):
        module(qwen3, **settings)
    warm = Warmup(steps=1, questions=4)
    model = module(qwen3, warmup=warm, **settings)
    run = trainer(tmp_path, max_steps=2, max_epochs=-1)
    run.fit(model, data())
    assert bool(model.warmup.over) and run.global_step == 2


@pytest.mark.filterwarnings("ignore:.*nothing to learn from")
def test_batches_without_any_example_take_no_step(qwen3, tmp_path):
    warm = Warmup(steps=1, questions=4, examples=GoldAnswers(response="{answer}"))
    model = module(qwen3, warmup=warm, limits=Limits(max_idle_batches=3))
    run = trainer(tmp_path, max_steps=2, max_epochs=-1)
    with pytest.raises(TrainingStopped, match=r"3 batches .* set model\.warmup\.examples to"):
        run.fit(model, data())  # whose questions have no gold answer
    assert run.global_step == 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"GoldAnswers\(response=.* must contain \{answer\}"):
        GoldAnswers(response="42")
    with pytest.raises(ValueError, match=r"Warmup\(enough=.* > -1"):
        Warmup(enough=-1.0)
    with pytest.raises(ValueError, match=r"TeacherCheck\(share=.* in \[0, 1\]"):
        TeacherCheck(share=2)


class Half:
    """Right on every second draw alone, and on all or none when told."""

    def __init__(self, policy, told):
        self.policy, self.told, self.sampling = policy, told, Sampling(n=2)
        self.names = []

    def sample(self, prompts, sampling):
        return prompts

    def judge(self, prompts):
        self.names += [prompt.key for prompt in prompts]
        right = [self.told if "/told/" in prompt.key else 0.5 for prompt in prompts]

        class Seen:
            pass_rates = torch.tensor(right)

        return Seen()


def test_told_against_alone_is_paired_by_question(qwen3):
    policy = double_policy(qwen3)
    asked = [question(policy.chat, str(i), f"q{i}") for i in range(5)]
    asked.append(question(policy.chat, "", "nothing to tell"))
    telling = measure_teacher_gain(Half(policy, 1.0), GoldSolution(), asked, "x", 10**6)
    assert (telling.told.value, telling.without.value, telling.gain.value) == (1.0, 0.5, 0.5)
    assert telling.gain.n == 5 and telling.gain.low > 0
    short = measure_teacher_gain(Half(policy, 1.0), GoldSolution(), asked, "x", 3)
    assert short.gain.n == 0  # no prompt has room
    assert pass_rates(Half(policy, 1.0), "own", []) == {}


@pytest.mark.parametrize(("stops", "told"), [(True, 0.0), (False, 0.0), (True, 1.0)])
def test_a_teacher_that_is_worse_for_what_it_is_told_stops_a_run_before_its_first_step(
    qwen3, tmp_path, monkeypatch, stops, told
):
    class Answers(Toys):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), answer=str(index))

    policy = double_policy(qwen3)
    asked = [question(policy.chat, str(i), f"q{i}") for i in range(8)]
    telling = measure_teacher_gain(Half(policy, told), GoldSolution(), asked, "x", 10**6)
    monkeypatch.setattr("scsdpo.training.module.measure_teacher_gain", lambda *_: telling)
    check = TeacherCheck(stop=stops)
    model = module(qwen3, teacher=EMA(context=GoldSolution()), warmup=Warmup(check=check))
    run = trainer(tmp_path, max_steps=40, max_epochs=60, limit_train_batches=2)
    if told == 1.0:
        model.steps.learn = lambda *_: None
        run = trainer(tmp_path, max_epochs=60, limit_train_batches=1, max_steps=1)
        run.fit(model, data(Answers()))
        return
    if stops:
        with pytest.raises(
            TrainingStopped,
            match=r"makes the policy answer worse: .* model\.warmup\.steps .*check\.stop to false",
        ):
            run.fit(model, data(Answers()))
        assert run.global_step == 0
        return
    run = trainer(tmp_path, max_epochs=60, limit_train_batches=1)
    model.steps.learn = lambda *_: None
    with pytest.warns(UserWarning, match="teacher's prompt makes the policy answer worse"):
        run.fit(model, data(Answers()))
