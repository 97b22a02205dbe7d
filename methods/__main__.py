"""python -m methods: all rows of train.py --method as a markdown table, for docs/methods.md."""

from methods.rows import METHODS
from opd import files

PREFIXES = {
    "self": "samples of --model itself, checked by weight hash",
    "mixed": "samples of --model itself, and given answers by turns",
    "teacher": "answers of another model",
    "old": "samples of an earlier state",
    "data": "any answers",
}
NORMS = {"token": "tokens", "sequence": "length × sequences", "batch": "sequences"}


def reads(method):
    """The flags of files that a row needs beside --model and --rollouts."""
    flags = []
    if method.rewards:
        flags.append("--rewards")
    if method.teacher:
        flags.append("--scores" if method.own else "--scores or --teacher")
    if method.reference:
        flags.append("--reference")
    if method.token_weight != "one":
        flags.append("--token-weights")
    if method.given:
        flags.append("--data")
    return ", ".join(flags) or "-"


def table():
    lines = [
        "| row | prefix | c_t(a) | N_t | reads | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        cells = [f"`{name}`", method.prefix, method.formula, NORMS[method.norm]]
        lines.append("| " + " | ".join([*cells, reads(method), method.about]) + " |")
    return "\n".join(lines)


def main(argv=None):
    files.parser(__doc__).parse_args(argv)
    print(table())
    return METHODS


if __name__ == "__main__":
    files.run(main)
