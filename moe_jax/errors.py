"""The exceptions that are no defects, and the exit statuses by which a supervisor knows what to do.

Command lines print their sentence; any other exception is a defect and keeps its traceback.
"""

MISTAKEN = 2  # a restart would meet the same error
PREEMPTED = 75  # EX_TEMPFAIL: a checkpoint is saved, start me again
UNAVAILABLE = 69  # EX_UNAVAILABLE: a bucket does not answer, start me again
INTERRUPTED = 130  # by Ctrl-C, as a shell calls it
HUNG = 86  # the watchdog ended the process: start me again


class UserError(Exception):
    """One sentence that names the cause and the mend."""


class Preempted(Exception):
    """The run was told to end and has saved the step that it names."""
