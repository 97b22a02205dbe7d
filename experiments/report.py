"""Tables and pictures of results files: `python -m experiments.report table | plot | gaps`."""

from pathlib import Path

import numpy as np

from opd import files
from opd.pictures import COLOURS, check_picture_name, new_picture, refuse_existing, tidy
from opd.records import BadInput
from opd.stats import interval, is_number

# ---- results: table


def read_results(path, fields):
    """The lines of a results file, `fields` being numbers in each.  Two lines for one (arm,
    seed, step), or two final ones for one (arm, seed), are refused: a mean over both would
    count a run double."""
    rows, seen = list(files.read(path, "results")), set()
    for row in rows:
        place = f"{path}: arm {row['arm']!r}, seed {row['seed']}, step {row['step']}"
        for last in [row["step"]] + ["final"] * (row.get("final") is True):
            if (row["arm"], row["seed"], last) in seen:
                raise BadInput(
                    f"{place}: expected one {'final line' if last == 'final' else 'line'}, "
                    f"got another: "
                    "remove the lines of the run that does not count"
                )
            seen.add((row["arm"], row["seed"], last))
        for field in fields:
            if not is_number(row.get(field)):
                raise BadInput(
                    f"{place}: {field}: expected a finite number, got {row.get(field)!r}"
                )
    return rows


def compare(rows, metric, baseline, columns):
    """One dict an arm: its mean over seeds at the last checkpoint, and that of its differences
    to `baseline`, seed by seed.

    A seed without a line that has `final` true was stopped: it is missing, like one that was
    never begun. Arms share prompts, starting weights and sampling noise within a seed, so
    differences within seeds vary less than the arms do: [0.5, 0.7, 0.9] against [0.4, 0.6, 0.8]
    is +0.1 +- 0, although either mean is +- 0.5."""
    # arm -> seed -> line; arms in order of appearance
    finals = {row["arm"]: {} for row in rows}
    for row in rows:
        if row.get("final") is True:
            finals[row["arm"]][row["seed"]] = row
    every_seed, table = sorted({row["seed"] for row in rows}), []
    for arm, seeds in finals.items():
        values = {seed: seeds[seed][metric] for seed in sorted(seeds)}
        pairs = [
            value - finals[baseline][seed][metric]
            for seed, value in values.items()
            if seed in finals[baseline]
        ]
        mean, half = interval(list(values.values())) if values else (None, None)
        difference, difference_half = (
            interval(pairs) if pairs and arm != baseline else (None, None)
        )
        missing = [seed for seed in every_seed if seed not in seeds]
        line = {
            "arm": arm,
            "values": values,
            "missing": missing,
            "pairs": len(pairs),
            "mean": mean,
            "half": half,
            "difference": difference,
            "difference_half": difference_half,
            "columns": {},
        }
        # a mean over some of the seeds would be a number of another experiment
        for column in columns:
            numbers = [row.get(column) for row in seeds.values()]
            line["columns"][column] = (
                float(np.mean(numbers)) if numbers and all(map(is_number, numbers)) else None
            )
        table.append(line)
    return table


def markdown(table, metric, baseline):
    """The rows of `compare` as a markdown table with its reading note."""
    columns = list(table[0]["columns"])
    lines = [
        ["arm", "seeds", metric, f"vs {baseline}", *columns, "each seed"],
        ["---"] * (5 + len(columns)),
    ]
    for line in table:
        seeds, difference = (
            str(len(line["values"])),
            _number(line["difference"], line["difference_half"], "+"),
        )
        if line["missing"]:
            seeds += f" (misses {', '.join(map(str, line['missing']))})"
        if line["difference"] is not None and line["pairs"] < len(line["values"]):
            difference += f" ({line['pairs']} pairs)"
        lines.append(
            [
                line["arm"].replace("|", "\\|"),
                seeds,
                _number(line["mean"], line["half"]),
                difference,
                *map(_number, line["columns"].values()),
                " ".join(f"{seed}:{_number(value)}" for seed, value in line["values"].items()),
            ]
        )
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        + f"\n\n{metric} at the last checkpoint, mean over seeds ± half of the 95 % "
        f"t-interval; differences to `{baseline}` "
        "are taken seed by seed; other columns are means over seeds.\n"
    )


def _number(x, half=None, sign=""):
    """0.4123 -> 0.412, 31.62 -> 31.6, 12345 -> 12.3k, 2.5e6 -> 2.50M; with its half-width 0.412
    ± 0.030"""
    if half is not None:
        return f"{_number(x, sign=sign)} ± {_number(half)}"
    if x is None or x == 0 and not sign:
        return "-" if x is None else "0"
    for least, divisor, suffix, digits in (
        (1e6, 1e6, "M", 2),
        (1e4, 1e3, "k", 1),
        (100, 1, "", 0),
        (10, 1, "", 1),
    ):
        if abs(x) >= least:
            return f"{x / divisor:{sign}.{digits}f}{suffix}"
    return f"{x:{sign}.3f}"


def write_table(argv):
    p = files.parser(
        "A markdown table of results, arm by arm, differences paired by seed.\n\n"
        "    python -m experiments.report table results/ropd.jsonl --out results/ropd.md"
    )
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="results JSONL; every file gets a table of its own",
    )
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
    args, tables, texts = p.parse_args(argv), {}, []
    refuse_existing(args.out, args.overwrite)
    for path in args.files:
        rows = read_results(path, [args.metric])
        if args.baseline not in {row["arm"] for row in rows}:
            raise BadInput(
                f"{path}: expected an arm {args.baseline!r} to compare with, but there is "
                f"none: name one with --baseline"
            )
        tables[path] = compare(rows, args.metric, args.baseline, args.columns)
        for line in tables[path]:
            if line["missing"] and not args.partial:
                raise BadInput(
                    f"{path}: arm {line['arm']!r} has no line with `final` true for seed "
                    f"{', '.join(map(str, line['missing']))}, which others have: finish it, "
                    f"or --partial marks it"
                )
        texts.append(
            f"## {Path(path).stem}\n\n" + markdown(tables[path], args.metric, args.baseline)
        )
    print("\n".join(texts), end="")
    if args.out:
        files.write_atomically(args.out, "\n".join(texts))
    return tables


# ---- results: plot

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


def curves(rows, metric, x):
    """{arm: [(x, mean, least, greatest) over seeds, ...]}, and what was left out, as sentences.

    A checkpoint some seed of the arm has not reached is left out: the mean over the others
    would bend the curve. x is None for an arm that was measured at one step only (`before`, a
    teacher): that is a level, not a curve."""
    arms, lines, left_out = {}, {}, []
    for row in rows:
        arms.setdefault(row["arm"], {}).setdefault(row["step"], {})[row["seed"]] = row
    for arm, steps in arms.items():
        lines[arm], seeds = [], {seed for step in steps.values() for seed in step}
        for step in sorted(steps):
            missing = sorted(seeds - steps[step].keys())
            if missing:
                left_out.append(
                    f"arm {arm!r}, step {step}: no line for seed {', '.join(map(str, missing))}"
                )
                continue
            values = [row[metric] for row in steps[step].values()]
            at = (
                None
                if len(steps) == 1
                else float(np.mean([row[x] for row in steps[step].values()]))
            )
            lines[arm].append((at, float(np.mean(values)), min(values), max(values)))
    return lines, left_out


def figure(lines, metric, x, title):
    """The matplotlib figure of `curves`: a line with a band an arm, a dashed level for an arm
    measured once."""
    picture = new_picture(9, 4.8)
    axes = picture.add_subplot()
    levels = [arm for arm, points in lines.items() if points and points[0][0] is None]
    # the ninth arm has the first one's colour, but squares and dashes
    curved = [arm for arm in lines if arm not in levels]
    styles = {
        arm: dict(
            color=COLOURS[i % 8], marker="os"[i // 8 % 2], linestyle=("-", "--")[i // 8 % 2]
        )
        for i, arm in enumerate(curved)
    }
    for arm, points in lines.items():
        if not points:
            continue
        at, mean, least, greatest = zip(*points)
        label = f"{arm} {mean[-1]:.3g}"
        if arm in levels:  # grey, told apart by their dashes
            axes.axhline(
                mean[0],
                color="0.35",
                linestyle=("--", ":", "-.")[levels.index(arm) % 3],
                linewidth=1.5,
                label=label,
            )
        else:
            axes.plot(at, mean, **styles[arm], markersize=4, linewidth=1.8, label=label)
            axes.fill_between(
                at, least, greatest, color=styles[arm]["color"], alpha=0.13, linewidth=0
            )
    if metric == "accuracy":
        axes.set_ylim(bottom=0)
    axes.set(xlabel=AXIS.get(x, x), ylabel=AXIS.get(metric, metric))
    axes.set_title(title, loc="left", fontsize=11)
    if axes.get_xlim()[1] >= 10000:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    tidy(axes)
    picture.legend(loc="outside right upper", frameon=False)
    return picture


def write_plot(argv):
    p = files.parser(
        "A picture of results: one line an arm, mean over seeds, band from the least to the "
        "greatest seed.\n\n"
        "    python -m experiments.report plot results/ropd.jsonl --out results/ropd.png"
    )
    p.add_argument("file", metavar="FILE", help="results JSONL")
    p.add_argument("--metric", default="accuracy", help="the number on the vertical axis")
    p.add_argument(
        "--arms", help="comma-separated arms to draw instead of all, in the file's order"
    )
    p.add_argument(
        "--x",
        default="step",
        help="the number on the horizontal axis: step, generated_tokens, seconds ...",
    )
    p.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    check_picture_name(p, args)
    rows = read_results(args.file, [args.x])
    chosen = args.arms.split(",") if args.arms else [row["arm"] for row in rows]
    if missing := [arm for arm in chosen if arm not in {row["arm"] for row in rows}]:
        raise BadInput(f"--arms: expected arms of {args.file}, got {missing[0]!r}")
    rows = [row for row in rows if row["arm"] in chosen]
    # a reward is known after the first round, not before
    without = sorted({(row["arm"], row["step"]) for row in rows if args.metric not in row})
    having = [row for row in rows if args.metric in row]
    if bad := [row for row in having or rows if not is_number(row.get(args.metric))]:
        raise BadInput(
            f"{args.file}: arm {bad[0]['arm']!r}, seed {bad[0]['seed']}, step "
            f"{bad[0]['step']}: {args.metric}: expected a finite number, got "
            f"{bad[0].get(args.metric)!r}"
        )
    lines, left_out = curves(having, args.metric, args.x)
    left_out += [f"arm {arm!r}, step {step}: no {args.metric}" for arm, step in without]
    seeds = len({row["seed"] for row in having})
    title = (
        f"{Path(args.file).stem}: "
        + ("one seed" if seeds == 1 else f"mean over {seeds} seeds, band = min to max")
        + "; legend: last value"
    )
    figure(lines, args.metric, args.x, title).savefig(args.out)
    print(
        f"eval.py: {args.out}: {len(lines)} arms"
        + "".join(f"\nleft out: {sentence}" for sentence in left_out)
    )
    return {"out": args.out, "lines": lines, "left_out": left_out}


def paired_gaps(rows, arms, against, metric, at):
    """{arm: [(prefix, at, mean, half), ...]}: what `PREFIX-arm` has more than `PREFIX-against`
    at the end, seed by seed, with half of its 95 % t-interval (None for one seed), at the mean
    last `at` of the latter; "" is the prefix of `arm` itself.  In order of `at`."""
    last = {}
    for row in sorted((row for row in rows if row.get("final")), key=lambda row: row["step"]):
        last.setdefault(row["arm"], {})[row["seed"]] = row
    found = {arm: [] for arm in arms}
    for name, base in last.items():
        prefix = (
            ""
            if name == against
            else name.removesuffix(f"-{against}")
            if name.endswith(f"-{against}")
            else None
        )
        for arm in arms if prefix is not None else ():
            other = last.get(f"{prefix}-{arm}" if prefix else arm, {})
            if seeds := sorted(base.keys() & other.keys()):
                mean, half = interval(
                    [other[seed][metric] - base[seed][metric] for seed in seeds]
                )
                found[arm].append(
                    (prefix, float(np.mean([base[seed][at] for seed in seeds])), mean, half)
                )
    return {arm: sorted(points, key=lambda point: point[1]) for arm, points in found.items()}


def write_gaps(argv):
    p = files.parser(
        "A picture of paired differences: how much an arm has more than another one, against "
        "a number that differs between groups of arms.\n\n"
        "    python -m experiments.report gaps results/simct.jsonl --arms simct,masked "
        "--against simple "
        "--at strict --out results/simct_gap.png\n\n"
        "Groups are prefixes of arm names: m64-simct is held against m64-simple, simct "
        "against simple."
    )
    p.add_argument("file", metavar="FILE", help="results JSONL")
    p.add_argument("--arms", required=True, help="comma-separated arms, a series each")
    p.add_argument("--against", required=True, help="the arm that is subtracted")
    p.add_argument(
        "--at",
        required=True,
        help="the number on the horizontal axis, of the arm that is subtracted",
    )
    p.add_argument("--metric", default="accuracy", help="what is compared")
    p.add_argument(
        "--unprefixed",
        default="no prefix",
        metavar="NAME",
        help="what the group without a prefix is called in the picture",
    )
    p.add_argument("--out", required=True, help="picture to write (.png, .svg, .pdf)")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    check_picture_name(p, args)
    found = paired_gaps(
        [row for row in files.read(args.file, "results") if args.at in row],
        args.arms.split(","),
        args.against,
        args.metric,
        args.at,
    )
    for arm, points in found.items():
        if not points:
            raise BadInput(
                f"{args.file}: expected final lines with {args.at!r} of arm {arm!r} and of "
                f"{args.against!r} for a common seed, got none"
            )
    picture = new_picture(8, 4.6)
    axes = picture.add_subplot()
    span = (
        max(at for points in found.values() for _, at, _, _ in points)
        - min(at for points in found.values() for _, at, _, _ in points)
        or 1.0
    )
    for i, (arm, points) in enumerate(found.items()):
        names, at, mean, half = zip(*points)
        axes.errorbar(
            np.array(at) + (i - (len(found) - 1) / 2) * 0.012 * span,
            mean,
            yerr=[h or 0 for h in half],
            color=COLOURS[i % 8],
            marker="os^D"[i % 4],
            capsize=3,
            linewidth=1.6,
            label=f"{arm} - {args.against}",
        )
    for name, at, *_ in next(iter(found.values())):
        axes.annotate(
            name or args.unprefixed,
            (at, axes.get_ylim()[1]),
            ha="center",
            va="bottom",
            fontsize=8,
            color="0.35",
            annotation_clip=False,
        )
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set(
        xlabel=AXIS.get(args.at, args.at),
        ylabel=f"difference of {args.metric}, mean and 95 % interval",
    )
    tidy(axes)
    axes.legend(frameon=False)
    picture.savefig(args.out)

    def told(name, at, mean, half):
        return f"{name or args.unprefixed} at {at:.3g} {mean:+.3f}" + (
            "" if half is None else f" ± {half:.3f}"
        )

    print(
        f"experiments.report gaps: {args.out}: "
        + "; ".join(
            f"{arm}: " + ", ".join(told(*point) for point in points)
            for arm, points in found.items()
        )
    )
    return found


def main(argv=None):
    return files.dispatch(
        __doc__, {"table": write_table, "plot": write_plot, "gaps": write_gaps}, argv
    )


if __name__ == "__main__":
    files.run(main)
