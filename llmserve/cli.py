"""`llmserve up | check | plan | chat | version`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from llmserve import __version__
from llmserve.config import Config, ServerSpec, load
from llmserve.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from llmserve.gpus import Box

app = typer.Typer(
    help="Serve every model of a GPU box from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Registry = Annotated[Path, typer.Argument(metavar="[MODELS.YAML]", help="The registry.")]


@app.command()
def up(
    registry: Registry = Path("models.yaml"),
    host: Annotated[str | None, typer.Option(help="Instead of server.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of server.port; 0: any free one.")
    ] = None,
) -> None:
    """Start every model of the registry and serve them."""
    from llmserve import server  # noqa: PLC0415  # `check` answers without it

    said = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    config = _load(registry)
    config = config.model_copy(update={"server": config.server.model_copy(update=said)})
    console = Console()
    try:
        server.up(config, console)
    except (StartupError, ConfigError) as error:
        _fail(error.message, error.exit_code)


@app.command()
def check(registry: Registry = Path("models.yaml")) -> None:
    """Check a registry without starting anything."""
    config = _load(registry)
    names = ", ".join(spec.name for spec in config.models)
    count = f"{len(config.models)} model" + ("s" if len(config.models) > 1 else "")
    Console().print(f"{registry}: {count}: {names}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def plan(
    registry: Registry = Path("models.yaml"),
    gpus: Annotated[
        str | None, typer.Option(help="A box as in 8xH100-80G,2xL4; omitted: this machine's GPUs.")
    ] = None,
    box: Annotated[Path | None, typer.Option(help="A box described in a YAML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw it into this file as well.")] = None,
) -> None:
    """Show what each model takes of which GPU, and what does not fit. Touches no GPU."""
    from llmserve import report, survey  # noqa: PLC0415  # `check` answers without them

    config = _load(registry)
    planned = survey.plan(config, _box(gpus, box))
    if svg is not None:
        _write(svg, report.svg(planned))
    console = Console()
    if as_json:
        console.print_json(data=report.document(planned))
    else:
        console.print(report.terminal(planned))
    if planned.problems:
        raise typer.Exit(ConfigError.exit_code)


def _box(gpus: str | None, file: Path | None) -> Box:
    from llmserve import nvml  # noqa: PLC0415  # `check` answers without it
    from llmserve.gpus import described, from_file  # noqa: PLC0415

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
    url: Annotated[
        str, typer.Option(envvar="LLMSERVE_URL", help="Where the server runs.")
    ] = f"http://{ServerSpec().host}:{ServerSpec().port}",
    key: Annotated[str | None, typer.Option(envvar="LLMSERVE_KEY", help="An API key.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    multiline: Annotated[
        bool, typer.Option(help="Messages of several lines; Ctrl-D sends.")
    ] = False,
) -> None:
    """Chat with a model of a running server. Ctrl-C stops the answer only."""
    from llmserve.chat import ChatOptions  # noqa: PLC0415  # `check` answers without it
    from llmserve.chat import chat as talk  # noqa: PLC0415

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


@app.command()
def version() -> None:
    """Print the version."""
    Console().print(__version__, highlight=False)


def main() -> None:
    app()


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"{file} cannot be written: {error.strerror}", ConfigError.exit_code)


def _load(registry: Path) -> Config:
    try:
        return load(registry)
    except ConfigError as error:
        _fail(error.message, error.exit_code)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
