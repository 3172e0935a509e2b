"""The command line: ``laser-attention demo | doctor | explain``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from ._common import Failure, Usage

COMMANDS = {
    "demo": "train a small model twice, with softmax attention and with LASER, and compare",
    "doctor": "versions, frameworks, devices, and what each backend can do here",
    "explain": "which backend would run a problem, and why the others would not",
}


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one sentence, without the whole synopsis before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of ``command`` alone: only its module is imported."""
    parser = _Parser(prog="laser-attention", description="LASER attention (arXiv 2411.03493).", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"laser-attention {version('laser-attention')}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sentence = f"{summary[0].upper()}{summary[1:]}."
        subparser = subparsers.add_parser(name, help=summary, description=sentence, allow_abbrev=False)
        if name == command:
            importlib.import_module(f"._{name}", __name__).configure(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        0 where all went well, 1 where the run failed, 2 where the arguments are wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # a terminal without β gets a question mark, not a traceback
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        options = _parser(command).parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
    except Usage as error:
        print(f"laser-attention {command}: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"laser-attention {command}: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        print(f"laser-attention {command}: not enough memory: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"laser-attention {command}: interrupted", file=sys.stderr)
        return 1
    return code
