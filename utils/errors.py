"""Errors that a script reports in one line: what is wrong, where, and what to do about it."""


class UserError(Exception):
    """The user's input cannot be used. Scripts print the message as one line and exit with a non-zero status."""


class ConfigError(UserError):
    """An option or a saved configuration is unknown, malformed or contradictory."""
