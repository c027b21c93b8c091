"""How evenly something is shared out."""

from collections.abc import Iterable


def jain(values: Iterable[float]) -> float:
    """Return Jain's index of fairness: 1 if all values are equal, 1/n if one has everything; 1 for no values, or only zeros.

    >>> jain([3.0, 3.0]), jain([6.0, 0.0])
    (1.0, 0.5)
    """
    numbers = list(values)
    squares = sum(value * value for value in numbers)
    return 1.0 if not squares else sum(numbers) ** 2 / (len(numbers) * squares)
