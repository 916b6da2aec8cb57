"""Griffe's extension for the site: docstrings are prose with shapes, and Markdown has links."""

from typing import Any

import griffe


class Shapes(griffe.Extension):
    """`[Q][G]` is a shape, and no link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was found."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")
