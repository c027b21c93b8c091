"""How the pages write numbers, durations, sizes and lists in text."""

import re
from collections.abc import Sequence


def count(number: int, thing: str) -> str:
    """Return a number with the noun it counts.

    >>> count(1, "server"), count(1200, "server")
    ('1 server', '1,200 servers')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def span(seconds: float) -> str:
    """Return a duration in the one or two units that fit it.

    >>> span(8), span(90), span(5400), span(200_000)
    ('8 s', '1 min', '1 h 30 min', '2 days')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 >= 60 else "")
    return f"{whole // 86_400} days"


def listed(names: Sequence[str], most: int = 2) -> str:
    """Return names joined for a sentence, at most `most` of them.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c", "d"])
    ('a', 'a and b', 'a, b and 2 more')
    """
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join(shown)


def shortened(name: str, most: int = 40) -> str:
    """Return a name with at most `most` characters; an ellipsis stands for the end that does not fit.

    >>> shortened("llama3.2:3b"), shortened("a-model-with-a-long-name", 10)
    ('llama3.2:3b', 'a-model-w…')
    """
    return name if len(name) <= most else name[: most - 1] + "…"


def size(number: int) -> str:
    """Return a number of bytes in the unit that fits it.

    >>> size(900), size(1_500_000)
    ('900 bytes', '1.4 MiB')
    """
    if number < 1024:
        return f"{number} bytes"
    return f"{number / 1024:.0f} KiB" if number < 1 << 20 else f"{number / (1 << 20):.1f} MiB"


def sentence(message: str) -> str:
    """Return words as a sentence, with a capital letter at the start and a full stop at the end.

    >>> sentence("connection refused")
    'Connection refused.'
    """
    text = message.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def bare_url(url: str) -> str:
    """Return a URL without its scheme, for which tables have no room.

    >>> bare_url("https://amber-otter.ngrok-free.app")
    'amber-otter.ngrok-free.app'
    """
    return re.sub(r"^https?://", "", url)


def percent(share: float) -> str:
    """Return a share from 0 to 1 in percent: whole below 99 %, and never rounded up to 100 %.

    >>> percent(0.4641), percent(0.99528), percent(0.99999), percent(1.0)
    ('46 %', '99.52 %', '99.99 %', '100 %')
    """
    if share >= 1.0:
        return "100 %"
    return f"{int(10_000 * share) / 100:g} %" if share >= 0.99 else f"{int(100 * share)} %"


def speed(tokens_per_second: float) -> str:
    """Return a speed for people.

    >>> speed(4.21), speed(42.4)
    ('4.2 tokens/s', '42 tokens/s')
    """
    return f"{tokens_per_second:.1f} tokens/s" if tokens_per_second < 10 else f"{tokens_per_second:,.0f} tokens/s"
