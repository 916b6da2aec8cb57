"""Analyses of a policy and its teacher, without training."""
