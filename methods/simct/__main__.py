"""A teacher of another vocabulary (SimCT, arXiv 2605.07711).

python -m methods.simct score --help    # scores rollouts unit by unit (units.py)
python -m methods.simct align --help    # shows the units of a text (align.py)
"""

from methods.simct import align, units
from opd import files


def main(argv=None):
    return files.dispatch(__doc__, {"score": units.main, "align": align.main}, argv)


if __name__ == "__main__":
    files.run(main)
