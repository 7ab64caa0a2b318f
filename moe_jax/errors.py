"""The one exception that means "the user can mend this".

Command lines print its sentence and exit with status 2; any other exception is a defect and keeps its traceback.
"""


class UserError(Exception):
    """One sentence that names the cause and the mend."""
