"""`make test-bfcl` puts the package on PYTHONPATH, out of the way of the others."""

import pytest

bfcl_eval = pytest.importorskip("bfcl_eval", reason="`make test-bfcl` installs bfcl-eval")
