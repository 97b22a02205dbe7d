"""Ctrl-C while a program is still loading ends in one line, not in a traceback.  Programs
import this first, before torch; once `main` runs, opd.cli.run does the same."""

import sys


def end(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("stopped before anything began", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end
