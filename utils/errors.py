"""Errors that a script reports in one line: what is wrong, where, and what to do about it."""


class UserError(Exception):
    """The user's input cannot be used. Scripts print the message as one line and exit with a non-zero status."""


class ConfigError(UserError):
    """An option or a saved configuration is unknown, malformed or contradictory."""


class FlagError(ConfigError):
    """A flag of the command line is unknown, malformed, not permitted, or contradicts another; scripts exit with 2."""


def lfs_pointer(data: bytes) -> str | None:
    """Reason why a file is unreadable of which Git LFS has left only the pointer; None if it is another file."""
    return (
        "a Git LFS pointer, not the file itself: git lfs pull" if data.startswith(b"version https://git-lfs") else None
    )
