"""The command line, ``pearl-ray``: the group, and how errors are told. The commands are in ``pearl_ray.commands``."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from click.core import ParameterSource
from click.exceptions import NoArgsIsHelpError

import pearl_ray
from pearl_ray.commands.bench import bench
from pearl_ray.commands.chat import chat
from pearl_ray.commands.collect_env import collect_env
from pearl_ray.commands.demo import demo
from pearl_ray.commands.generate import generate
from pearl_ray.commands.options import DEBUG_KEY, debug_option, option_of
from pearl_ray.commands.profile import profile
from pearl_ray.commands.serve import serve
from pearl_ray.commands.status import status, stop
from pearl_ray.core.errors import ConfigError, PearlError

USER_ERROR, OUR_ERROR, INTERRUPTED = 2, 1, 130


class PearlGroup(click.Group):
    """Tells every error in one line. Exit code 2: something to be set right; 1: a fault of ours; 130: interrupted."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Exception:
            if ctx.meta.get(DEBUG_KEY):
                traceback.print_exc()
            raise

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,  # noqa: ANN401 - handed on to click
    ) -> Any:  # noqa: ANN401 - click's own signature
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except NoArgsIsHelpError as error:
            error.show()
            sys.exit(USER_ERROR)
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except Exception as error:
            _fail(error)
        sys.exit(result if isinstance(result, int) else 0)


def _fail(error: Exception) -> NoReturn:
    """One line on stderr, and the exit code."""
    message, code = describe(error)
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def describe(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error."""
    cause = getattr(error, "cause", None)  # Ray wraps what an actor raised
    if isinstance(cause, PearlError):
        error = cause
    if isinstance(error, ConfigError):
        name = option_of(error.field)
        text = f"{name} {error.value} is not allowed: {error.allowed}" if name else str(error)
        return one_line(text), USER_ERROR
    if isinstance(error, click.BadParameter) and isinstance(error.param, click.Option):
        return one_line(f"{error.param.opts[0]}{_source(error)}: {error.message}"), USER_ERROR
    if isinstance(error, click.ClickException):
        return one_line(error.format_message()), USER_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}"), USER_ERROR
    if isinstance(error, (PearlError, ConnectionError)):
        return one_line(str(error)), USER_ERROR
    return one_line(f"{type(error).__name__}: {error} (a fault of pearl-ray; --debug shows where)"), OUR_ERROR


def _source(error: click.BadParameter) -> str:
    """Where a bad value came from, if not from the command line."""
    option, context = error.param, error.ctx
    if option is None or option.name is None or context is None:
        return ""
    match context.get_parameter_source(option.name):
        case ParameterSource.ENVIRONMENT:
            names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or ()
            return f" (environment variable {' or '.join(names)})"
        case ParameterSource.DEFAULT_MAP:
            return " (from the --config file)"
        case _:
            return ""


def one_line(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


@click.group(cls=PearlGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(pearl_ray.__version__, prog_name="pearl-ray")
@debug_option()
def cli() -> None:
    """Serve a large language model with parallel speculative decoding (PEARL) on Ray.

    Every option can also be set by its environment variable (PEARL_…), or by a key of the file given with --config.
    """
    logging.basicConfig()


for command in (serve, generate, chat, bench, profile, demo, status, stop, collect_env):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    cli(prog_name="pearl-ray")


if __name__ == "__main__":
    main()
