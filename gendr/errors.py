"""Other people's errors, in words of our own messages."""

from __future__ import annotations

import re

# Escape sequences with which libraries colour their messages.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LONGEST = 160


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without colours and not too long; its type where it has none."""
    lines = COLOURS.sub("", str(error)).strip().splitlines()
    return lines[0][:LONGEST] if lines else type(error).__name__
