"""Which parameters of a test `make test` leaves to `make check`."""

import pytest


def later(*values):
    """Parameters of the mark `check`; a tuple is one for several arguments."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.check) for v in values]
