"""Other people's errors, in words of our own messages."""

from __future__ import annotations

import re

# Escape sequences with which libraries colour their messages.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LONGEST = 160


def uncoloured(error: BaseException) -> str:
    """An error's text without escape sequences."""
    return COLOURS.sub("", str(error)).strip()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, not too long; its type where it has no text."""
    lines = uncoloured(error).splitlines()
    return lines[0][:LONGEST] if lines else type(error).__name__
