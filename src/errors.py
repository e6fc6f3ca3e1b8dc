"""The one error that a person can mend."""


class UserError(Exception):
    """A mistake in what was asked for.

    Its message is all that the person sees: what was given, what is accepted, which key to change.
    """
