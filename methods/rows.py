"""Every row that `train.py --method` knows: the base methods of opd/loss.py, then the systems'.

They are collected here and not in methods/__init__.py, which `python -m methods.NAME` imports
before it runs that module: it would be loaded twice."""

from methods import gad, lightning, prefix, sod, stable_opd
from methods.simct import loss as simct
from opd.loss import ROWS

METHODS = dict(ROWS)
for module in (gad, stable_opd, prefix, sod, simct, lightning):
    METHODS |= module.ROWS
