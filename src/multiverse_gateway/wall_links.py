"""The links to the wall view: each shows the state of the servers on one screen, without a session, until an operator revokes it."""

import hmac
import logging
import uuid

from multiverse_gateway.admin_key import key_digest, new_key
from multiverse_gateway.core.errors import BadRequest, NotFound
from multiverse_gateway.core.servers import WallLink
from multiverse_gateway.gateway import Gateway

MOST_LINKS = 100

_log = logging.getLogger("multiverse_gateway.registry")


async def create_wall_link(gateway: Gateway, name: str) -> tuple[WallLink, str]:
    """Create a link; return what is kept of it, and its token, which is kept nowhere.

    Raises:
        BadRequest: Another link has this name, or there are 100 links.
        StorageUnavailable: The link could not be saved.
    """
    async with gateway.registrations.lock:
        await gateway.refresh()
        links = gateway.registrations.registry.wall_links
        if any(link.name == name for link in links):
            raise BadRequest(f"There is a wall link named {name} already; choose another name, or revoke that one", param="name")
        if len(links) >= MOST_LINKS:
            raise BadRequest(f"There are {MOST_LINKS} wall links; revoke one that is not used any more")
        token = new_key("wall")
        link = WallLink(id=str(uuid.uuid4()), name=name, digest=key_digest(token).hex(), created_at=gateway.wall())
        await gateway.store.save_wall_link(link)
        await gateway.refresh()
    _log.info("wall link created", extra={"fields": {"link": link.id, "name": link.name}})
    return link, token


async def revoke_wall_link(gateway: Gateway, link_id: str) -> WallLink:
    """Remove a link; when this returns, this process no longer accepts it, and other processes follow within a second.

    Raises:
        NotFound: There is no link with this id.
        StorageUnavailable: The link could not be removed.
    """
    async with gateway.registrations.lock:
        await gateway.refresh()
        link = next((link for link in gateway.registrations.registry.wall_links if link.id == link_id), None)
        if link is None:
            raise NotFound("There is no wall link with this id; GET /admin/wall-links lists all links")
        await gateway.store.remove_wall_link(link_id)
        await gateway.refresh()
    _log.info("wall link revoked", extra={"fields": {"link": link.id, "name": link.name}})
    return link


def wall_link_of(gateway: Gateway, token: str) -> WallLink | None:
    """Return the link that a token belongs to; all are compared, so that the time says nothing."""
    digest = key_digest(token).hex()
    found = [link for link in gateway.registrations.registry.wall_links if hmac.compare_digest(link.digest, digest)]
    return found[0] if found else None
