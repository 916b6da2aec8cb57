"""Sampling with the policy itself, by transformers."""
