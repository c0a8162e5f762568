"""The two ways in which a command ends badly on purpose, and the exit codes that tell them apart.

A managed job retries the transient code and nothing else, so the codes are part of the contract with the task YAMLs.
"""

EXIT_OK = 0
EXIT_MISSING = 1
"""`doctor` or `data check` found something that is needed and absent or wrong."""
EXIT_USER_ERROR = 2
"""A broken config, data set or argument: running it again changes nothing."""
EXIT_TRANSIENT = 75
"""Stopped by the machine, not by the work (preemption, Ctrl-C): running it again goes on. EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: where it is, what was expected, what to do."""


class NotEstimated(UserError):
    """A run whose work or memory cannot be estimated beforehand; it may be launched all the same."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
