"""The one error type of the lab."""


class LabError(Exception):
    """A mistake that the user can put right. Its text is one line that says what to do."""
