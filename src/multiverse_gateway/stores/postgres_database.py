"""Connections to PostgreSQL: a pool for calls, one that listens for changes, and what becomes of errors.

Nothing waits longer than `PATIENCE` seconds for the database. A lost connection is `StorageUnavailable`; a later call connects again.
"""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import anyio

from multiverse_gateway.core.errors import StorageUnavailable
from multiverse_gateway.settings.checks import UnusableSetting
from multiverse_gateway.stores.store_errors import refused, unavailable

try:
    import psycopg
    import psycopg.conninfo
    import psycopg.rows
    import psycopg.sql
    import psycopg_pool
except ImportError:
    raise ImportError("PostgreSQL needs an extra package: pip install 'multiverse-gateway[postgres]'") from None

PATIENCE = 5.0
"""Seconds that one call may take, connecting included."""
START_PATIENCE = 30.0
"""Seconds that opening may take, because another gateway may be creating the tables."""
PAUSE = 1.0
"""Seconds in which nothing is asked after the database did not answer: the calls that wait behind a failed one fail at once."""
GATHER_SECONDS = 0.05
"""How long to wait for further changes after one: an import of a thousand servers is not read a thousand times."""
MOST_CONNECTIONS = 4
CHANNEL = "multiverse_gateway"
LOCK = 0x6D7667
"""The advisory lock under which tables are created and keys are encrypted again."""

REFUSALS = (psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError, psycopg.NotSupportedError, UnicodeError)
"""What PostgreSQL or its driver raises for values that it cannot hold: the same call fails again."""

Row = dict[str, Any]
Cursor = psycopg.AsyncCursor[Row]
Connection = psycopg.AsyncConnection[Row]

logging.getLogger("psycopg").addHandler(logging.NullHandler())  # it reports lost connections; so do we, once


class PostgresDatabase:
    """One database. Nothing is opened before `open()`; `now` is monotonic."""

    def __init__(self, url: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self._now = now
        self._pool: psycopg_pool.AsyncConnectionPool[Connection] | None = None
        self._listener: Connection | None = None
        self._silent_until = 0.0

    async def open(self, prepare: Callable[[Cursor], Awaitable[None]]) -> None:
        """Connect, and run `prepare` alone in one transaction before anything else.

        Raises:
            StorageUnavailable: The database cannot be used; the message says why and what to do.
        """
        try:
            with anyio.fail_after(START_PATIENCE):
                async with self.alone() as cursor:
                    await prepare(cursor)
        except (psycopg.Error, OSError) as error:
            raise StorageUnavailable(_cannot_open(self.url, error)) from error
        self._pool = psycopg_pool.AsyncConnectionPool(
            conninfo(self.url),
            connection_class=psycopg.AsyncConnection[Row],
            kwargs={"autocommit": True, "row_factory": psycopg.rows.dict_row},
            configure=_configure,
            check=psycopg_pool.AsyncConnectionPool.check_connection,
            min_size=1,
            max_size=MOST_CONNECTIONS,
            timeout=PATIENCE,
            reconnect_timeout=0.0,  # each call tries again instead: the pool's own pauses would grow to minutes
            open=False,
        )
        await self._pool.open()

    async def aclose(self) -> None:
        """Close all connections to the database."""
        pool, self._pool = self._pool, None
        listener, self._listener = self._listener, None
        if listener is not None:
            await listener.close()
        if pool is not None:
            await pool.close(timeout=1.0)

    async def connect(self) -> Connection:
        """Return a connection of its own, outside the pool."""
        connection: Connection = await psycopg.AsyncConnection.connect(
            conninfo(self.url), autocommit=True, row_factory=psycopg.rows.dict_row
        )
        await _configure(connection)
        return connection

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[Cursor]:
        """Lend a cursor in a transaction under the lock for creating tables; errors of the driver pass."""
        async with await self.connect() as connection, connection.transaction():
            cursor = connection.cursor()
            await cursor.execute("select pg_advisory_xact_lock(%s)", [LOCK])
            yield cursor

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[Cursor]:
        """Lend a cursor in a transaction, which is committed at the end of the block.

        Raises:
            StorageUnavailable: The database cannot be reached or written, or takes too long.
        """
        if self._pool is None:
            raise StorageUnavailable("The registry is not open; enter the lifespan of the application first.")
        if self._now() < self._silent_until:
            raise unavailable()
        try:
            with anyio.fail_after(PATIENCE):
                async with self._pool.connection() as connection, connection.transaction():
                    yield connection.cursor()
        except (TimeoutError, psycopg_pool.PoolTimeout) as error:
            self._silent_until = self._now() + PAUSE
            raise unavailable() from error
        except REFUSALS as error:
            raise refused() from error
        except (psycopg.Error, OSError) as error:
            raise unavailable() from error

    async def changed(self, within: float) -> None:
        """Return when another process has changed the registry, or after so many seconds."""
        ends = anyio.current_time() + within
        with anyio.move_on_after(within):
            try:
                if self._listener is None:
                    listener = await self.connect()
                    await listener.execute(psycopg.sql.SQL("listen {}").format(psycopg.sql.Identifier(CHANNEL)))
                    self._listener = listener
                    return  # the registry may have changed while nothing listened
                async with aclosing(self._listener.notifies(timeout=within, stop_after=1)) as notifications:
                    async for _ in notifications:
                        return await anyio.sleep(GATHER_SECONDS)
            except (psycopg.Error, OSError):
                await self._stop_listening()
                await anyio.sleep_until(ends)

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(psycopg.Error, OSError):
                await listener.close()


def conninfo(url: str) -> str:
    """Complete a URL by what keeps a dead connection from going unnoticed; what the URL says itself wins.

    >>> "connect_timeout=5" in conninfo("postgresql://db.example/multiverse")
    True

    Raises:
        SettingsError: It is none that PostgreSQL understands.
    """
    defaults: dict[str, Any] = {
        "connect_timeout": int(PATIENCE),
        "application_name": "multiverse-gateway",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": int(2000 * PATIENCE),
        "client_encoding": "utf8",
    }
    try:
        parts = psycopg.conninfo.conninfo_to_dict(url)
        if not all(port.isdigit() and 0 < int(port) < 65_536 for port in str(parts.get("port") or 5432).split(",") if port):
            raise psycopg.ProgrammingError("the port")
        return psycopg.conninfo.make_conninfo(**{**defaults, **parts})
    except psycopg.Error:
        remedy = "write postgresql://user:password@host:5432/database, with % and @ in the password written as %25 and %40"
        raise UnusableSetting("database_url", "", remedy) from None


async def _configure(connection: Connection) -> None:
    """Make the server end statements that no call waits for any more, for example because this process was suspended."""
    milliseconds = str(int(1000 * PATIENCE))
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    for name in names:
        await connection.execute("select set_config(%s, %s, false)", [name, milliseconds])


def _cannot_open(url: str, error: Exception) -> str:
    """Return why a database cannot be opened, in our own words: the server's may contain secrets."""
    parts = psycopg.conninfo.conninfo_to_dict(url)
    where = f"{parts.get('host', 'this machine')}, database {parts.get('dbname', parts.get('user', ''))}"
    text = str(error)  # libpq gives no code for a connection that fails, only words
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        reason = "its user may not make tables: grant create on the schema"
    elif "authentication" in text or "no password" in text:
        reason = "it does not take this user or password: mend them in MULTIVERSE_DATABASE_URL"
    elif "does not exist" in text:
        reason = "there is no such database or user: create it (createdb, createuser)"
    elif isinstance(error, TimeoutError | psycopg.OperationalError):
        reason = "it does not answer: is it running, and can it be reached from here?"
    else:
        reason = "it does not do what it is asked: is it PostgreSQL 13 or newer, with a schema of the gateway's own?"
    return f"The PostgreSQL server at {where} cannot be used; {reason}"
