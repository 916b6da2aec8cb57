"""A package, or pytest would put this folder on `sys.path`, where `vllm` is the name of a library."""
