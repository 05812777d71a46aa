"""Text from outside, made fit for a terminal: a name must not move the cursor, set a title or hide what is there."""

from __future__ import annotations


def printable(text: object) -> str:
    """Show control, format and undecodable characters as escapes, as `repr` does, and any white space as a space.

    Args:
        text: a name, a path, a message of an error: whatever ``str`` makes of it.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
