"""python -m methods.simct score | align: a teacher of another vocabulary
(methods/simct/units.py, methods/simct/align.py)."""

from methods.simct import align, units
from opd import files


def main(argv=None):
    return files.dispatch(__doc__, {"score": units.main, "align": align.main}, argv)


if __name__ == "__main__":
    files.run(main)
