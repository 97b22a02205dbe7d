"""python -m methods: all rows of train.py --method as a markdown table, for docs/methods.md."""

from methods.rows import METHODS
from opd import cli

OMEGAS = {
    "one": "1",
    "informative": "0 if the group has one reward",
    "accepted": "1[R ≥ s]",
    "softmax": "n softmax(R / s)",
    "preference": "±2s σ(−h)",
}
NORMS = {"token": "tokens", "sequence": "length × sequences", "batch": "sequences"}


def reads(method):
    """The flags of files that a row needs beside --model and --rollouts."""
    flags = []
    if method.rewards:
        flags.append("--rewards")
    if method.teacher:
        scores = "--scores (--top-k)" if method.support else "--scores"
        flags.append(scores if method.own else f"{scores} or --teacher")
    if method.reference:
        flags.append("--reference")
    if method.token_weight != "one":
        flags.append("--token-weights")
    if method.prefix == "mixed":
        flags.append("--data (with --scores also --data-scores)")
    elif method.given:
        flags.append("--data")
    return ", ".join(flags) or "-"


def table():
    lines = [
        "| row | prefix | ω | c_t(a) | N_t | reads | what it is |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        cells = [f"`{name}`", method.prefix, OMEGAS[method.omega], method.formula]
        cells.append(NORMS[method.norm])
        lines.append("| " + " | ".join([*cells, reads(method), method.about]) + " |")
    return "\n".join(lines)


def main(argv=None):
    cli.parser(__doc__).parse_args(argv)
    print(table())
    return METHODS


if __name__ == "__main__":
    cli.run(main)
