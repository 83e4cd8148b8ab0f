"""The syntax of chat templates."""

from __future__ import annotations

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, with which training marks the model's own turns."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def syntax_error(template: str, where: str) -> str | None:
    """Return the first error of a template with its line; None if it compiles.

    The environment is that of transformers (utils/chat_template_utils.py,
    `_cached_compile_jinja_template`).
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    try:
        environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        return f"{where}:{error.lineno}: invalid Jinja: {error.message}"
    except RecursionError:
        return f"{where}: invalid Jinja: nested too deeply"
    return None
