"""`llmserve up | check | plan | chat | version`, and what steers a server that runs."""

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llmserve import __version__, terminal
from llmserve.errors import ConfigError, StartupError
from llmserve.registry.config import Config, ServerSpec
from llmserve.registry.config import load as read

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.cli.operate import AdminClient
    from llmserve.gpus.device import Box

app = typer.Typer(
    help="Serve every model of a GPU box from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Registry = Annotated[Path, typer.Argument(metavar="[MODELS.YAML]", help="The registry.")]
Url = Annotated[str, typer.Option(envvar="LLMSERVE_URL", help="Where the server runs.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar="LLMSERVE_ADMIN_KEY", help="The server's admin_key.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Models.")]

_HERE = f"http://{ServerSpec().host}:{ServerSpec().port}"


@app.command()
def up(
    registry: Registry = Path("models.yaml"),
    host: Annotated[str | None, typer.Option(help="Instead of server.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of server.port; 0: any free one.")
    ] = None,
) -> None:
    """Start every model of the registry and serve them."""
    from llmserve.server import process  # noqa: PLC0415  # `check` answers without it

    said = {key: value for key, value in (("host", host), ("port", port)) if value is not None}

    def overridden() -> Config:
        config = read(registry)
        return config.model_copy(update={"server": config.server.model_copy(update=said)})

    try:
        with terminal.enduring():
            process.up(overridden(), terminal.console(), overridden)
    except (StartupError, ConfigError) as error:
        _fail(error.message, error.exit_code)


@app.command()
def check(registry: Registry = Path("models.yaml")) -> None:
    """Check a registry without starting anything."""
    from llmserve.planning import survey  # noqa: PLC0415  # a file with mistakes is reported without it

    config = _load(registry)
    if problems := survey.mistakes(config):
        _fail("\n".join(problems), ConfigError.exit_code)
    names = ", ".join(spec.name for spec in config.models)
    count = f"{len(config.models)} model" + ("s" if len(config.models) > 1 else "")
    terminal.console().print(f"{registry}: {count}: {names}", soft_wrap=True)


@app.command()
def plan(
    registry: Registry = Path("models.yaml"),
    gpus: Annotated[
        str | None, typer.Option(help="A box as in 8xH100-80G,2xL4; omitted: this machine's GPUs.")
    ] = None,
    box: Annotated[Path | None, typer.Option(help="A box described in a YAML file.")] = None,
    as_json: AsJson = False,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file as well.")] = None,
) -> None:
    """Show what each model takes of which GPU, and what does not fit. Touches no GPU."""
    from llmserve.cli import plan_report  # noqa: PLC0415  # `check` answers without it
    from llmserve.planning import survey  # noqa: PLC0415  # `check` answers without them

    config = _load(registry)
    planned = survey.plan(config, _box(gpus, box))
    if svg is not None:
        _write(svg, plan_report.svg(planned))
    console = terminal.console()
    if as_json:
        console.print_json(data=plan_report.document(planned), ensure_ascii=True)
    else:
        console.print(plan_report.terminal(planned))
    if planned.problems:
        raise typer.Exit(ConfigError.exit_code)


def _box(gpus: str | None, file: Path | None) -> Box:
    from llmserve.gpus import nvml  # noqa: PLC0415  # `check` answers without it
    from llmserve.gpus.device import described, from_file  # noqa: PLC0415  # as above

    if gpus is not None and file is not None:
        _fail("--gpus and --box both describe the box; use one", ConfigError.exit_code)
    try:
        found = described(gpus) if gpus is not None else from_file(file) if file else nvml.visible()
    except ConfigError as error:
        _fail(error.message, error.exit_code)
    if not found:
        _fail(
            "No NVIDIA GPU is visible here; describe a box: --gpus 8xH100-80G",
            ConfigError.exit_code,
        )
    return found


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="A model; omitted: choose.")] = None,
    url: Url = _HERE,
    key: Annotated[str | None, typer.Option(envvar="LLMSERVE_KEY", help="An API key.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    multiline: Annotated[
        bool, typer.Option(help="Messages of several lines; Ctrl-D sends.")
    ] = False,
) -> None:
    """Chat with a model of a running server. Ctrl-C stops the answer only."""
    from llmserve.cli.chat import ChatOptions  # noqa: PLC0415  # `check` answers without it
    from llmserve.cli.chat import chat as talk  # noqa: PLC0415  # as above

    options = ChatOptions(
        model=model,
        url=url,
        key=key,
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        multiline=multiline,
    )
    raise typer.Exit(talk(options))


# --- a server that runs


@app.command()
def ps(url: Url = _HERE, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show what every model is doing and what it holds."""
    from llmserve.cli import operate  # noqa: PLC0415  # `check` answers without it

    with _server(url, key) as client:
        operate.ps(client, as_json=as_json)


@app.command()
def load(names: Names, url: Url = _HERE, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Start models, or wake them, and wait until they are ready."""
    _steer("load", names, url, key, as_json=as_json)


@app.command()
def unload(
    names: Names,
    now: Annotated[bool, typer.Option("--now", help="Cut their requests off.")] = False,
    url: Url = _HERE,
    key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """End the engines of models, once their requests have ended."""
    _steer("unload", names, url, key, {"drain": not now}, as_json=as_json)


@app.command()
def sleep(names: Names, url: Url = _HERE, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Put models to sleep: their GPU memory is given back, their weights stay near."""
    _steer("sleep", names, url, key, as_json=as_json)


@app.command()
def wake(names: Names, url: Url = _HERE, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Wake models that sleep."""
    _steer("wake", names, url, key, as_json=as_json)


@app.command()
def reload(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell, and do nothing.")] = False,
    url: Url = _HERE,
    key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Let the server read its registry again, and tell what that changes."""
    from llmserve.cli import operate  # noqa: PLC0415  # `check` answers without it

    with _server(url, key) as client:
        operate.reload(client, dry_run=dry_run, as_json=as_json)


@app.command()
def logs(
    name: Annotated[str, typer.Argument(help="A model.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And what comes.")] = False,
    lines: Annotated[int, typer.Option("-n", min=0, help="The last so many lines.")] = 200,
    replica: Annotated[int, typer.Option(min=0, help="Which of its engines.")] = 0,
    url: Url = _HERE,
    key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Show what a model's engine has logged."""
    from llmserve.cli import operate  # noqa: PLC0415  # `check` answers without it

    with _server(url, key) as client:
        parts = client.log(name, lines=lines, replica=replica, follow=follow)
        operate.logs(parts, as_json=as_json)


@app.command()
def events(url: Url = _HERE, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show every change of a model's state as it comes, until Ctrl-C."""
    from llmserve.cli import operate  # noqa: PLC0415  # `check` answers without it

    with _server(url, key) as client:
        operate.events(client, as_json=as_json)


def _steer(
    action: str,
    names: list[str],
    url: str,
    key: str | None,
    body: dict[str, Any] | None = None,
    *,
    as_json: bool,
) -> None:
    """One after the other; what was refused does not keep the rest."""
    from llmserve.cli import operate  # noqa: PLC0415  # `check` answers without it

    refused = False
    with _server(url, key) as client:
        for name in names:
            try:
                operate.steer(client, action, name, body or {}, as_json=as_json)
            except operate.NoServer:
                raise
            except operate.Refused as error:
                _tell(str(error))
                refused = True
    if refused:
        raise typer.Exit(operate.Refused.exit_code)


@contextmanager
def _server(url: str, key: str | None) -> Iterator[AdminClient]:
    """A client of a running server, and an end to the command if that refuses."""
    from llmserve.cli.operate import AdminClient, Refused  # noqa: PLC0415  # `check` answers without it

    try:
        with closing(AdminClient(url, key)) as client:
            yield client
    except Refused as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def version() -> None:
    """Print the version."""
    terminal.console().print(__version__)


def main() -> None:
    terminal.prepare()
    app()


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"{file} cannot be written: {error.strerror}", ConfigError.exit_code)


def _load(registry: Path) -> Config:
    try:
        return read(registry)
    except ConfigError as error:
        _fail(error.message, error.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    _tell(message)
    raise typer.Exit(code)


def _tell(message: str) -> None:
    terminal.console(stderr=True).print(message, style="red", soft_wrap=True)
