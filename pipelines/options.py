"""The options that every command has: where Kubeflow Pipelines is, and who asks."""

import functools
from typing import Any, Callable, Dict, Tuple

import click

from distillery.errors import UserError
from pipelines.api import PATIENCE, Client, connection

OPTIONS = (
    click.option("--endpoint", metavar="URL", help="The API; default KF_PIPELINES_ENDPOINT, or the cluster's own."),
    click.option("-n", "--namespace", default="", help="Your namespace (profile) on a Kubeflow with many users."),
    click.option("--existing-token", metavar="TOKEN", default="", help="Bearer token; a file does not show in `ps`."),
    click.option("--token-file", metavar="FILE", default="", help="File with it; default KF_PIPELINES_SA_TOKEN_PATH."),
    click.option("--ca", metavar="FILE", default="", help="Certificate authority of the endpoint (PEM)."),
    click.option("--ui-endpoint", metavar="URL", default="", help="For links; default KF_PIPELINES_UI_ENDPOINT."),
    click.option("--header", "headers", metavar="'NAME: VALUE'", multiple=True, help="Sent along, e.g. a Cookie."),
    click.option("--patience", default=PATIENCE, show_default=True, help="Seconds to repeat what nobody answers."),
)


def connected(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options above; it receives a `Client` as its first argument."""

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        names = ("endpoint", "namespace", "existing_token", "token_file", "ca", "ui_endpoint", "headers", "patience")
        own = {name: given.pop(name) for name in names}
        return command(client_of(**own), **given)

    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def client_of(
    endpoint: "str | None" = None,
    namespace: str = "",
    existing_token: str = "",
    token_file: str = "",
    ca: str = "",
    ui_endpoint: str = "",
    headers: Tuple[str, ...] = (),
    patience: float = PATIENCE,
) -> Client:
    """A client from the options' values.

    Raises:
        UserError: no endpoint, or a header without a colon.
    """
    pairs: Dict[str, str] = {}
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise UserError(f"--header: the one of {len(header)} characters has no colon; write 'Name: value'")
        pairs[name.strip()] = value.strip()
    to = connection(endpoint or "", namespace, existing_token, token_file, ca, ui_endpoint, pairs, patience)
    return Client(to)
