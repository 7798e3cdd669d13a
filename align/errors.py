"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Something the user gave cannot work.

    Its message names the file, row, field or key and says how to mend it; the command line prints it without a
    traceback and exits with code 2.
    """
