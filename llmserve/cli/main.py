"""The command `llmserve`: its subcommands and options.

Late imports keep `check` fast: httpx, uvicorn and the planner double its time.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llmserve import __version__, terminal
from llmserve.cli.errors import CommandError, Refused
from llmserve.errors import ConfigError, StartupError
from llmserve.registry.loader import load as read
from llmserve.registry.spec import Config, ServerSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.cli.operate import AdminCommands
    from llmserve.gpus.device import Box


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command; an error ends it with a message on stderr and an exit code."""
        try:
            return super().invoke(ctx)
        except (CommandError, ConfigError, StartupError) as error:
            terminal.print_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    help="Serve every model of a GPU box from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SERVER = "A running server"  # the heading of its commands in --help
_DEFAULT_URL = f"http://{ServerSpec().host}:{ServerSpec().port}"

Registry = Annotated[Path, typer.Argument(metavar="MODELS.YAML", help="The registry file.")]
Url = Annotated[str, typer.Option(envvar="LLMSERVE_URL", help="The URL of the server.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar="LLMSERVE_ADMIN_KEY", help="The server's admin_key.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Names = Annotated[list[str], typer.Argument(metavar="MODEL", help="Names of models.")]


@app.command()
def up(
    registry: Registry = Path("models.yaml"),
    host: Annotated[str | None, typer.Option(help="Replaces server.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Replaces server.port; 0: any free port.")
    ] = None,
) -> None:
    """Start the models of the registry and serve them."""
    from llmserve.server import process

    options = {key: value for key, value in (("host", host), ("port", port)) if value is not None}

    def config() -> Config:
        config = read(registry)
        return config.model_copy(update={"server": config.server.model_copy(update=options)})

    with terminal.enduring():
        process.up(config(), terminal.console(), config)


@app.command()
def check(registry: Registry = Path("models.yaml")) -> None:
    """Check a registry and its models' files. Starts nothing."""
    from llmserve.planning import survey

    config = read(registry)
    if problems := survey.mistakes(config):
        raise ConfigError(problems)
    names = ", ".join(spec.name for spec in config.models)
    count = f"{len(config.models)} model" + ("s" if len(config.models) > 1 else "")
    terminal.console().print(f"{registry}: {count}: {names}", soft_wrap=True)


@app.command()
def plan(
    registry: Registry = Path("models.yaml"),
    gpus: Annotated[
        str | None,
        typer.Option(help="The GPUs, such as 8xH100-80G,2xL4; default: those of this machine."),
    ] = None,
    box: Annotated[Path | None, typer.Option(help="A YAML file that describes the GPUs.")] = None,
    as_json: AsJson = False,
    svg: Annotated[Path | None, typer.Option(help="Also write a picture to this file.")] = None,
) -> None:
    """Show the GPUs and the memory of each model. Starts nothing."""
    from llmserve.cli import plan_report
    from llmserve.planning import survey

    planned = survey.plan(read(registry), _box(gpus, box))
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
    """The described GPUs, or those of this machine. Raises ConfigError."""
    from llmserve.gpus import nvml
    from llmserve.gpus.device import described, from_file

    if gpus is not None and file is not None:
        raise ConfigError(["--gpus and --box both describe the GPUs; use only one of them"])
    found = described(gpus) if gpus is not None else from_file(file) if file else nvml.visible()
    if not found:
        raise ConfigError(
            ["no NVIDIA GPU is visible on this machine; describe GPUs with --gpus 8xH100-80G"]
        )
    return found


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{file} cannot be written: {error.strerror}"]) from None


@app.command()
def version() -> None:
    """Print the version."""
    terminal.console().print(__version__)


@app.command(rich_help_panel=_SERVER)
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model; default: the only one, or you choose."),
    ] = None,
    url: Url = _DEFAULT_URL,
    key: Annotated[str | None, typer.Option(envvar="LLMSERVE_KEY", help="An API key.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of an answer.")] = None,
    multiline: Annotated[
        bool, typer.Option(help="Messages of several lines; Ctrl-D sends.")
    ] = False,
) -> None:
    """Chat with a model. Ctrl-C stops an answer."""
    from llmserve.cli.chat import ChatOptions
    from llmserve.cli.chat import chat as run

    options = ChatOptions(model, url, key, system, temperature, max_tokens, multiline)
    raise typer.Exit(run(options))


@app.command(rich_help_panel=_SERVER)
def ps(url: Url = _DEFAULT_URL, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Show the state, the requests and the memory of every model."""
    with _admin(url, key, as_json=as_json) as admin:
        admin.ps()


@app.command(rich_help_panel=_SERVER)
def load(
    names: Names, url: Url = _DEFAULT_URL, key: AdminKey = None, as_json: AsJson = False
) -> None:
    """Start or wake models and wait until they are ready."""
    _change("load", names, url, key, as_json=as_json)


@app.command(rich_help_panel=_SERVER)
def unload(
    names: Names,
    now: Annotated[bool, typer.Option("--now", help="End their requests with an error.")] = False,
    url: Url = _DEFAULT_URL,
    key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop the engines of models after their requests have ended."""
    _change("unload", names, url, key, {"drain": not now}, as_json=as_json)


@app.command(rich_help_panel=_SERVER)
def sleep(
    names: Names, url: Url = _DEFAULT_URL, key: AdminKey = None, as_json: AsJson = False
) -> None:
    """Free the GPU memory of models and keep their weights in host memory."""
    _change("sleep", names, url, key, as_json=as_json)


@app.command(rich_help_panel=_SERVER)
def wake(
    names: Names, url: Url = _DEFAULT_URL, key: AdminKey = None, as_json: AsJson = False
) -> None:
    """Wake sleeping models and wait until they are ready."""
    _change("wake", names, url, key, as_json=as_json)


@app.command(rich_help_panel=_SERVER)
def reload(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the changes and do not apply them.")
    ] = False,
    url: Url = _DEFAULT_URL,
    key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Apply the changed registry file to the server and show the changes."""
    with _admin(url, key, as_json=as_json) as admin:
        admin.reload(dry_run=dry_run)


@app.command(rich_help_panel=_SERVER)
def logs(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="The name of a model.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Also print new lines.")] = False,
    lines: Annotated[int, typer.Option("-n", min=0, help="The number of last lines.")] = 200,
    replica: Annotated[int, typer.Option(min=0, help="The number of the replica.")] = 0,
    url: Url = _DEFAULT_URL,
    key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Print the log of a model's engine."""
    with _admin(url, key, as_json=as_json) as admin:
        admin.logs(name, lines=lines, replica=replica, follow=follow)


@app.command(rich_help_panel=_SERVER)
def events(url: Url = _DEFAULT_URL, key: AdminKey = None, as_json: AsJson = False) -> None:
    """Print each change of a model's state, until Ctrl-C."""
    with _admin(url, key, as_json=as_json) as admin:
        admin.events()


def _change(
    action: str,
    names: list[str],
    url: str,
    key: str | None,
    body: dict[str, Any] | None = None,
    *,
    as_json: bool,
) -> None:
    with _admin(url, key, as_json=as_json) as admin:
        if not admin.change(action, names, body or {}):
            raise typer.Exit(Refused.exit_code)


@contextmanager
def _admin(url: str, key: str | None, *, as_json: bool) -> Iterator[AdminCommands]:
    from llmserve.cli.operate import AdminClient, AdminCommands

    with closing(AdminClient(url, key)) as client:
        yield AdminCommands(client, as_json=as_json)


def main() -> None:
    terminal.prepare()
    app()
