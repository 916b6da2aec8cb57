"""What can be said of several ranks with one: refusals, and who gets which question."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import FSDPStrategy

from scsdpo.errors import ConfigurationError
from scsdpo.policy import CausalLM, Lora
from scsdpo.policy.shard_loading import load_shards
from scsdpo.policy.sharding import flat_mesh
from scsdpo.training.balancing import balanced, split


class Mesh(SimpleNamespace):
    def __getitem__(self, name):
        return SimpleNamespace(size=lambda: self.along[name])

    def size(self):
        return 4


def under(strategy=None, mesh=None):
    return SimpleNamespace(_trainer=SimpleNamespace(strategy=strategy), device_mesh=mesh)


def test_without_a_mesh_weights_are_whole():
    assert flat_mesh(under()) is None


def test_a_mesh_along_which_not_all_ranks_lie_is_refused():
    with pytest.raises(ConfigurationError, match=r"over all 4 ranks.*use FullySharded"):
        flat_mesh(under(mesh=Mesh(along={"data_parallel": 1})))
    assert flat_mesh(under(mesh=Mesh(along={"data_parallel": 4}))) is not None


def test_another_way_to_shard_is_refused():
    with pytest.raises(ConfigurationError, match=r"FSDPStrategy .* use FullySharded"):
        flat_mesh(under(FSDPStrategy()))


def test_factors_of_lora_are_not_gathered_in_bfloat16(qwen3):
    with pytest.raises(ValueError, match=r"gathered_dtype='bfloat16'.* to auto"):
        CausalLM(str(qwen3), adapter=Lora(), gathered_dtype="bfloat16")


def test_a_checkpoint_that_is_not_safetensors_cannot_be_read_in_parts(tmp_path):
    with pytest.raises(ConfigurationError, match=r"only safetensors .* save it once"):
        load_shards(SimpleNamespace(), str(tmp_path))


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 5))
def test_every_question_goes_to_one_rank_and_loads_differ_by_one_question_at_most(costs, ranks):
    given_to = balanced(costs, ranks)
    assert sorted(i for items in given_to for i in items) == list(range(len(costs)))
    loads = [sum(costs[i] for i in items) for items in given_to]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_the_dearest_questions_do_not_meet():
    assert balanced([9, 1, 8, 2], 2) == [[0, 1], [2, 3]]


def test_a_batch_is_split_in_nearly_equal_parts():
    assert split(7, 3) == (3, 2, 2) and split(2, 3) == (1, 1, 0)
