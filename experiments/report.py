"""Tables and pictures of results files.

    python -m experiments.report table results/ropd.jsonl --out results/ropd.md
    python -m experiments.report plot results/ropd.jsonl --out results/ropd.png
    python -m experiments.report gaps results/simct.jsonl --arms simct,masked \\
        --against simple --at strict --out results/simct_gap.png

Reads what experiments append to results/: a line per arm, seed and checkpoint.  `table`
compares arms seed by seed.  `plot` draws a line an arm: mean over seeds, band from the least to
the greatest.  `gaps` draws how much an arm has more than another one, against a number that
differs between groups of arms.  Groups are prefixes of arm names: m64-simct is held against
m64-simple, simct against simple.
"""

from pathlib import Path

import numpy as np

from experiments.claims import markdown
from opd import cli, disk, files
from opd.pictures import COLOURS, check_picture, new_picture, refuse_existing, tidy
from opd.records import BadInput, is_number
from opd.stats import interval, mean_or_none

AXIS = {
    "accuracy": "accuracy on held-out prompts (0-1)",
    "length_mean": "mean answer length (tokens)",
    "seconds": "time (s)",
    "step": "training step",
    "proxy": "mean score of the discriminator",
    "judge_accuracy": "pairs in which the discriminator prefers the teacher's text",
    "route_b": "share of answers by the route that the student lacked",
    "strict": "share of the answers' bytes that both tokenizers spell alike",
    "generated_tokens": "tokens the student has generated",
}


# ---- table


def place_of(path, row):
    return f"{path}: arm {row['arm']!r}, seed {row['seed']}, step {row['step']}"


def check_numbers(path, rows, field):
    """BadInput for the first row whose `field` is no finite number."""
    for row in rows:
        if not is_number(row.get(field)):
            raise BadInput(
                f"{place_of(path, row)}: {field}: expected a finite number, got "
                f"{row.get(field)!r}"
            )


def read_results(path):
    """The lines of a results file.  Two lines for one (arm, seed, step), or two final ones for
    one (arm, seed), are refused: a mean over both would count a run double."""
    rows = list(files.read(path, "results"))
    seen = set()
    for row in rows:
        run = (row["arm"], row["seed"])
        keys = [(*run, row["step"])]
        if row.get("final") is True:
            keys.append((*run, "final"))
        for key in keys:
            if key in seen:
                line = "final line" if key[2] == "final" else "line"
                raise BadInput(
                    f"{place_of(path, row)}: expected one {line}, got another: remove the "
                    f"lines of the run that does not count"
                )
            seen.add(key)
    return rows


def final_rows(rows):
    """{arm: {seed: its final line}}, arms in order of appearance; a run without a line that has
    `final` true was stopped."""
    finals = {row["arm"]: {} for row in rows}
    for row in rows:
        if row.get("final") is True:
            finals[row["arm"]][row["seed"]] = row
    return finals


def differences(ours, theirs, metric):
    """One number a seed that both have, in order of seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[seed][metric] - theirs[seed][metric] for seed in seeds]


def compare(rows, metric, baseline, columns):
    """One dict an arm: its mean over seeds at the last checkpoint, and that of its differences
    to `baseline`, seed by seed.

    A seed that was stopped is missing, like one that was never begun.  Arms share prompts,
    starting weights and sampling noise within a seed, so differences within seeds vary less
    than the arms do: [0.5, 0.7, 0.9] against [0.4, 0.6, 0.8] is +0.1 +- 0, although either mean
    is +- 0.5."""
    finals = final_rows(rows)
    every_seed = sorted({row["seed"] for row in rows})
    unknown = (None, None)
    table = []
    for arm, seeds in finals.items():
        values = {seed: seeds[seed][metric] for seed in sorted(seeds)}
        pairs = differences(seeds, finals[baseline], metric)
        mean, half = interval(list(values.values())) if values else unknown
        compared = pairs and arm != baseline
        difference, difference_half = interval(pairs) if compared else unknown
        line = {
            "arm": arm,
            "values": values,
            "missing": [seed for seed in every_seed if seed not in seeds],
            "pairs": len(pairs),
            "mean": mean,
            "half": half,
            "difference": difference,
            "difference_half": difference_half,
            "columns": {column: mean_of(column, seeds.values()) for column in columns},
        }
        table.append(line)
    return table


def mean_of(column, rows):
    """None where a row lacks the number: a mean over some of the seeds would be a number of
    another experiment."""
    numbers = [row.get(column) for row in rows]
    return mean_or_none(numbers) if all(map(is_number, numbers)) else None


def number(x, half=None, sign=""):
    """0.4123 -> 0.412, 31.62 -> 31.6, 12345 -> 12.3k, 2.5e6 -> 2.50M; with its half-width 0.412
    ± 0.030"""
    if x is None:
        return "-"
    if half is not None:
        return f"{number(x, sign=sign)} ± {number(half)}"
    if abs(x) >= 1e6:
        return f"{x / 1e6:{sign}.2f}M"
    if abs(x) >= 1e4:
        return f"{x / 1e3:{sign}.1f}k"
    if abs(x) >= 10:
        return f"{x:{sign}.{0 if abs(x) >= 100 else 1}f}"
    return f"{x:{sign}.3f}" if x or sign else "0"


def cells_of(line):
    """The cells of one row of `compare`."""
    seeds = str(len(line["values"]))
    if line["missing"]:
        seeds += f" (misses {', '.join(map(str, line['missing']))})"
    difference = number(line["difference"], line["difference_half"], "+")
    if line["difference"] is not None and line["pairs"] < len(line["values"]):
        difference += f" ({line['pairs']} pairs)"
    return [
        line["arm"].replace("|", "\\|"),
        seeds,
        number(line["mean"], line["half"]),
        difference,
        *map(number, line["columns"].values()),
        " ".join(f"{seed}:{number(value)}" for seed, value in line["values"].items()),
    ]


def describe(table, metric, baseline):
    """The rows of `compare` as a markdown table with its reading note."""
    columns = list(table[0]["columns"])
    head = ["arm", "seeds", metric, f"vs {baseline}", *columns, "each seed"]
    return (
        f"{markdown([head, *map(cells_of, table)])}\n{metric} at the last checkpoint, mean "
        f"over seeds ± half of the 95 % t-interval; differences to `{baseline}` are taken seed "
        f"by seed; other columns are means over seeds.\n"
    )


def table_of(path, metric, baseline, columns, partial):
    """The rows of `compare` for one file, or BadInput where an arm misses seeds."""
    rows = read_results(path)
    check_numbers(path, rows, metric)
    if baseline not in {row["arm"] for row in rows}:
        raise BadInput(
            f"{path}: expected an arm {baseline!r} to compare with, but there is none: name "
            f"one with --baseline"
        )
    table = compare(rows, metric, baseline, columns)
    for line in table:
        if line["missing"] and not partial:
            raise BadInput(
                f"{path}: arm {line['arm']!r} has no line with `final` true for seed "
                f"{', '.join(map(str, line['missing']))}, which others have: finish it, or "
                f"--partial marks it"
            )
    return table


def table(argv):
    p = cli.parser(__doc__)
    p.add_argument("files", nargs="+", metavar="FILE", help="results; a table each")
    p.add_argument("--metric", default="accuracy", help="the number to compare")
    p.add_argument("--baseline", default="before", help="the arm to take differences to")
    p.add_argument(
        "--columns",
        nargs="*",
        default="length_mean generated_tokens teacher_tokens trained_tokens seconds".split(),
        help="other numbers to average; - where a line lacks one",
    )
    p.add_argument(
        "--partial",
        action="store_true",
        help="accept arms that miss seeds; the table names the seeds they miss",
    )
    p.add_argument("--out", help="markdown file to write as well")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    if args.out:
        refuse_existing(args.out, args.overwrite)
    tables = {}
    texts = []
    for path in args.files:
        tables[path] = table_of(path, args.metric, args.baseline, args.columns, args.partial)
        text = describe(tables[path], args.metric, args.baseline)
        texts.append(f"## {Path(path).stem}\n\n{text}")
    print("\n".join(texts), end="")
    if args.out:
        disk.write_atomically(args.out, "\n".join(texts))
    return tables


# ---- plot


def curves(rows, metric, x):
    """{arm: [(x, mean, least, greatest) over seeds, ...]}, and what was left out, as sentences.

    A checkpoint some seed of the arm has not reached is left out: the mean over the others
    would bend the curve. x is None for an arm that was measured at one step only (`before`, a
    teacher): that is a level, not a curve."""
    arms = {}
    for row in rows:
        arms.setdefault(row["arm"], {}).setdefault(row["step"], {})[row["seed"]] = row
    lines = {}
    left_out = []
    for arm, steps in arms.items():
        lines[arm] = []
        seeds = {seed for step in steps.values() for seed in step}
        for step in sorted(steps):
            if missing := sorted(seeds - steps[step].keys()):
                absent = ", ".join(map(str, missing))
                left_out.append(f"arm {arm!r}, step {step}: no line for seed {absent}")
                continue
            here = steps[step].values()
            values = [row[metric] for row in here]
            at = None
            if len(steps) > 1:
                at = float(np.mean([row[x] for row in here]))
            lines[arm].append((at, float(np.mean(values)), min(values), max(values)))
    return lines, left_out


def figure(lines, metric, x, title):
    """The matplotlib figure of `curves`: a line with a band an arm, a dashed level for an arm
    measured once."""
    picture = new_picture(9, 4.8)
    axes = picture.add_subplot()
    levels = 0
    curved = 0
    for arm, points in lines.items():
        if not points:
            continue
        at, mean, least, greatest = zip(*points)
        label = f"{arm} {mean[-1]:.3g}"
        if at[0] is None:  # grey, told apart by their dashes
            dashes = ("--", ":", "-.")[levels % 3]
            axes.axhline(mean[0], color="0.35", linestyle=dashes, linewidth=1.5, label=label)
            levels += 1
            continue
        # the ninth arm has the first one's colour, but squares and dashes
        style = ("o-", "s--")[curved // 8 % 2]
        colour = COLOURS[curved % 8]
        axes.plot(at, mean, style, color=colour, markersize=4, linewidth=1.8, label=label)
        axes.fill_between(at, least, greatest, color=colour, alpha=0.13, linewidth=0)
        curved += 1
    if metric == "accuracy":
        axes.set_ylim(bottom=0)
    if axes.get_xlim()[1] >= 10000:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    axes.set(xlabel=AXIS.get(x, x), ylabel=AXIS.get(metric, metric))
    axes.set_title(title, loc="left", fontsize=11)
    tidy(axes)
    picture.legend(loc="outside right upper", frameon=False)
    return picture


def rows_to_plot(path, arms, metric, x):
    """The lines of some arms (None: of all) that have the metric, and of the others a sentence
    each: a reward is known after the first round, not before."""
    rows = read_results(path)
    check_numbers(path, rows, x)
    if arms is not None:
        for arm in arms:
            if arm not in {row["arm"] for row in rows}:
                raise BadInput(f"--arms: expected arms of {path}, got {arm!r}")
        rows = [row for row in rows if row["arm"] in arms]
    having = [row for row in rows if metric in row]
    without = sorted({(row["arm"], row["step"]) for row in rows if metric not in row})
    check_numbers(path, having or rows, metric)
    return having, [f"arm {arm!r}, step {step}: no {metric}" for arm, step in without]


def picture_parser():
    p = cli.parser(__doc__)
    p.add_argument("file", metavar="FILE", help="results JSONL")
    p.add_argument("--metric", default="accuracy", help="the number on the vertical axis")
    p.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    return p


def plot(argv):
    p = picture_parser()
    p.add_argument("--arms", help="comma-separated arms to draw instead of all")
    p.add_argument(
        "--x",
        default="step",
        help="the number on the horizontal axis: step, generated_tokens, seconds ...",
    )
    args = p.parse_args(argv)
    check_picture(args.out, args.overwrite)
    arms = args.arms.split(",") if args.arms else None
    rows, without = rows_to_plot(args.file, arms, args.metric, args.x)
    lines, left_out = curves(rows, args.metric, args.x)
    left_out += without
    seeds = len({row["seed"] for row in rows})
    over = "one seed" if seeds == 1 else f"mean over {seeds} seeds, band = min to max"
    title = f"{Path(args.file).stem}: {over}; legend: last value"
    figure(lines, args.metric, args.x, title).savefig(args.out)
    print(f"experiments.report plot: {args.out}: {len(lines)} arms")
    for sentence in left_out:
        print(f"left out: {sentence}")
    return {"out": args.out, "lines": lines, "left_out": left_out}


# ---- gaps


def paired_gaps(rows, arms, against, metric, at):
    """{arm: [(prefix, at, mean, half), ...]}, in order of `at`.

    What `PREFIX-arm` has more than `PREFIX-against` at the end, seed by seed, with half of its
    95 % t-interval (None for one seed), at the mean last `at` of the latter; "" is the prefix
    of `arm` itself."""
    finals = final_rows(rows)
    found = {arm: [] for arm in arms}
    for name, base in finals.items():
        if name != against and not name.endswith(f"-{against}"):
            continue
        start = name.removesuffix(against)  # "" or "PREFIX-"
        for arm in arms:
            other = finals.get(start + arm, {})
            pairs = differences(other, base, metric)
            if pairs:
                place = float(
                    np.mean([base[seed][at] for seed in sorted(base) if seed in other])
                )
                found[arm].append((start.rstrip("-"), place, *interval(pairs)))
    return {arm: sorted(points, key=lambda point: point[1]) for arm, points in found.items()}


def gaps_figure(found, against, metric, at):
    """The matplotlib figure of `paired_gaps`: a series an arm, the groups named above."""
    picture = new_picture(8, 4.6)
    axes = picture.add_subplot()
    places = [point[1] for points in found.values() for point in points]
    apart = 0.012 * (max(places) - min(places) or 1.0)  # series stand side by side
    for i, (arm, points) in enumerate(found.items()):
        _, x, mean, half = zip(*points)
        axes.errorbar(
            np.array(x) + (i - (len(found) - 1) / 2) * apart,
            mean,
            yerr=[h or 0 for h in half],
            color=COLOURS[i % 8],
            marker="os^D"[i % 4],
            capsize=3,
            linewidth=1.6,
            label=f"{arm} - {against}",
        )
    top = axes.get_ylim()[1]
    style = dict(ha="center", va="bottom", fontsize=8, color="0.35", annotation_clip=False)
    for name, x, *_ in next(iter(found.values())):
        axes.annotate(name or "no prefix", (x, top), **style)
    axes.axhline(0, color="0.35", linewidth=1)
    label = f"difference of {metric}, mean and 95 % interval"
    axes.set(xlabel=AXIS.get(at, at), ylabel=label)
    tidy(axes)
    axes.legend(frameon=False)
    return picture


def gaps(argv):
    p = picture_parser()
    p.add_argument("--arms", required=True, help="comma-separated arms, a series each")
    p.add_argument("--against", required=True, help="the arm that is subtracted")
    p.add_argument("--at", required=True, help="number on the horizontal axis, of --against")
    args = p.parse_args(argv)
    check_picture(args.out, args.overwrite)
    rows = [row for row in read_results(args.file) if args.at in row]
    arms = args.arms.split(",")
    found = paired_gaps(rows, arms, args.against, args.metric, args.at)
    for arm, points in found.items():
        if not points:
            raise BadInput(
                f"{args.file}: expected final lines with {args.at!r} of arm {arm!r} and of "
                f"{args.against!r} for a common seed, got none"
            )
    gaps_figure(found, args.against, args.metric, args.at).savefig(args.out)
    for arm, points in found.items():
        for name, at, mean, half in points:
            place = f"{name or 'no prefix'} at {at:.3g}"
            print(f"{arm} - {args.against}: {place}: {number(mean, half, '+')}")
    return found


def main(argv=None):
    return cli.dispatch(__doc__, {"table": table, "plot": plot, "gaps": gaps}, argv)


if __name__ == "__main__":
    cli.run(main)
