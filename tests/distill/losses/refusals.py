"""A loss that refuses what cannot be right."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refused_in_one_line(call: Callable[[], object], says: str) -> None:
    """Fails unless the call raises ValueError with one line that the pattern `says` matches."""
    with pytest.raises(ValueError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)
