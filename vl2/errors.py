"""The one exception of the user's world; anything else that escapes is a defect of ours."""


class VL2Error(Exception):
    """Bad input, files or surroundings: what happened with the value, what was expected, how to mend it.

    The command line prints it without a traceback and exits with 1.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"
