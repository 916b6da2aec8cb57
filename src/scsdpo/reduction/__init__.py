"""Reduction: how token losses add up to one number."""

from scsdpo.reduction.reduction import Over, Reduction, SequenceMean, TokenMean, TokenSum

__all__ = ["Over", "Reduction", "SequenceMean", "TokenMean", "TokenSum"]
