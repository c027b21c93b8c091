"""The boundary to the store: whatever a store raises, its callers get `StorageUnavailable` and nothing else.

A store is a plug-in. If one raises a `TypeError`, usage counting, pages and the shutdown must still work.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

from multiverse_gateway.core.errors import GatewayError, StorageRefused
from multiverse_gateway.protocols import ResponseStore, Store, methods_of

CALLS = (methods_of(Store) | methods_of(ResponseStore)) - {"open"}
"""The calls of a store whose errors are translated. An error of `open` stops the start, and the author of the store needs to see it."""

_log = logging.getLogger("multiverse_gateway.registry")


class _CheckedStore:
    """Forward all calls to a store, and translate the errors that they raise."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._failing: set[tuple[str, str]] = set()

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._store, name)
        if name not in CALLS:
            return member
        checked = self._checked(name, member)
        setattr(self, name, checked)
        return checked

    def _checked(self, name: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @wraps(call)
        async def checked(*arguments: Any, **named: Any) -> Any:
            try:
                return await call(*arguments, **named)
            except GatewayError:
                raise
            except Exception as error:
                self._note(name, error)
                raise StorageRefused(
                    "The store failed unexpectedly; inference continues. The cause is in the gateway's log.",
                    retry_after=60.0,
                ) from error

        return checked

    def _note(self, name: str, error: Exception) -> None:
        """Log where the store failed, once for each call and kind of error, without the text of the error, which may contain secrets."""
        kind = type(error).__name__
        if (name, kind) in self._failing:
            return
        self._failing.add((name, kind))
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
        _log.error("the store failed unexpectedly", extra={"fields": {"call": name, "error": kind, "where": where}})


def with_store_errors(store: Store) -> Store:
    """Return a store whose calls raise nothing but a `GatewayError`: anything else becomes a `StorageRefused`."""
    return cast(Store, _CheckedStore(store))
