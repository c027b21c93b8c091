"""Which content encodings a client accepts (RFC 9110, 12.5.3)."""


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether a client accepts gzip; a header that cannot be read accepts nothing.

    >>> accepts_gzip("br;q=1.0, GZIP;q=0.5"), accepts_gzip("*"), accepts_gzip("gzip;q=0, *"), accepts_gzip("identity"), accepts_gzip("")
    (True, True, False, False, False)
    """
    qualities: dict[str, float] = {}
    for part in accept_encoding.lower().split(","):
        coding, _, parameter = part.partition(";")
        name, _, value = parameter.partition("=")
        try:
            qualities[coding.strip()] = float(value) if name.strip() == "q" else 1.0
        except ValueError:
            qualities[coding.strip()] = 0.0
    return qualities.get("gzip", qualities.get("x-gzip", qualities.get("*", 0.0))) > 0
