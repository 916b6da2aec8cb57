"""Streams of questions, in a module that other processes can import."""

import json
from pathlib import Path

from coins import Coin
from scsdpo.data import Stream, make_prompt


class Lines(Stream):
    """A question each line of a file."""

    def __init__(self, path: str, size: int = 8, window: int = 4):
        super().__init__(size=size, window=window)
        self.path = path

    @property
    def name(self):
        return Path(self.path).stem

    def read(self):
        with open(self.path) as file:
            for line in file:
                yield make_prompt(self.name, question=line.strip(), answer="", verifier=Coin())


class Counting(Stream):
    """0, 1, 2, ... without end; every fifth question is long."""

    def __init__(self, size: int = 100, window: int = 10):
        super().__init__(size=size, window=window)

    @property
    def name(self):
        return "counting"

    def read(self):
        number = 0
        while True:
            question = f"{number} {'long ' * 20}" if number % 5 == 4 else f"{number} "
            yield make_prompt("counting", question=question, answer="", verifier=Coin())
            number += 1


def lines(path, numbers):
    path.write_text("".join(f"{n}\n" for n in numbers))
    return str(path)


def rows(path, count):
    path.write_text(
        "".join(json.dumps({"question": f"{n}?", "answer": n}) + "\n" for n in range(count))
    )
    return str(path)
