"""Tables and lines on standard output."""

from typing import Any

from rich.console import Console
from rich.text import Text

from scsdpo.io.text import printable


class Terminal(Console):
    """Shows strings literally: no markup, no emoji codes, control characters escaped."""

    def __init__(self) -> None:
        super().__init__(markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)
