"""Step-wise on-policy distillation of agents with tools (SOD, arXiv 2605.07725).

A weight for every step (weights.py):

    python -m methods.sod weigh --help
"""

from methods.sod import weights
from opd import cli


def main(argv=None):
    return cli.dispatch(__doc__, {"weigh": weights.main}, argv)


if __name__ == "__main__":
    cli.run(main)
