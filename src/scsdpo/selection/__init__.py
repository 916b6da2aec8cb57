"""Selection: which judged groups go into an optimizer step, and when is it taken?"""

from scsdpo.selection._base import Everything, Judged, Selection
from scsdpo.selection.pool import InformativePool, joined, one_group

__all__ = ["Everything", "InformativePool", "Judged", "Selection", "joined", "one_group"]
