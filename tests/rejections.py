# SPDX-License-Identifier: Apache-2.0
"""What every error for a wrong argument has to be like."""

import pytest


def assert_rejected(kind, name, parts, function, *args, **options):
    """Check the type of the error and that its message starts with the argument and contains every part."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(f"{name}: expected "), message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in {message!r}"
