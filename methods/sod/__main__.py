"""python -m methods.sod weigh: step weights of episodes (weights.py)."""

from methods.sod import weights
from opd import files


def main(argv=None):
    return files.dispatch(weights.__doc__, {"weigh": weights.steps}, argv)


if __name__ == "__main__":
    files.run(main)
