"""Make addresses of servers of what people paste."""

import re

_PATHS = re.compile(r"/(?:v1/)?(?:chat/completions|completions|models|embeddings|chat)/?$|/v1(?:/[a-z/]*)?$")


def pasted(text: str) -> str:
    """Make an address of what was pasted: a scheme in front, and without what programs add to an address by themselves.

    >>> pasted("192.168.1.20:11434/v1/chat/completions"), pasted("<https://otter.ngrok-free.app/v1>")
    ('http://192.168.1.20:11434', 'https://otter.ngrok-free.app')
    """
    text = text.strip().strip("<>\"'`")
    if text and "://" not in text:
        text = f"{_scheme(text)}://{text}"
    return _PATHS.sub("", text)


def _scheme(text: str) -> str:
    """Guess the scheme: names of the internet are reached by TLS, computers nearby and ports without."""
    host, colon, _ = text.split("/")[0].partition(":")
    return "http" if colon or "." not in host or re.fullmatch(r"[0-9.]+", host) else "https"
