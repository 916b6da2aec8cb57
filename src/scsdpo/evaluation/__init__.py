"""Evaluation: what a policy and its teacher can do, measured without training."""
