"""Selections: which judged groups go into an optimizer step, and when the step is taken."""

from scsdpo.selection._base import Everything, Selection
from scsdpo.selection.pool import InformativePool

__all__ = ["Everything", "InformativePool", "Selection"]
