"""Sampling with vLLM servers, found by URL."""
