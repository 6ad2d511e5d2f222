"""`kizu watch`: options that cannot be used are the command line's fault."""

from __future__ import annotations

import pytest

from edge.commands.watch import watch
from edge.errors import CommandError


def test_a_malformed_camera_is_refused_before_anything_is_opened() -> None:
    """Exit status 2; a subscription to it would wait for ever."""
    with pytest.raises(CommandError, match="--camera 'Left'") as refused:
        watch("tcp://127.0.0.1:9", camera=["left", "Left"])

    assert refused.value.exit_code == 2
