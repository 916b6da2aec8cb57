"""The real vLLM, on CPU: `make test-vllm`. Nothing here is skipped: without vLLM it fails."""

VLLMS_OWN = (
    "ignore:.*torch.distributed.reduce_op:FutureWarning",
    "ignore:.*NUMA binding:UserWarning",
)
"""Warnings of vLLM 0.32 itself under torch 2.13."""


def pytest_configure(config):
    for line in VLLMS_OWN:
        config.addinivalue_line("filterwarnings", line)
