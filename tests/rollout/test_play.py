"""Episodes as sampled: one sequence of tokens, whatever the batch, and never tokenised again."""

import random
from dataclasses import replace

import pytest
import torch

import worlds
from precision import allowed
from scsdpo.policy import CausalLM
from scsdpo.rollout import Engine, HFRollout, VLLMRollout
from scsdpo.rollout.dialogue import CUT, FULL
from scsdpo.rollout.hf.continuous_batching import ContinuousBatcher
from scsdpo.rollout.hf.response_buffer import ResponseBuffer
from scsdpo.rollout.hf.scheduler import Scheduler
from scsdpo.rollout.vllm.rollout import EngineAnswer
from scsdpo.types import Prompt, Sampling, Verdict
from scsdpo.verifiers import Episodes, ExactMatch, Verification, VerifierPool

END = 2
SAMPLING = Sampling(n=2, max_new_tokens=250, temperature=0.7, seed=3)
HERE = VerifierPool(Verification(workers=0))


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool(Verification(workers=2))
    yield pool
    pool.close()


def load(path):
    policy = CausalLM(str(path))
    policy.configure_model()
    return policy


def asked(policy, world, key, text="Is water wet?"):
    messages = ({"role": "user", "content": text},)
    ids = policy.chat.render(messages)
    return Prompt(key=key, messages=messages, verifier=world, answer="a", ids=ids)


@pytest.fixture
def turns(monkeypatch):
    """Turns end after so many tokens, by row and turn, whatever is drawn."""
    plain = ResponseBuffer.draw
    lengths = torch.tensor([[4, 9, 5, 8], [3, 1, 20, 8], [70, 2, 6, 8], [12, 3, 3, 8]])

    def draw(self, logits, rows, places):
        before = self.keeps(rows, places)
        ids = plain(self, logits, rows, places)
        keys = [prompt.key for prompt in self.prompts]
        row = torch.tensor([sorted(keys).index(key) for key in keys])[rows // self.sampling.n]
        starts, turn = self.turn_starts[rows], self.turns[rows, self.turn_starts[rows]].long()
        ends = lengths[(row + rows % self.sampling.n) % len(lengths), turn]
        ids = torch.where((ids == END) | (ids == 0), END + 1, ids)
        ids = torch.where(ends == places - starts + 1, END, ids)
        at = places.clamp(max=self.ids.shape[1] - 1)
        ids = torch.where(before, self.ids[rows, at], ids)
        self.ids[rows, at] = ids
        return ids

    monkeypatch.setattr(ResponseBuffer, "draw", draw)
    return lengths


def play(policy, prompts, pool=HERE, sampling=SAMPLING, **rollout):
    with Episodes(pool, prompts, sampling.n) as episodes:
        return HFRollout(**rollout).play(policy, prompts, sampling, episodes)


def check_tokens(policy, drawn):
    """What stands there is what was drawn and, between two turns, what the template writes."""
    for q, g in ((q, g) for q in range(len(drawn.prompts)) for g in range(drawn.ids.shape[1])):
        n = int(drawn.extents[q, g])
        assert drawn.present[q, g].sum() == drawn.present[q, g, :n].sum() == n
        ids, sampled = drawn.ids[q, g, :n].tolist(), drawn.sampled[q, g, :n].tolist()
        turn, parts = drawn.turns[q, g, :n].tolist(), drawn.episodes[q][g].parts
        place = 0 if parts else n
        for number, part in enumerate(part for part in parts if part.role == "assistant"):
            mine = [i for i in range(n) if turn[i] == number]
            own = [i for i in mine if sampled[i]]
            assert mine[0] == place == own[0] and own == list(range(place, place + len(own)))
            assert policy.chat.decode([ids[i] for i in own]) == part.text
            given = [ids[i] for i in mine if not sampled[i]]
            place = mine[-1] + 1
            if given:
                said = parts[2 * number + 1]
                assert ids[own[-1]] == END
                expected = policy.chat.continuation([{"role": said.role, "content": said.text}])
                assert given == list(expected[1:])
        assert place == n


def plain_log_probs(policy, drawn):
    """[N] of one unpadded sequence after the other."""
    found = []
    for q, prompt in enumerate(drawn.prompts):
        for i in range(drawn.ids.shape[1]):
            row = drawn.ids[q, i][drawn.present[q, i]]
            ids = torch.cat([torch.tensor(prompt.ids), row])[None]
            with policy.sampling_mode() as model:
                z = model(ids, use_cache=False).logits[0, len(prompt.ids) - 1 : -1]
            log_probs = (z / drawn.temperature).log_softmax(-1).gather(-1, row[:, None])[:, 0]
            found.append(log_probs[drawn.sampled[q, i][drawn.present[q, i]]])
    return torch.cat(found)


@pytest.mark.parametrize("folder", ["qwen3", "olmo3", "qwen3_5", "lfm2", "gpt_oss"])
def test_log_probs_are_those_of_the_whole_sequence(folder, request, turns):
    """OLMo's and gpt-oss' window of 8 tokens is a ring that turns and answers outgrow."""
    policy = load(request.getfixturevalue(folder))
    if folder == "gpt_oss":  # grouped products know no float64, which tells what rounding allows
        policy.language_model.set_experts_implementation("eager")
    prompts = [
        asked(policy, worlds.Echo(), "a"),
        asked(policy, worlds.Echo(turns=4, words=1), "b", "Why? " * 5),
        asked(policy, ExactMatch(), "c"),
    ]
    drawn = play(policy, prompts)
    check_tokens(policy, drawn)
    assert drawn.ended.all()
    assert [[each.turns for each in group] for group in drawn.episodes] == [
        [3] * 2,
        [4] * 2,
        [1] * 2,
    ]
    judged = [[bool(each.verdict) for each in group] for group in drawn.episodes]
    assert judged == [[True] * 2, [True] * 2, [False] * 2]
    assert drawn.lengths[0].tolist() == [int(turns[i, :3].sum()) for i in range(2)]
    assert (drawn.policy_logprobs[~drawn.sampled] == 0).all()
    expected = plain_log_probs(policy, drawn)
    as_drawn = (drawn.ids != END) & (drawn.ids != END + 1)  # `turns` has put these there
    gap = (drawn.policy_logprobs[drawn.sampled] - expected).abs()[as_drawn[drawn.sampled]]
    assert len(gap) > 100 and gap.max() <= allowed(policy, drawn)


@pytest.mark.parametrize("limits", [{"max_rows": 2}, {"max_tokens": 300}], ids=str)
def test_no_budget_changes_an_episode(qwen3, turns, limits, pool, monkeypatch):
    """Where memory falls short the youngest give way, and their episodes begin anew."""
    policy = load(qwen3)
    prompts = [asked(policy, worlds.Echo(), "a"), asked(policy, worlds.Echo(turns=4), "b", "Why?")]
    alone = play(policy, prompts)
    if "max_tokens" in limits:  # hope for much too short responses
        monkeypatch.setattr(Scheduler, "_expected", lambda self, drawn, mean: drawn + 1)
        back = []
        plain = Scheduler.put_back
        monkeypatch.setattr(
            Scheduler, "put_back", lambda self, one: (back.append(one), plain(self, one))
        )
    other = play(policy, prompts, pool, **limits)
    for name in ("ids", "present", "sampled", "turns", "ended"):
        assert torch.equal(getattr(alone, name), getattr(other, name)), name
    assert alone.episodes == other.episodes and alone.texts == other.texts
    assert "max_tokens" not in limits or back


def test_what_an_environment_answers_runs_at_once(qwen3, turns, monkeypatch):
    """As many steps as tokens were drawn, and one pass for each answer."""
    policy = load(qwen3)
    passes, steps = [], []
    plain, run = ContinuousBatcher._read, ContinuousBatcher.run
    monkeypatch.setattr(
        ContinuousBatcher, "_read", lambda self, *at: (passes.append(at), plain(self, *at))
    )
    monkeypatch.setattr(ContinuousBatcher, "run", lambda self: (run(self), steps.append(self.step)))
    drawn = play(policy, [asked(policy, worlds.Echo(), "a")], sampling=replace(SAMPLING, n=1))
    assert steps == [drawn.lengths.item()] and len(passes) == 2
    assert drawn.extents.item() >= drawn.lengths.item() + 50


def test_models_that_share_no_prefix_play_the_same_episodes(qwen3, turns, monkeypatch):
    """Turn by turn with transformers' own cache."""
    policy = load(qwen3)
    prompts = [
        asked(policy, worlds.Echo(turns=2), "a"),
        asked(policy, worlds.Counting(turns=9), "b", "Why?"),
        asked(policy, ExactMatch(), "c"),
    ]
    sampling = replace(SAMPLING, max_new_tokens=90)
    shared = play(policy, prompts, sampling=sampling)
    monkeypatch.setattr(CausalLM, "share_prefixes", False)
    own = play(policy, prompts, sampling=sampling)
    assert shared.ended.tolist() == [[True] * 2, [False] * 2, [True] * 2]
    for name in ("ids", "present", "sampled", "turns", "ended"):
        assert torch.equal(getattr(shared, name), getattr(own, name)), name
    assert shared.episodes == own.episodes
    check_tokens(policy, own)


def test_others_are_drawn_while_an_environment_answers(qwen3, turns, pool):
    """A slow episode and quick ones: the quick ones have ended before the slow one goes on."""
    policy = load(qwen3)
    prompts = [asked(policy, worlds.Slow(), "slow"), asked(policy, worlds.Echo(), "quick")]
    order = []

    class Heard(Episodes):
        def answers(self, *, wait):
            found = super().answers(wait=wait)
            order.extend((self._rows[row].prompt.key, type(answer)) for row, answer in found)
            return found

    with Heard(pool, prompts, 2) as episodes:
        drawn = HFRollout().play(policy, prompts, SAMPLING, episodes)
    check_tokens(policy, drawn)
    assert {each.turns for group in drawn.episodes for each in group} == {3}
    ends = [key for key, kind in order if kind is Verdict]
    assert ends[0] == "quick" and ends[-1] == "slow"


def test_an_observation_that_has_no_room_is_left_out_and_ends_the_episode(qwen3, turns):
    policy = load(qwen3)
    prompts = [asked(policy, worlds.Counting(turns=9), "a")]
    glue = len(policy.chat.continuation([{"role": "user", "content": "1 steps"}])) - 1
    # Row 0 has 4, 9, 5, ... tokens a turn.
    for most, turns_taken, why in ((4 + glue, 1, FULL), (4 + glue + 1, 2, CUT), (4, 1, FULL)):
        drawn = play(policy, prompts, sampling=replace(SAMPLING, n=1, max_new_tokens=most))
        check_tokens(policy, drawn)
        ((episode,),) = drawn.episodes
        assert not drawn.ended.any() and episode.turns == turns_taken
        assert episode.verdict.feedback == f"The episode has not come to its end: {why}."
        assert drawn.extents.item() <= most


def test_a_stop_string_ends_a_turn_and_the_template_writes_the_end(qwen3, monkeypatch):
    policy = load(qwen3)
    plain = ResponseBuffer.draw
    text = policy.chat.encode("stop")

    def draw(self, logits, rows, places):
        before = self.keeps(rows, places)
        ids = plain(self, logits, rows, places)
        own = torch.tensor([text[min(max(int(p), 0), 3)] for p in places - self.turn_starts[rows]])
        at = places.clamp(max=self.ids.shape[1] - 1)
        ids = torch.where(before, self.ids[rows, at], own)
        self.ids[rows, at] = ids
        return ids

    monkeypatch.setattr(ResponseBuffer, "draw", draw)
    prompts = [asked(policy, worlds.Returns(turns=2), "a")]
    # What the environment says holds the stop string too; it ends nothing.
    monkeypatch.setattr(
        worlds.Returns,
        "step",
        lambda self, prompt, state, response: (
            worlds.Observation.said("do not stop")
            if not state.setdefault("more", 0) and not state.update(more=1)
            else worlds.Verdict(reward=1.0)
        ),
    )
    drawn = play(policy, prompts, sampling=replace(SAMPLING, n=1, stop=("op",)))
    ids = drawn.ids[0, 0].tolist()
    glue = policy.chat.continuation([{"role": "user", "content": "do not stop"}])
    assert ids == [*text, *glue, *text] and drawn.ended.all()
    assert drawn.sampled[0, 0].tolist() == [True] * 4 + [False] * len(glue) + [True] * 4


def test_an_opening_is_part_of_the_prompt(qwen3, turns):
    policy = load(qwen3)
    drawn = play(policy, [asked(policy, worlds.Opening(turns=1), "a", "Hello.")])
    (prompt,) = drawn.prompts
    assert prompt.messages[0]["content"] == "Hello. You see a door."
    assert prompt.ids == policy.chat.render(prompt.messages)
    assert {each.verdict.reward for each in drawn.episodes[0]} == {1.0}


def test_slices_joins_and_dealing_keep_episodes(qwen3, turns):
    policy = load(qwen3)
    drawn = play(policy, [asked(policy, worlds.Echo(), "a"), asked(policy, ExactMatch(), "b")])
    both = drawn[[1]].cat([drawn[[0]]])
    assert both.episodes == (drawn.episodes[1], drawn.episodes[0])
    assert both.texts[1][0] == both.episodes[1][0].transcript()


class Canned(Engine):
    """Stands in for vLLM: what it draws depends on the seed of each response, and on its room."""

    def __init__(self):
        self.asked = []

    def generate(self, policy, requests, version):
        self.asked.append(requests)
        return [
            [self.answer(request, i, version) for i in range(request.parameters["n"])]
            for request in requests
        ]

    def answer(self, request, i, version):
        draw = random.Random(request.parameters["seed"] + i)
        ids = [draw.randint(3, 250) for _ in range(draw.randint(1, 6))] + [END]
        most = request.parameters["max_tokens"]
        reason = "stop" if len(ids) <= most else "length"
        return EngineAnswer(
            ids=ids[:most],
            logprobs=[-0.5] * len(ids[:most]),
            finish_reason=reason,
            versions=frozenset([version]),
        )

    def close(self):
        pass


def test_vllm_is_asked_turn_by_turn_for_all_that_go_on(qwen3):
    """By ids that were drawn and given, each turn from a seed of its own."""
    policy = load(qwen3)
    prompts = [
        asked(policy, worlds.Echo(), "a"),
        asked(policy, ExactMatch(), "b"),
        asked(policy, worlds.Counting(turns=9), "c", "Why?"),
    ]

    def drawn_with(engine, prompts):
        with Episodes(HERE, prompts, 2) as episodes:
            sampling = replace(SAMPLING, max_new_tokens=130)
            return VLLMRollout(engine).play(policy, prompts, sampling, episodes)

    engine = Canned()
    drawn = drawn_with(engine, prompts)
    check_tokens(policy, drawn)
    assert drawn.ended.tolist() == [[True] * 2, [True] * 2, [False] * 2]
    assert [[each.turns for each in group] for group in drawn.episodes][:2] == [[3] * 2, [1] * 2]
    assert [len(requests) for requests in engine.asked[:3]] == [3, 4, 4]
    seeds = [r.parameters["seed"] for requests in engine.asked[1:] for r in requests]
    assert len({*seeds}) == len(seeds)
    for q in (0, 2):
        for g in range(2):
            whole = [*drawn.prompts[q].ids, *drawn.ids[q, g].tolist()]
            for requests in engine.asked[1:3]:
                request = requests[g if q == 0 else 2 + g]
                assert list(request.ids) == whole[: len(request.ids)]
                used = len(request.ids) - len(drawn.prompts[q].ids)
                assert request.parameters["max_tokens"] == 130 - used
    assert (drawn.sampling_logprobs == -0.5 * drawn.sampled).all()
    # Whatever else is in the batch.
    (alone,) = drawn_with(Canned(), prompts[2:]).episodes
    assert alone == drawn.episodes[2]
