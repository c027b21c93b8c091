"""Commands about the registry of a running gateway."""

import json
from pathlib import Path
from typing import Any

import click

from multiverse_gateway.cli.client import GatewayRefusal, client_for, gateway_options
from multiverse_gateway.cli.common import json_option, print_json, print_table, printable, refuse
from multiverse_gateway.core.errors import InvalidClientKey
from multiverse_gateway.core.pasting import pasted
from multiverse_gateway.stores.files import replace_file


@click.command("register")
@click.argument("url")
@click.argument("model")
@gateway_options
@click.option("--api-key", envvar="BACKEND_API_KEY", help="The server's own key, if it needs one; prefer the variable BACKEND_API_KEY.")
@click.option("--owner", "--student-id", "student_id", help="Name of the server's owner.")
@click.option("--description", help="Description for other people.")
@click.option("--max-tokens", type=click.IntRange(1), help="Maximum number of tokens in an answer.")
@click.option("--context-length", type=click.IntRange(1), help="Context length in tokens.")
@click.option("--no-streaming", is_flag=True, help="The server cannot stream.")
@click.option(
    "--max-concurrency", type=click.IntRange(1, 4096), help="Maximum number of requests at once; by default what its engine states."
)
@click.option("--upstream-model", help="Name by which the engine knows the model, if that is another one.")
@click.option("--no-max-concurrency", is_flag=True, help="No limit on requests at once, whatever its engine states.")
@click.option("--weight", type=click.IntRange(1, 100), help="Its share of the traffic with the balancer `weighted`.")
@json_option
def register_command(url: str, model: str, gateway_url: str | None, admin_key: str | None, as_json: bool, **given: Any) -> None:
    """Offer a model server to a running gateway.

    URL is the server's root, such as http://gpu.example:8000, and MODEL the name under which it is asked for. The gateway probes
    the server first. Registering the same pair again updates it.
    """
    capabilities = {name: given[name] for name in ("max_tokens", "context_length") if given[name] is not None}
    if given["no_streaming"]:
        capabilities["streaming"] = False
    metadata = {name: given[name] for name in ("student_id", "description") if given[name] is not None}
    body: dict[str, Any] = {"model_name": model, "endpoint_url": pasted(url)}
    body |= {name: given[name] for name in ("api_key", "max_concurrency", "weight", "upstream_model") if given[name] is not None}
    if given["no_max_concurrency"]:
        if "max_concurrency" in body:
            refuse("--max-concurrency and --no-max-concurrency contradict each other; leave one of them out")
        body["max_concurrency"] = None
    if capabilities:
        body["capabilities"] = capabilities
    if metadata:
        body["metadata"] = metadata
    record = client_for(gateway_url, admin_key).admin("POST", "/register", json=body)
    if as_json:
        print_json(record)
        return
    click.echo(f"Registered: {printable(model)} at {printable(record.get('endpoint_url', url))}")
    click.echo(f"  id      {printable(record.get('registration_id'))}")
    click.echo(f"  health  {printable(record.get('health_status'))}")
    if record.get("max_concurrency_reason"):
        limit = record.get("max_concurrency")
        click.echo(f"  limit   {printable('none' if limit is None else limit)}: {printable(record['max_concurrency_reason'])}")
    if record.get("owner_token"):
        click.echo(f"  token   {printable(record['owner_token'])}")
        click.echo("          owner token, shown once: lets the owner edit or remove this server")
    if record.get("warning"):
        click.echo(f"  note    {printable(record['warning'])}")


@click.command("servers")
@gateway_options
@click.option("--model", help="Only the servers of this model.")
@click.option("--all", "include_inactive", is_flag=True, help="Include servers that were taken out or removed.")
@json_option
def servers_command(gateway_url: str | None, admin_key: str | None, model: str | None, include_inactive: bool, as_json: bool) -> None:
    """List the registered servers and their health."""
    params: dict[str, Any] = {name: value for name, value in (("model_name", model),) if value}
    if include_inactive:
        params["include_inactive"] = "true"
    answer = client_for(gateway_url, admin_key).admin("GET", "/servers", params=params)
    records = answer if isinstance(answer, list) else answer["servers"]
    if as_json:
        print_json(records)
        return
    if not records:
        click.echo("No server is registered. Offer one with `multiverse-gateway register URL MODEL`.")
        return
    rows = [_server_row(record) for record in records]
    print_table(rows, ("model", "health", "URL", "last check", "owner", "id"))
    for record in records:
        if record.get("reason"):
            click.echo(f"{printable(record['model_name'])} at {printable(record['endpoint_url'])}: {printable(record['reason'])}")


def _server_row(record: dict[str, Any]) -> list[str]:
    owner = (record.get("metadata") or {}).get("student_id")
    parts = (
        record.get("model_name"),
        record.get("state") or record.get("health_status"),
        record.get("endpoint_url"),
        record.get("last_checked_at") or record.get("last_check_at") or record.get("last_health_check"),
        owner,
        record.get("registration_id"),
    )
    return [printable(part) if part is not None else "" for part in parts]


@click.command("models")
@gateway_options
@click.option("--client-key", envvar="OPENAI_API_KEY", help="A client key, if the gateway requires one.")
@json_option
def models_command(gateway_url: str | None, admin_key: str | None, client_key: str | None, as_json: bool) -> None:
    """List the models that can be used.

    If the gateway requires a client key and there is none, the admin key shows all models.
    """
    client = client_for(gateway_url, admin_key)
    key = client_key or client.client_key
    models: list[dict[str, Any]]
    try:
        answer = client.call("GET", "/v1/models", headers={"authorization": f"Bearer {key}"} if key else {})
        models = answer.get("data", []) if isinstance(answer, dict) else []
    except GatewayRefusal as error:
        if error.code != InvalidClientKey.code or not client.admin_key:
            raise
        models = _models_of(client.admin("GET", "/servers"))
    if as_json:
        print_json(models)
    elif models:
        rows = [(printable(item.get("id")), f"{item.get('available_servers')} of {item.get('total_servers')}") for item in models]
        print_table(rows, ("model", "healthy servers"))
    else:
        click.echo("No model is available. Offer one with `multiverse-gateway register URL MODEL`.")


def _models_of(answer: Any) -> list[dict[str, Any]]:
    """Return what `/v1/models` says of each model, from the records of all servers."""
    models: dict[str, dict[str, Any]] = {}
    for record in answer if isinstance(answer, list) else answer["servers"]:
        model = models.setdefault(record["model_name"], {"id": record["model_name"], "available_servers": 0, "total_servers": 0})
        model["total_servers"] += 1
        model["available_servers"] += record["health_status"] == "healthy"
    return sorted(models.values(), key=lambda model: str(model["id"]))


@click.command("export")
@gateway_options
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file, readable only by you, instead of the terminal."
)
@click.option("--with-keys", is_flag=True, help="Include the servers' own keys, in clear text.")
def export_command(gateway_url: str | None, admin_key: str | None, output: Path | None, with_keys: bool) -> None:
    """Write the registry of a running gateway as JSON."""
    params = {"include_keys": "true"} if with_keys else None
    registry = client_for(gateway_url, admin_key).admin("GET", "/export", params=params)
    if output is None:
        print_json(registry)
        return
    text = json.dumps(registry, indent=2, ensure_ascii=False) + "\n"
    try:
        if output.exists() and not output.is_file():  # such as /dev/stdout
            output.write_text(text, encoding="utf-8")
        else:
            replace_file(output, text.encode())
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
    aliases = len(registry.get("aliases", []))
    click.echo(f"Wrote {len(registry.get('servers', []))} servers{f' and {aliases} aliases' if aliases else ''} to {output}.")


@click.command("import")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@gateway_options
@json_option
def import_command(file: Any, gateway_url: str | None, admin_key: str | None, as_json: bool) -> None:
    """Read an exported registry into a running gateway.

    FILE is what `export` wrote, or - for standard input. Reading it twice changes nothing more.
    """
    try:
        registry = json.load(file)
    except ValueError as error:
        refuse(f"{file.name} is not valid JSON ({error}); give a file that `multiverse-gateway export` wrote")
    counts = client_for(gateway_url, admin_key).admin("POST", "/import", json=registry)
    if as_json:
        print_json(counts)
        return
    summary = ", ".join(f"{counts[name]} {name}" for name in ("created", "updated", "unchanged") if name in counts)
    aliases = f"; {counts['aliases']} aliases created or updated" if "aliases" in counts else ""
    click.echo(f"Imported: {summary}{aliases}.")
