"""Rows as `benchmarks/real.py` makes them."""


def row(method, seed, after, *, policy="smol", device="CPU", **changes):
    return {
        "method": method,
        "seed": seed,
        "policy": policy,
        "device": device,
        "words": [],
        "done": True,
        "batches": 30,
        "cpu_seconds": 600.0,
        "mean@8": after,
        "mean@8 before": 0.25,
        "maj@8": after,
        "maj@8 before": 0.5,
        "validation": {"0": 0.25, "30": after},
        "response_length": [30.0, 10.0],
        "truncated": [0.5, 0.25],
        "entropy": [2.0, 1.0],
        "pass_rate": [0.125, after],
        "warnings": {},
        **changes,
    }


def cut_off(method, seed, **changes):
    changes = {"done": False, "batches": 16, "cpu_seconds": None, "maj@8": None} | changes
    return row(method, seed, None, **changes, validation={"0": 0.25, "15": 0.125})
