"""Errors a user can act on. The command line prints them as one line; from Python they are ordinary ValueErrors."""


class ConfigError(ValueError):
    """A setting, file or argument that cannot be used: what was given, what was expected, what to do."""
