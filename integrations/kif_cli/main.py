"""The `kif` command: which commands there are, and how they end.

Exit codes: 0 done, 1 a check failed, 2 wrong usage, bad input or interrupted.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kif_runtime.errors import KifError, one_line

from .commands import bake, bench, demo, evaluate, generate, mine, retire, serve, show, sites, trace, validate

INTERRUPTED = 130  # what typer makes of Ctrl-C


class Front(TyperGroup):
    """Whatever a user can cause ends in one line on stderr, `kif: …`, and exit code 2; never in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # the library under us would exit silently
            raise KifError("interrupted") from None

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except KifError as problem:
            _end(f"kif: {problem}")
        except BrokenPipeError:  # `kif show … | head`: the reader has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except typer.Abort:
            _end("kif: interrupted")
        except Exception as problem:
            # The usage errors of typer's parser, under whatever name and base this version gives them.
            if not hasattr(problem, "format_message"):
                raise
            context = getattr(problem, "ctx", None)
            if type(problem).__name__ == "NoArgsIsHelpError":
                _end(problem.format_message())
            command = context.command_path if context else "kif"
            _end(f"kif: {one_line(problem.format_message()).rstrip('.')}; see `{command} --help`")
        if code == INTERRUPTED:  # before a command had begun
            _end("kif: interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def _end(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


app = typer.Typer(
    cls=Front,
    name="kif",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, a subject's name among them
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        from kif_runtime import __version__

        print(f"kif {__version__}")
        raise typer.Exit


@app.callback()
def kif(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Erase what a language model knows about a subject: find its signature, suppress it, show that it is gone."""


app.command("demo")(demo.demo)
app.command("mine")(mine.mine)
app.command("sites")(sites.sites)
app.command("show")(show.show)
app.command("validate")(validate.validate)
app.command("generate")(generate.generate)
app.command("trace")(trace.trace)
app.command("bake")(bake.bake)
app.command("retire")(retire.retire)
app.command("eval")(evaluate.evaluate)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command("verify")(serve.verify)
app.command("bench", context_settings={"allow_extra_args": True})(bench.bench)


def main() -> None:
    """The entry point of the `kif` script."""
    app(prog_name="kif")


if __name__ == "__main__":
    main()
