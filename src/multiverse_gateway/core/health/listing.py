"""What it means that a server does not list its registered model: nothing, if it answers requests for the model all the same.

1. Such a server passes its probes with a warning, and needs attention, until it has answered a request for the model.
2. The answer counts until the server says that it does not have the model, or lists it. All processes learn of it, because the stored
   warning says so: these sentences are stored, so code that rewords one must still recognize the old one.
"""

UNLISTED = "the server does not list the registered model: is the name spelled correctly?"
EMPTY_LIST = "the server lists no models: is one loaded?"
ANSWERS_UNLISTED = "the server does not list the registered model, but it answers requests for it"


def is_doubtful(warning: str | None) -> bool:
    """Return whether a warning says that the server may not have its model.

    >>> is_doubtful(UNLISTED), is_doubtful(ANSWERS_UNLISTED), is_doubtful(None)
    (True, False, False)
    """
    return warning in (UNLISTED, EMPTY_LIST)


def has_answered_unlisted(warning: str | None) -> bool:
    """Return whether a warning says that the server answers requests for its model although it does not list it."""
    return warning == ANSWERS_UNLISTED


def after_probe(before: str | None, found: str | None) -> str | None:
    """Return the warning after a probe: an earlier answer to a request for the model outweighs that the list lacks it.

    >>> after_probe(ANSWERS_UNLISTED, UNLISTED) == ANSWERS_UNLISTED, after_probe(UNLISTED, None)
    (True, None)
    """
    return before if has_answered_unlisted(before) and is_doubtful(found) else found


def after_answer(before: str | None) -> str | None:
    """Return the warning after the server has answered a request for the model.

    >>> after_answer(UNLISTED) == ANSWERS_UNLISTED, after_answer("slow")
    (True, 'slow')
    """
    return ANSWERS_UNLISTED if is_doubtful(before) else before


def after_refusal(before: str | None) -> str | None:
    """Return the warning after the server has said that it does not have the model.

    >>> after_refusal(ANSWERS_UNLISTED) == UNLISTED, after_refusal(None)
    (True, None)
    """
    return UNLISTED if has_answered_unlisted(before) else before
