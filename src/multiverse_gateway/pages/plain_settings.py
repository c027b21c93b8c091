"""The first questions about a gateway, answered in words from its settings, with the lines to set."""

from collections.abc import Collection

import attrs

from multiverse_gateway.pages.words import count
from multiverse_gateway.settings import Settings


@attrs.frozen(kw_only=True)
class PlainSetting:
    """A question, its answer in sentences, and lines to set with what each of them does."""

    question: str
    sentences: tuple[str, ...]
    lines: tuple[tuple[str, str], ...]


def access_answer(settings: Settings, *, keys: int) -> PlainSetting:
    """Return who may use the models; `keys` is the number of client keys that work now."""
    question = "Who may use the models?"
    if not settings.require_client_auth:
        sentence = "Everyone who can reach the gateway. No key is required; a key still gives its holder limits of their own."
        return PlainSetting(question=question, sentences=(sentence,), lines=(("To require keys:", "REQUIRE_CLIENT_AUTH=true"),))
    return PlainSetting(
        question=question,
        sentences=(f"People with a client key; {count(keys, 'key')} can be used now.", "Signed-in operators can use the playground."),
        lines=(("To require no key:", "REQUIRE_CLIENT_AUTH=false"),),
    )


def networks_answer(settings: Settings, *, opened: Collection[str]) -> PlainSetting:
    """Return where model servers may be; `opened` are the loopback addresses that the operator has opened for one server each."""
    word = settings.allow_private_networks.strip()
    if word.lower() == "true":
        sentences = ["Model servers may be anywhere: on the internet, in private networks, and on the gateway's own computer."]
        line = ("To allow public addresses and tunnels only:", "ALLOW_PRIVATE_NETWORKS=false")
    elif word.lower() in ("", "false"):
        sentences = ["Model servers must have a public address or a tunnel. Addresses of private networks are refused."]
        line = ("To allow computers in your network:", "ALLOW_PRIVATE_NETWORKS=true")
    else:
        networks = ", ".join(item.strip() for item in word.split(","))
        sentences = [f"Model servers may have a public address or a tunnel, or be in {networks}."]
        line = ("To allow all private networks:", "ALLOW_PRIVATE_NETWORKS=true")
    if opened:
        sentences.append(f"On its own computer, the gateway may also connect to {', '.join(sorted(set(opened)))}, which you opened.")
    return PlainSetting(question="Where may model servers be?", sentences=tuple(sentences), lines=(line,))


def limits_answer(settings: Settings) -> PlainSetting:
    """Return which limits hold for clients."""
    without, with_key = settings.rate_limit_per_minute, settings.key_rate_limit_per_minute
    sentences = (
        f"Without a key: {_per_minute(without)} from each address, {_at_once(settings.max_at_once_per_address)}.",
        f"With a key: {_per_minute(with_key)}, {_at_once(settings.max_at_once_per_key)}; a key can have limits of its own.",
        "Requests from the gateway's own computer that no proxy forwarded are not limited without a key.",
    )
    lines = (
        ("To change the limit without a key:", f"RATE_LIMIT_PER_MINUTE={without}"),
        ("To change the limit with a key:", f"KEY_RATE_LIMIT_PER_MINUTE={with_key}"),
    )
    return PlainSetting(question="Which limits hold?", sentences=sentences, lines=lines)


def _per_minute(limit: int) -> str:
    return f"{count(limit, 'request')} per minute" if limit else "any number of requests per minute"


def _at_once(limit: int) -> str:
    return f"{limit:,} at once when servers are busy" if limit else "any number at once"
