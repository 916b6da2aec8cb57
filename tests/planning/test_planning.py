"""The arithmetic of `scsdpo plan`, by hand for one small architecture and against the code."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

import models
from runs import Toys, data, module, trainer
from scsdpo.errors import ConfigurationError
from scsdpo.planning import (
    Architecture,
    Counted,
    Devices,
    Lengths,
    advice,
    callback,
    fits,
    memory_of,
    read_model_config,
    setup_of,
    sharding,
    skeleton,
    splits,
    work_of,
)
from scsdpo.planning.advice import _combined, _own
from scsdpo.planning.architecture import shapes
from scsdpo.planning.layer_probe import measured_layers
from scsdpo.planning.memory import PARTS_OF_PHASE, activation_bytes, layer_bytes
from scsdpo.planning.setup import GIB, Sampler, with_lora, with_nf4
from scsdpo.planning.speed import Rates
from scsdpo.policy import NF4, CausalLM, FullFineTune, Lora
from scsdpo.policy.budget import memory_line
from scsdpo.rollout import Colocated, HFRollout, VLLMRollout
from scsdpo.teacher import EMA, Frozen, Live, NoTeacher, Restart, TrustRegion
from test_configs import CONFIGS, scsdpo  # noqa: F401 - a fixture

# models.qwen3_folder: D = 64, H = 2, K = 1, d = 64, I = 128, L = 2, V = 264, tied.
MATRICES = 64 * (2 + 2 * 1) * 64 + 2 * 64 * 64 + 3 * 64 * 128
LAYER = MATRICES + 2 * 64 + 2 * 64  # two norms of the stream, one of queries, one of keys
TABLE = 264 * 64
TIED = 2 * LAYER + TABLE + 64
# rank x (inputs + outputs) of q, k, v, o, gate, up, down
SIDES = (64 + 128) + 2 * (64 + 64) + (128 + 64) + 2 * (64 + 128) + (128 + 64)


def planned(folder, policy=None, *, devices=None, autocast=False, lengths=None, **settings):
    return setup_of(
        module(folder, policy, **settings),
        devices=devices or Devices(memory=GIB, process=0),
        autocast=autocast,
        questions=8,
        validation=4,
        lengths=lengths or Lengths(prompt=10, teacher_prompt=20, response=5),
    )


def test_shapes_and_counts_are_those_of_pencil_and_paper(qwen3):
    shapes = planned(qwen3).shapes
    assert (shapes.matrices, shapes.layer, shapes.parameters) == (MATRICES, LAYER, TIED)
    assert (shapes.table, shapes.root, shapes.multiplied) == (TABLE, TABLE + 64, 2 * MATRICES)
    assert (shapes.queries, shapes.keys, shapes.tied, shapes.head_norms) == (128, 64, True, True)
    assert shapes.cached(10) == 2 * 2 * 64 * 10


def test_an_untied_head_is_counted_on_its_own():
    sizes = []
    for tie in (True, False):
        settings = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64}
        common = models._common(tie=tie, vocab=264)
        sizes.append(Architecture.of(skeleton(Qwen3Config(**settings, **common))))
    assert sizes[1].parameters - sizes[0].parameters == TABLE
    assert (sizes[0].tied, sizes[1].tied) == (True, False)


def test_factors_are_rank_times_inputs_and_outputs(qwen3):
    counted = planned(qwen3, CausalLM(str(qwen3), adapter=Lora(r=4))).counted
    assert counted.trained == 2 * 4 * SIDES and counted.frozen == TIED
    assert counted.adapted == 2 * MATRICES and counted.rank_tables == 7 * 4
    assert counted == Counted.all_linear(planned(qwen3).shapes, 4)


def test_a_sliding_layer_caches_its_window_only(olmo3):
    shapes = planned(olmo3).shapes
    assert shapes.windows == (8, None)
    assert shapes.cached(20) == 2 * shapes.keys * (8 + 20)


def test_parts_of_a_full_fine_tune(qwen3):
    parts = memory_of(planned(qwen3)).parts
    assert (parts.weights, parts.gradients, parts.teacher) == (4 * TIED,) * 3
    assert parts.optimizer == 8 * TIED and parts.reference == 0
    assert parts.stepping == 4 * TIED  # AdamW's list on a GPU
    # A tied head's gradient lies beside the embedding's; nothing is cast.
    assert parts.heads == 4 * TABLE and parts.casts == 0
    shards = memory_of(planned(qwen3).on(ranks=4, sharded=True)).parts
    assert (shards.weights, shards.gradients, shards.teacher) == (TIED,) * 3
    assert shards.optimizer == 2 * TIED
    # Two layers and the root whole, and a layer's gradient; at the end the root's.
    assert shards.gathered == 4 * (2 * LAYER + TABLE + 64) + 4 * LAYER
    assert shards.stepping == 2 * 4 * (TABLE + 64 + LAYER)
    replicated = memory_of(planned(qwen3).on(ranks=4)).parts
    assert replicated.buckets == 4 * TIED and replicated.gathered == 0


def test_parts_of_lora(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(r=4))
    parts = memory_of(planned(qwen3, policy)).parts
    factors = 2 * 4 * SIDES
    assert parts.weights == 2 * TIED + 4 * factors  # a bf16 base on a GPU
    assert (parts.gradients, parts.teacher, parts.optimizer) == (4 * factors,) * 2 + (8 * factors,)
    assert parts.sampling_weights == 2 * 2 * MATRICES and parts.heads == 0
    frozen = memory_of(planned(qwen3, CausalLM(str(qwen3), adapter=Lora()), teacher=Frozen()))
    assert frozen.parts.teacher == 0


def test_parts_of_a_base_in_4_bits(qwen3):
    """Matrices of layers are packed, all else is bf16; one matrix at a time is made plain."""
    policy = CausalLM(str(qwen3), adapter=Lora(r=4), quantization=NF4())
    setup = planned(qwen3, policy)
    parts, factors = memory_of(setup).parts, 2 * 4 * SIDES
    packed = int((0.5 + (1 + 4 / 256) / 64) * 2 * MATRICES)
    assert parts.weights == 2 * (TIED - 2 * MATRICES) + packed + 4 * factors
    assert (parts.gradients, parts.teacher, parts.optimizer) == (4 * factors,) * 2 + (8 * factors,)
    assert parts.dequantized == 2 * 64 * 128 and parts.sampling_weights == 2 * 2 * MATRICES
    single = CausalLM(str(qwen3), adapter=Lora(r=4), quantization=NF4(double_quant=False))
    more = memory_of(planned(qwen3, single)).parts.weights - parts.weights
    assert more == pytest.approx((4 - 1 - 4 / 256) / 64 * 2 * MATRICES, abs=1)
    apart = planned(qwen3, policy, rollout=HFRollout(merged=False))
    assert memory_of(apart).parts.sampling_weights == 0
    assert memory_of(apart).phases["sampling"] >= memory_of(apart).parts.dequantized


def test_a_base_in_4_bits_is_not_planned_in_shards_nor_trained_whole(qwen3):
    policy = CausalLM(str(qwen3), adapter=Lora(r=4), quantization=NF4())
    shards = Devices(memory=GIB, process=0, ranks=2, sharded=True)
    with pytest.raises(ConfigurationError, match=r"model\.policy\.quantization: .* use DDP"):
        planned(qwen3, policy, devices=shards)
    setup = planned(qwen3, policy)
    tight = setup.on(memory=memory_of(setup).peak // 2)
    assert "FullySharded" not in getattr(advice(tight), "words", "")
    assert not any(split.setup.devices.sharded for split in splits(setup, 4, Rates()))


def test_4_bits_are_the_last_change_that_is_advised(qwen3):
    """On memory that all other changes together do not fit, for one question, on one device."""

    def least(setup):
        peaks = []
        for changes in _combined(_own(setup)):
            changed = setup
            for change in changes:
                changed = change.apply(changed)
            peaks.append(memory_of(changed).peak)
        return min(peaks)

    policy = CausalLM(str(qwen3), adapter=Lora(r=1, target_modules=["q_proj"]))
    setup = replace(planned(qwen3, policy), questions=1, max_tokens=1)
    tight = setup.on(memory=int(least(with_nf4(setup)) / 0.95) + 1)
    assert least(setup) > 0.95 * tight.devices.memory
    found = advice(tight)
    assert found is not None and "quantization=NF4" in found.words


@pytest.mark.parametrize(
    ("teacher", "kind", "trunks"),
    [
        (EMA(), "moving", 1),
        (Restart(), "moving", 1),
        (Frozen(), "frozen", 1),
        (TrustRegion(), "frozen", 2),
        (Live(), "none", 1),
    ],
)
def test_teachers_are_asked_what_they_keep(qwen3, teacher, kind, trunks):
    (second,) = planned(qwen3, teacher=teacher).seconds
    assert (second.slot, second.kind, second.forwards) == ("teacher", kind, trunks)
    assert memory_of(planned(qwen3, teacher=teacher)).parts.teacher == 4 * TIED * (kind != "none")


@pytest.mark.parametrize(
    ("make", "state", "temporary"),
    [
        (lambda p: torch.optim.AdamW(p), 8, 4),
        (lambda p: torch.optim.AdamW(p, fused=True), 8, 0),
        (lambda p: torch.optim.AdamW(p, foreach=False), 8, 0),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12, 4),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 4),
    ],
)
def test_optimizers_are_asked_what_they_keep(qwen3, make, state, temporary):
    found = planned(qwen3, optimizer=make).optimizer
    assert (found.state, found.temporary) == (state, temporary)


def test_a_phase_is_the_sum_of_its_parts(qwen3):
    memory = memory_of(replace(planned(qwen3), max_tokens=40))
    parts = memory.parts.nonzero()
    for phase, names in PARTS_OF_PHASE.items():
        assert memory.phases[phase] == sum(parts.get(name, 0) for name in names)
    assert memory.peak == max(memory.phases.values())
    # 20 tokens of prompts wait, and 4 of 32 responses of 5 tokens run beside them.
    assert memory.micro_batches == 8 and parts["gradients_meanwhile"] == parts["gradients"]
    alone = memory_of(replace(planned(qwen3), max_tokens=10**6))
    assert alone.micro_batches == 1 and alone.parts.gradients_meanwhile == 0


LINES = {
    "full, float32": ({}, False),
    "full, autocast": ({}, True),
    "full, checkpointing": ({"gradient_checkpointing": True}, True),
    "lora, float32": ({"adapter": Lora(r=4)}, False),
    "lora, autocast": ({"adapter": Lora(r=4), "dtype": "bfloat16"}, True),
    "4 bits, float32": ({"adapter": Lora(r=4), "quantization": NF4()}, False),
}


@pytest.mark.parametrize("case", LINES)
def test_a_layer_keeps_as_much_as_its_forward_was_seen_to(case, tmp_path):
    """The slope of two measured lines (`memory_line`) that differ by two layers."""
    settings, autocast = LINES[case]
    if "quantization" in settings:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes: pip install -e '.[dev]'")
    slopes = []
    for layers in (3, 5):
        policy = CausalLM(str(_folder(tmp_path / str(layers), layers)), **settings)
        policy.configure_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            slopes.append(policy.memory_line()[1])
    unloaded = CausalLM(str(tmp_path / "3"), **settings)
    setup = planned(tmp_path / "3", unloaded, autocast=autocast, devices=Devices(kind="cpu"))
    a_layer = setup.wide * setup.shapes.hidden if setup.checkpointing else layer_bytes(setup)
    assert (slopes[1] - slopes[0]) / 2 == pytest.approx(a_layer, rel=0.02)
    assert slopes[0] == pytest.approx(activation_bytes(replace(setup, seconds=())), rel=0.2)


def _folder(path, layers):
    common = models._common(tie=True, vocab=models.TOKENS) | {"num_hidden_layers": layers}
    config = Qwen3Config(
        hidden_size=256, intermediate_size=512, head_dim=64, **common | {"num_attention_heads": 4}
    )
    return models._save(path, Qwen3ForCausalLM, config, dtype=torch.float32, seed=0)


def test_auto_is_half_of_what_is_free(qwen3):
    setup = planned(qwen3)
    memory = memory_of(setup)
    held = memory.parts.weights + memory.parts.optimizer + memory.parts.teacher
    free = GIB - held
    expected = int((free // 2 - memory.parts.gradients) / activation_bytes(setup))
    assert memory.budget == min(expected, 2**17)
    assert memory_of(setup.on(kind="cpu")).budget == 1024


def test_vllm_in_the_process_is_there_all_the_time_unless_it_sleeps(qwen3):
    engine = Colocated(kv_cache_gib=1.0)
    awake = memory_of(planned(qwen3, rollout=VLLMRollout(engine)))
    assert awake.parts.vllm == 2 * TIED + GIB + GIB and awake.parts.cache == 0
    halved = VLLMRollout(Colocated(kv_cache_gib=1.0, tensor_parallel=2))
    assert memory_of(planned(qwen3, rollout=halved)).parts.vllm == TIED + GIB + GIB
    asleep = memory_of(planned(qwen3, rollout=VLLMRollout(Colocated(kv_cache_gib=1.0, sleep=True))))
    assert asleep.parts.vllm == 0 and asleep.parts.sampling_weights == 2 * TIED + GIB + GIB


def test_keys_and_values_never_exceed_the_samplers_room(qwen3):
    setup = planned(qwen3, lengths=Lengths(prompt=100, teacher_prompt=100, response=1000))
    small = replace(setup, sampler=Sampler(kind="hf", max_tokens=640, max_rows=512))
    assert memory_of(small).parts.cache == 4 * setup.shapes.cached(640)


def test_the_smallest_change_is_one_that_fits(qwen3):
    large = replace(planned(qwen3), questions=512, max_tokens=4096)
    peak = memory_of(large).peak
    for share in (0.95, 0.8, 0.5):
        tight = large.on(memory=int(peak * share))
        assert not fits(tight, memory_of(tight))
        found = advice(tight)
        assert found is not None and fits(found.setup, memory_of(found.setup))
    assert advice(large.on(memory=1000)) is None


def test_the_fewest_changes_on_the_own_devices_come_before_more_devices(qwen3):
    """Against every subset of the changes that need no other device."""
    sampler = Sampler(kind="hf", max_tokens=400_000, max_rows=4096)
    full = replace(planned(qwen3), questions=512, max_tokens=8192, in_flight=4096, sampler=sampler)
    own, seen = _own(full), set()
    for share in [n / 50 for n in range(2, 50)]:
        tight = full.on(memory=int(memory_of(full).peak * share))
        enough = []
        for chosen in _combined(own):
            changed = tight
            for change in chosen:
                changed = change.apply(changed)
            enough += [len(chosen)] if fits(changed, memory_of(changed)) else []
        found = advice(tight)
        words = found.words if found else ""
        if enough:
            assert "devices" not in words and len(words.split(" and ")) == min(enough)
            seen.add(min(enough))
        else:
            assert not found or "devices" in words or "Lora" in words
    assert {1, 2} <= seen


def test_every_way_to_deal_devices_out_is_whole(qwen3):
    setup = planned(qwen3).on(memory=4 * GIB)  # 8 questions
    found = splits(setup, 8, Rates())
    assert {(split.trainers, split.servers * split.width) for split in found} == {
        (trainers, 8 - trainers) for trainers in (1, 2, 4)
    }
    assert [split.seconds for split in found] == sorted(split.seconds for split in found)
    for split in found:
        assert split.fits and split.setup.sampler.kind == "remote"
        assert split.memory.parts.cache == 0 and split.seconds == split.sampling + split.training
    by_trainers = {split.trainers: split for split in found}
    # Halving the trainers doubles what each learns from.
    work = {n: work_of(split.setup, split.memory) for n, split in by_trainers.items()}
    assert work[2]["update"].flops == pytest.approx(2 * work[4]["update"].flops)


def test_a_server_takes_as_many_devices_as_its_weights_need(qwen3):
    setup = planned(qwen3)
    beside = 2**30 + 2 * setup.shapes.cached(15)  # vLLM's own, and one response
    for width in (1, 2, 4):
        memory = int((2 * TIED / width + beside) / 0.95) + 1
        found = splits(setup.on(memory=memory), 8, Rates())
        assert {s.width for s in found if s.trainers == 4} == {width}
    assert splits(setup.on(memory=2**30), 8, Rates()) == []


CLAIMS = {
    ("qwen3", "fsdp-8"): 80,
    ("olmo3", "fsdp-8"): 80,
    ("qwen3", "fsdp-multinode"): 80,
    ("olmo3", "fsdp-multinode"): 80,
    ("qwen3", "fsdp-2"): 141,
    ("olmo3", "fsdp-2"): 141,
    ("qwen3-lora", "ddp"): 80,
}
"""GiB of the devices that the heads of configs/ name."""


@pytest.mark.parametrize("pair", CLAIMS, ids="+".join)
def test_configurations_fit_the_devices_that_their_heads_name(pair, scsdpo, capsys):  # noqa: F811
    base, scale = CONFIGS / f"{pair[0]}.yaml", CONFIGS / "scale" / f"{pair[1]}.yaml"
    memory = f"--memory={CLAIMS[pair]}"
    assert scsdpo("plan", "--config", base, "--config", scale, memory) in (0, None)
    assert "\nFits: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "model", "most"),
    [
        ("qwen3-qlora-24gb", "Qwen/Qwen3-8B", 22),
        ("qwen3-qlora-24gb", "Qwen/Qwen3-4B", 15),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B", 22),
    ],
)
def test_configurations_for_one_small_gpu_stay_below_what_their_heads_say(
    config,
    model,
    most,
    scsdpo,  # noqa: F811
    capsys,
):
    """GB, rollouts included, whatever the device has."""
    own = ["--config", CONFIGS / f"{config}.yaml", f"--model.policy.name_or_path={model}"]
    assert scsdpo("plan", *own, "--memory=24") in (0, None)
    (peak,) = re.findall(r"Fits: the peak, ([\d.]+) GiB", capsys.readouterr().out)
    assert float(peak) * GIB < most * 1e9


def test_qwen3_4b_with_lora_fits_24_gib_by_one_change(scsdpo, capsys):  # noqa: F811
    own = ["--model.policy.name_or_path=Qwen/Qwen3-4B", "--memory=24", "--trainer.devices=1"]
    assert scsdpo("plan", "--config", CONFIGS / "qwen3-lora.yaml", *own) in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "fits: model.rollout.init_args.max_tokens=32768 (21.90 GiB, 2.10 GiB to spare)" in said


def test_eight_cards_are_dealt_out_between_trainers_and_servers(
    scsdpo,  # noqa: F811
    capsys,
    monkeypatch,
):
    monkeypatch.setenv("COLUMNS", "150")
    assert scsdpo("plan", "--config", CONFIGS / "qwen3.yaml", "--split=8") in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    best = "Fastest that fits: trainer.devices=4 with FullySharded (configs/scale) and 4 servers"
    assert best in said
    assert "│ 4 (sharded) │ 4 │ 1 │" in said and "│ 1 │ 7 │ 1 │" in said
    assert said.count("does not fit") == 2  # one trainer and two


def test_work_follows_from_shapes(qwen3):
    setup = replace(planned(qwen3, teacher=NoTeacher(), advantage=_grpo()), max_tokens=10**6)
    work = work_of(setup, memory_of(setup))
    tokens, prompts = 8 * 4 * 5, 8 * 10
    attention = 4 * 128 * (10 + 2.5) * 2
    trunk = (tokens + prompts) * (2 * 2 * MATRICES + attention)
    assert work["update"].flops == pytest.approx(3 * trunk + 3 * 2 * TABLE * tokens)
    assert work["teacher"].flops == 0 and work["update"].link == 0
    again = replace(setup, checkpointing=True)
    more = work_of(again, memory_of(again))["update"].flops - work["update"].flops
    assert more == pytest.approx(trunk)
    # 5 steps of 32 responses, 2 layers
    assert work["sampling"].launches == 5 * 2
    assert work["sampling"].seconds(Rates(host=1.0)) == 10.0
    shards = setup.on(ranks=4, sharded=True)
    assert work_of(shards, memory_of(shards))["update"].link > 0


def _grpo():
    from scsdpo.advantage import GroupRelative

    return GroupRelative()


# ----------------------------------------------------------------------- the command


def test_the_published_setting_is_planned_without_the_hub(scsdpo, capsys):  # noqa: F811
    lengths = ("--prompt-tokens=200", "--teacher-tokens=600", "--response-tokens=300")
    code = scsdpo("plan", "--config", CONFIGS / "qwen3.yaml", "--gpus=8", *lengths)
    said = " ".join(capsys.readouterr().out.split())
    assert code in (0, None)
    assert "8.19B parameters, all trained, bf16-mixed; 8 devices, replicated (DDP)" in said
    assert "│ weights of the policy │ 30.51 │" in said  # 8,190,735,360 x 4 bytes
    assert "Does not fit" in said and "FullySharded" in said
    assert "400 TFLOP/s" in said


PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "google/gemma-3-1b-it": 999_885_952,
    # Of these the makers print two digits; gemma's from 4B on is the text part alone.
    "allenai/Olmo-3-7B-Instruct": 7.30e9,
    "allenai/Olmo-3-32B-Think": 32.2e9,
    "google/gemma-3-4b-it": 3.88e9,
    "google/gemma-3-12b-it": 11.8e9,
    "google/gemma-3-27b-it": 27.0e9,
}
"""Elements of the published weights, tied ones once."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_shapes_have_as_many_parameters_as_published(name):
    counted = Architecture.of(skeleton(read_model_config(name))).parameters
    published = PUBLISHED[name]
    tolerance = 0 if isinstance(published, int) else 3e-3
    assert counted == pytest.approx(published, rel=tolerance)


def test_each_shape_that_ships_is_checked_under_one_of_its_names():
    checked = [shapes()[name] for name in PUBLISHED]
    assert all(config in checked for config in shapes().values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.policy.name_or_path=no/such-model"], "give --architecture FILE"),
        (["--model.policy.name_or_path=Qwen/Qwen3-5B"], "did you mean Qwen/Qwen3-8B?"),
        (["--split=1"], "--split must be >= 2, got 1"),
        (["--split=2", "--memory=0.001"], "--split: 2 devices cannot be divided"),
        (["--architecture=nowhere"], "--architecture: nowhere has no config.json"),
        (["--gpus=3"], "data.questions_per_batch: must be a multiple of the 3 devices, got 16"),
        (["--memory=0"], "--memory must be > 0"),
        (["--trainer.strategy=deepspeed"], "plan supports one device, DDP and FullySharded"),
        (["--gpus=x"], "--gpus: invalid int"),
    ],
)
def test_mistakes_end_in_one_line(args, message, scsdpo, capsys):  # noqa: F811
    assert scsdpo("plan", "--config", CONFIGS / "tiny.yaml", *args) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_strategies_are_told_apart():
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    assert sharding(ModelParallelStrategy()) and not sharding(DDPStrategy())
    assert sharding({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})
    assert sharding({"class_path": "scsdpo.checkpoints.FullySharded"})
    assert not sharding("auto") and not sharding("ddp_find_unused_parameters_true")


# ----------------------------------------------------------------------- a run


def fitted(folder, monkeypatch, tmp_path, **devices):
    said = []
    monkeypatch.setattr(callback, "rank_zero_info", said.append)
    if devices:
        monkeypatch.setattr(callback, "_devices", lambda trainer: Devices(kind="cpu", **devices))
    run = module(folder)
    trainer(tmp_path, limit_train_batches=2).fit(run, data())
    return said


def test_a_run_says_its_plan_and_compares_the_first_step(qwen3, monkeypatch, tmp_path):
    said = fitted(qwen3, monkeypatch, tmp_path)
    plans = [line for line in said if line.startswith("plan: ")]
    assert len(plans) == 3
    assert "weights 0.00" in plans[1] and "peak of sampling" in plans[1]
    assert "the first step took" in plans[2] and "the plan is" in plans[2]
    prompt, response = map(
        int, re.search(r"\((\d+) tokens in a prompt, (\d+) in a resp", plans[2]).groups()
    )
    rendered = CausalLM(str(qwen3)).chat.render(Toys()[0].messages)
    assert abs(prompt - len(rendered)) <= 1 and 1 <= response <= 8


def test_what_cannot_run_is_refused_before_loading(qwen3, monkeypatch, tmp_path):
    loads = []
    kept = CausalLM.configure_model
    noted = lambda policy, **how: (loads.append(1), kept(policy, **how))  # noqa: E731
    monkeypatch.setattr(CausalLM, "configure_model", noted)
    with pytest.raises(ConfigurationError, match="weights, gradients and optimizer states alone"):
        fitted(qwen3, monkeypatch, tmp_path, memory=16 * TIED - 1, process=0)
    assert not loads
    # One byte more and it may run, with a warning.
    with pytest.warns(UserWarning, match="plan: Does not fit: the peak"):
        fitted(qwen3, monkeypatch, tmp_path, memory=16 * TIED, process=0)
    assert loads


def test_a_run_that_cannot_be_planned_goes_on(qwen3, monkeypatch, tmp_path):
    monkeypatch.setattr(callback, "sharding", lambda strategy: _refuse())
    assert any(line == "no plan: unknown" for line in fitted(qwen3, monkeypatch, tmp_path))


def _refuse():
    raise ConfigurationError("unknown")


def test_a_plan_needs_no_weights_and_draws_nothing(qwen3):
    before = torch.get_rng_state()
    setup = planned(qwen3, CausalLM(str(qwen3), adapter=Lora()))
    assert with_lora(setup, 32) == setup and torch.equal(before, torch.get_rng_state())


NARROW = models._common(tie=True, vocab=models.TOKENS) | {"num_attention_heads": 8}
HYBRID = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 32,
    "num_key_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
SEVERAL_KINDS = {
    "qwen3.5": Qwen3_5TextConfig(**NARROW | HYBRID | {"num_hidden_layers": 4}),
    "lfm2": Lfm2Config(
        **NARROW | {"num_hidden_layers": 4, "num_key_value_heads": 4},
        hidden_size=256,
        intermediate_size=512,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    "qwen3 experts": Qwen3MoeConfig(
        **NARROW | {"num_key_value_heads": 4},
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=16,
        head_dim=32,
    ),
}


@pytest.mark.parametrize("adapter", [FullFineTune(), Lora(r=8)], ids=["full", "lora"])
@pytest.mark.parametrize("name", SEVERAL_KINDS)
def test_layers_of_other_kinds_keep_what_a_whole_model_was_seen_to(name, adapter):
    """The narrow probes, drawn out, against the memory line of the model itself."""
    config = SEVERAL_KINDS[name]
    shapes = Architecture.of(skeleton(config))
    measured = measured_layers(config, shapes, adapter, torch.float32, autocast=False)
    model = AutoModelForCausalLM.from_config(config)
    model = adapter.language_model(adapter.wrap(model))

    def run(tokens):
        ids = torch.arange(tokens)[None] % 250
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    _, seen = memory_line(run, model.get_input_embeddings(), torch.device("cpu"))
    assert sum(measured.layers) + measured.end == pytest.approx(seen, rel=0.03)


def test_experts_and_states_are_counted_by_pencil_and_paper():
    experts = Architecture.of(skeleton(SEVERAL_KINDS["qwen3 experts"]))
    attention = 256 * 32 * (8 + 2 * 4) + 8 * 32 * 256
    of_one = 3 * 256 * 128
    assert experts.matrices == attention + 16 * of_one + 16 * 256
    assert experts.active == 2 * (attention + 8 * of_one + 16 * 256)
    assert experts.has_experts and not experts.is_plain and experts.state == 0
    hybrid = Architecture.of(skeleton(SEVERAL_KINDS["qwen3.5"]))
    channels = 2 * 4 * 32 + 8 * 32
    assert hybrid.state == 3 * (8 * 32 * 32 + 3 * channels)
    assert hybrid.kinds == 3 * ("linear_attention",) + ("full_attention",)
    assert hybrid.cached(10) == 2 * 4 * 32 * 10  # one layer has keys and values
    assert hybrid.active == hybrid.multiplied == sum(hybrid.matrix_sizes)
    short = Architecture.of(skeleton(SEVERAL_KINDS["lfm2"]))
    assert short.state == 3 * 256 * 2 and short.cached(10) == 2 * 4 * 32 * 10
