"""What operators do to aliases: define and remove them. What an alias comes to is decided in `core.aliases`."""

import logging
from collections.abc import Sequence

from multiverse_gateway.core.aliases import Alias, AliasNotFound, by_key, plan_alias
from multiverse_gateway.core.servers import model_key
from multiverse_gateway.gateway import Gateway

_log = logging.getLogger("multiverse_gateway.registry")


async def save_alias(gateway: Gateway, name: str, models: Sequence[str]) -> Alias:
    """Let a name stand for models from now on, and return the alias.

    Raises:
        InvalidField: It would lead to itself, or there are too many aliases.
        StorageUnavailable: It could not be saved.
    """
    async with gateway.registrations.lock:
        alias = plan_alias(name, models, (await gateway.store.load()).aliases, wall=gateway.wall())
        await gateway.store.save_alias(alias)
        await gateway.refresh()
    _log.info("alias saved", extra={"fields": {"alias": alias.name, "models": list(alias.models)}})
    return alias


async def remove_alias(gateway: Gateway, name: str) -> Alias:
    """Remove an alias, in any spelling of its name, and return it.

    Raises:
        AliasNotFound: There is none of this name.
        StorageUnavailable: It could not be removed.
    """
    async with gateway.registrations.lock:
        alias = by_key((await gateway.store.load()).aliases).get(model_key(name))
        if alias is None or not await gateway.store.remove_alias(alias.name):
            raise AliasNotFound("There is no alias with this name; GET /admin/aliases lists all aliases")
        await gateway.refresh()
    _log.info("alias removed", extra={"fields": {"alias": alias.name}})
    return alias
