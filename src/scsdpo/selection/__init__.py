"""Selection: which judged groups go into an optimizer step, and when is it taken?"""

from scsdpo.selection._base import Everything, Selection
from scsdpo.selection.pool import InformativePool

__all__ = ["Everything", "InformativePool", "Selection"]
