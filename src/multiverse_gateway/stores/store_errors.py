"""The errors that several stores raise, in the same words for all of them."""

from multiverse_gateway.core.errors import ServerNotFound, StorageRefused, StorageUnavailable


def unavailable() -> StorageUnavailable:
    """Return the error of a database that cannot be reached, read or written now."""
    return StorageUnavailable(
        "The registry cannot be read or written now; inference continues. Try again later. The cause is in the gateway's log.",
        retry_after=5.0,
    )


def refused() -> StorageRefused:
    """Return the error of a database that rejects the values which it was given."""
    return StorageRefused("The database rejects this data; inference continues. The cause is in the gateway's log.", retry_after=60.0)


def removed_meanwhile() -> ServerNotFound:
    """Return the error of a change to a server that was removed: nothing brings it back, not even a change that began before."""
    return ServerNotFound("This server was removed in the meantime; register it again")
