"""TRL's and verl's words lead to keys of ours that exist, and stand on the page of words."""

import re
from pathlib import Path

import pytest

import scsdpo
import scsdpo.advantage
import scsdpo.data
import scsdpo.policy
import scsdpo.reduction
import scsdpo.rollout
import scsdpo.weighting
from scsdpo.cli.catalog import catalog
from scsdpo.cli.config_types import arguments, classes, concrete
from scsdpo.cli.other_words import TRL, VERL, our_key
from scsdpo.cli.parser import SECTIONS

PAGE = Path(__file__).parents[2] / "docs" / "words.md"
ROWS = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
WORDS = [(1, word, said) for word, said in TRL.items()]
WORDS += [(2, word, said) for word, said in VERL.items()]


def exists(key):
    top, name, *rest = key.split(".")
    if name not in catalog().section_arguments()[top]:
        return False
    kinds = classes(arguments(SECTIONS[top])[name]) if rest else []
    for inner in rest:
        hints = [arguments(kind)[inner] for kind in concrete(kinds) if inner in arguments(kind)]
        if not hints:
            return False
        kinds = [kind for hint in hints for kind in classes(hint)]
    return True


@pytest.mark.parametrize(("column", "word", "said"), WORDS)
def test_a_word_of_theirs_leads_to_a_key_that_exists(column, word, said):
    for key in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", said.replace("torch.optim", "")):
        assert exists(key.removesuffix(".lr_scheduler") if "torch" in key else key), key
    for name in re.findall(r"\b[A-Z][a-z]+[A-Z]\w+", said):
        rooms = (scsdpo.advantage, scsdpo.reduction, scsdpo.rollout, scsdpo.weighting, scsdpo.data)
        assert any(hasattr(room, name) for room in rooms) or name == "LinearLR", name
    assert any(word in row[column] for row in ROWS if len(row) > 3), f"{word} is not on the page"


def test_a_word_of_nobody_s_says_nothing():
    assert our_key("nonsense") == ""
    assert our_key("test_freq") == (
        "no such key; verl's test_freq is here trainer.val_check_interval, in batches "
        "(docs/words.md)"
    )
