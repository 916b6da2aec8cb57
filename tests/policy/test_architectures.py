"""Every architecture has a row in the table; the self-check of twenty of them."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.append(str(Path(__file__).parents[1] / "models"))

from outcomes import PAGE, outcome, plain_logprobs
from table import NAMES, OVERRIDES, SKIPPED

PACKED = (
    "llama",
    "qwen3",
    "gemma3_text",
    "olmo3",
    "phi3",
    "gpt2",
    "opt",
    "mixtral",
    "lfm2",
    "qwen3_5_text",
)
APART = (
    *("mamba", "falcon_h1", "stablelm", "nemotron", "bloom", "mpt", "gptj", "jamba"),
    *("bamba", "olmo_hybrid", "granitemoehybrid"),
)


def test_no_row_of_the_table_is_of_an_unknown_architecture():
    assert set(NAMES) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not {*OVERRIDES, *SKIPPED} - set(NAMES) and len(SKIPPED) <= 15


def test_the_page_has_a_line_for_every_architecture():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == [
        f"| {name}" for name in NAMES
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PACKED, *APART])
def test_rows_say_what_plain_transformers_says(name):
    found, policy = outcome(name)
    assert policy is not None, found
    assert (found.path == "packed, prompts shared") == (name in PACKED), found
    ours, plain = plain_logprobs(policy)
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=0)
