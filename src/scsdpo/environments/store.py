"""A store that is operated by calls: a small, exact world with rules that no text states."""

from dataclasses import dataclass, field, replace

from scsdpo.environments.calling import answered
from scsdpo.prompt import Environment, Observation, Prompt, Verdict

GOODS = (
    *("beads", "books", "cups", "drums"),
    *("figs", "hats", "keys", "lamps"),
    *("nuts", "pens", "rugs", "toys"),
)
CITIES = ("Bonn", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome")
WRAPPED = ("books", "figs", "lamps", "nuts", "pens", "rugs")
"""Goods that must be wrapped, one half; their names do not say so."""
COOLED = ("Cairo", "Lima", "Paris", "Rome")
"""Cities to which parcels must be cooled, one half; their names do not say so."""


@dataclass(kw_only=True, slots=True)
class Parcel:
    """The state of the store and of a parcel. Its methods are the tools."""

    stock: dict[str, int]
    taken: dict[str, int] = field(default_factory=dict)
    is_wrapped: bool = False
    is_cooled: bool = False
    city: str = ""
    """The city that it was sent to; empty: not sent yet."""
    turns: int = 0

    def count(self, good: str) -> str:
        """The number of pieces in stock."""
        return str(self.stock.get(good, 0))

    def take(self, good: str, number: int) -> str:
        """Put pieces into the parcel."""
        self._open()
        if type(number) is not int or not 1 <= number <= self.stock.get(good, 0):
            raise ValueError("there are not so many")
        self.stock[good] -= number
        self.taken[good] = self.taken.get(good, 0) + number
        return "ok"

    def wrap(self) -> str:
        """Wrap the content of the parcel."""
        self._filled()
        self.is_wrapped = True
        return "ok"

    def cool(self) -> str:
        """Cool the content of the parcel."""
        self._filled()
        self.is_cooled = True
        return "ok"

    def send(self, city: str) -> str:
        """Send the parcel."""
        self._filled()
        self.city = str(city)
        return "ok"

    def _open(self) -> None:
        if self.city:
            raise ValueError("the parcel is gone")

    def _filled(self) -> None:
        self._open()
        if not self.taken:
            raise ValueError("the parcel is empty")


@dataclass(frozen=True, kw_only=True)
class Store(Environment):
    """Sends all of a good but a given number, in three to five calls.

    `Send figs to Oslo, keep 2.` is right iff all figs but 2 are sent to Oslo, wrapped iff figs must
    be wrapped, and cooled iff parcels to Oslo must be cooled. Only `count` tells the number of figs
    in stock. Which goods must be wrapped, and to which cities parcels must be cooled, are rules of
    the store. No request and no tool states them: only the verdict depends on them, and the
    feedback, which the policy does not read. The episode ends when the parcel is sent, with a
    response without calls, or at turn `max_turns`.

    The row has `good`, `city`, `keep`, and `stock`, the number in stock.

    Args:
        wrapped: goods that must be wrapped.
        cooled: cities to which parcels must be cooled.
        max_turns: limit on the responses of an episode.

    Raises:
        ValueError: if `max_turns` < 1.
    """

    wrapped: tuple[str, ...] = WRAPPED
    cooled: tuple[str, ...] = COOLED
    max_turns: int = 6

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ValueError(f"`Store(max_turns=...)` must be >= 1, got {self.max_turns}")

    def roles(self, prompt: Prompt) -> tuple[str, ...]:
        """The tools' role. The prompt does not list the tools, which are always the same."""
        return ("tool",)

    def begin(self, prompt: Prompt) -> Parcel:
        """An empty parcel, and the stock of the row."""
        return Parcel(stock={prompt.row["good"]: prompt.row["stock"]})

    def step(self, prompt: Prompt, state: Parcel, response: str) -> Observation | Verdict:
        """The tools' answers; once the parcel is sent, the verdict."""
        state.turns += 1
        before = dict(state.taken)
        tools = (state.count, state.take, state.wrap, state.cool, state.send)
        observed = answered({tool.__name__: tool for tool in tools}, prompt, response, "tool")
        if state.city or observed is None or state.turns == self.max_turns:
            return self._verdict(prompt, state)
        if state.taken == before:
            return observed
        return replace(observed, feedback=_of_number(prompt, state))

    def finish(self, prompt: Prompt, state: Parcel, response: str, why: str) -> Verdict:
        """The verdict on the calls so far."""
        return self._verdict(prompt, state)

    def _verdict(self, prompt: Prompt, state: Parcel) -> Verdict:
        if not state.city:
            return Verdict(reward=0.0, feedback="Nothing was sent.")
        good, city = prompt.row["good"], prompt.row["city"]
        wrong = (
            "" if state.city == city else f"The parcel was to go to {city}.",
            _of_care(f"What holds {good}", "wrapped", good in self.wrapped, state.is_wrapped),
            _of_care(f"What goes to {city}", "cooled", city in self.cooled, state.is_cooled),
        )
        taken = ", ".join(f"{number} {name}" for name, number in sorted(state.taken.items()))
        care = " wrapped" * state.is_wrapped + " cooled" * state.is_cooled
        return Verdict(
            reward=float(not any(wrong) and not _of_number(prompt, state)),
            answer=f"{taken}{care} to {state.city}",
            feedback=" ".join(filter(None, wrong)),
        )


def _of_number(prompt: Prompt, parcel: Parcel) -> str:
    """Feedback on the number that was taken; empty: it is right."""
    good, stock = prompt.row["good"], prompt.row["stock"]
    wanted = stock - prompt.row["keep"]
    if parcel.taken == {good: wanted}:
        return ""
    return f"There were {stock}, so {wanted} had to be taken."


def _of_care(what: str, how: str, needed: bool, done: bool) -> str:
    """Feedback on wrapping or cooling; empty: it is right."""
    if needed == done:
        return ""
    return f"{what} must {'' if needed else 'not '}be {how}."
