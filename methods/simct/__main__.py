"""A teacher of another vocabulary (SimCT, arXiv 2605.07711).

Scores of rollouts, unit by unit (units.py), and the units of a text (align.py):

    python -m methods.simct score --help
    python -m methods.simct align --help
"""

from methods.simct import align, units
from opd import cli


def main(argv=None):
    return cli.dispatch(__doc__, {"score": units.main, "align": align.main}, argv)


if __name__ == "__main__":
    cli.run(main)
