"""The command line of a stage: its parser, exit codes, checks of flags, and progress bar."""

import argparse
import dataclasses
import errno
import os
import signal
import sys

from tqdm import tqdm

from opd.disk import advice_on_error
from opd.records import BadInput
from opd.redact import printable


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "%(default)" in text:
            return action.help
        return text + " (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    # add_parser makes subcommands of the same class, so the rules hold for them too
    def __init__(self, **options):
        super().__init__(**{"formatter_class": _Formatter, "allow_abbrev": False} | options)


def parser(doc):
    """An ArgumentParser whose --help opens with the stage's docstring and shows every
    default."""
    return _Parser(description=doc)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a machine that is shut down, or a time limit.  Handled as Ctrl-C is."""


def _terminate(*_):
    raise Terminated


# faults of the place a stage runs in, not bugs: no traceback
ENVIRONMENT = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
)


def run(main):
    """Runs a stage's `main()` as a program, and exits with its code:

    0  done             2  BadInput, or a disk that cannot be written: one line on stderr
    3  done, but for records that could not be made ("failed" in the summary)
    130, 143  Ctrl-C, SIGTERM        141  nobody reads what it prints"""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may have ASCII only
    try:
        try:
            summary = main()
        finally:
            sys.stdout.flush()
    except BadInput as error:
        stop(2, f"error: {printable(str(error))}")
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Terminated) else 130
        stop(code, "stopped; run the same command again to go on")
    except BrokenPipeError:
        # what is left in the buffer goes nowhere, or Python would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        stop(141, "stopped: nobody reads the output any more; run the same command again")
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        where = f"{error.filename}: " if error.filename else ""
        stop(2, f"error: {where}{error.strerror}: {advice_on_error(error)}")
    if isinstance(summary, dict) and summary.get("failed"):
        sys.exit(3)


def stop(code, message):
    print(message, file=sys.stderr)
    sys.exit(code)


def dispatch(doc, commands, argv):
    """Runs commands[argv[0]](argv[1:]): the main of a stage that has subcommands, each with a
    parser of its own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in commands:
        p = parser(doc)
        p.add_argument(
            "command", choices=list(commands), help="COMMAND --help lists the flags of one"
        )
        p.parse_args(argv[:1])
    return commands[argv[0]](argv[1:])


def check_at_least(least, **options):
    """Refuses flags whose value is given and below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise BadInput(
                f"--{name.replace('_', '-')}: expected at least {least}, got {value}"
            )


def check_given(label, needed, **options):
    """Exactly one of the flags is given where one is needed, and else none."""
    names = ["--" + name.replace("_", "-") for name in options]
    found = [name for name, value in zip(names, options.values()) if value]
    if needed and not found:
        raise BadInput(f"{label}: expected {' or '.join(names)}, but it is missing")
    if found and not needed:
        raise BadInput(f"{label}: {found[0]} is given, but this method does not read it")
    if len(found) > 1:
        raise BadInput(f"{' and '.join(found)} are both a teacher's numbers: give one of them")


def changed_field(row, flag, text, fixed=()):
    """The dataclass `row` with one field changed by the text NAME=VALUE of a flag.  Fields are
    str, int or float, and none of `fixed`; BadInput names the flag, what was expected and what
    was got."""
    types = {f.name: f.type for f in dataclasses.fields(row) if f.type in (str, int, float)}
    types = {name: kind for name, kind in types.items() if name not in fixed}
    name, equals, value = text.partition("=")
    if not equals or name not in types:
        raise BadInput(f"{flag} {text}: expected NAME=VALUE with a name of {', '.join(types)}")
    try:
        typed = types[name](value)
    except ValueError:
        kind = types[name].__name__
        raise BadInput(f"{flag} {text}: expected a {kind}, got {value!r}") from None
    return dataclasses.replace(row, **{name: typed})


def progress(iterable=None, **options):
    """A progress bar on a terminal, nothing in a log file; the stage's last line says how it
    ended."""
    return tqdm(iterable, disable=not sys.stderr.isatty(), leave=False, **options)
