"""A package: pytest would put the folder on `sys.path` otherwise, and `vllm` would be importable."""
