"""Studies: one file a system, each a list of stage commands with arms, controls and seeds.

    python -m experiments.NAME [--seeds N] [--arms a,b] [--smoke]
    python -m experiments.NAME --report results/NAME.jsonl

A study computes nothing itself: study.py runs its stage commands, claims.py judges its result
lines, report.py makes tables and pictures of them.  Controls are file-to-file scripts beside
them."""

import opd.quiet  # noqa: F401
