"""The exceptions that end a command with one line on stderr instead of a traceback."""


class UserError(Exception):
    """Something its reader can mend. The message is one line: the option or file, what is wrong with it, what to do."""

    exit_status = 1


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_status = 2
