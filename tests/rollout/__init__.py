"""A package, so that pytest does not put this folder on `sys.path`, with `vllm` in it."""
