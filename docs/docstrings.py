"""Griffe's extension for the site: docstrings are prose with shapes, and Markdown has links."""

import ast
from typing import Any

import griffe


class Shapes(griffe.Extension):
    """`[Q][G]` is a shape, and no link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was found."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")

    def on_function_node(self, *, node: ast.AST | griffe.ObjectNode, **_: Any) -> None:
        """Called before a function is read: one that is `declared` (`contracts`) is a property."""
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Name) and decorator.id == "declared":
                decorator.id = "property"
