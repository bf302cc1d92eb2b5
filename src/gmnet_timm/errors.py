"""Errors that tell users what to mend."""


class UserError(Exception):
    """Something the user can mend. The command line prints its message alone, without a traceback."""


class MissingExtraError(UserError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed. Install it with: pip install 'gmnet-timm[{extra}]'")
