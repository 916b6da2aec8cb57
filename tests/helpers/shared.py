"""Reference data that lies beside the checkout in development and CI, and is not shipped."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="reference data (../shared) is not on this machine"
)
