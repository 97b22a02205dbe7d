"""Are the change points of methods.prefix chance?  The same series in random order, and cuts
held against the first slip.

    python -m experiments.prefix_null --rollouts R --scores S --model runs/toy/student \\
        --prompts P --out null.json --plot null.png

Reads rollouts and scores as `methods.prefix weigh` does; trains nothing.  Three nulls: the
blocks of each rollout in random order; runs of about sqrt(n) blocks in random order, which
keeps most of the autocorrelation; and the line that fits the series best with what is left over
in random order, for a steady fall is no collapse.  With --prompts (running sums) also: do cuts
come at or after the first wrong step of a rollout?

Simplifications: 1. runs begin at fixed places and can hardly move below 5 blocks: this null
cuts too often; 2. all series are held in memory, a number a block.
"""

import json
import math

import numpy as np

from experiments.series import band, by_offset, kept_shares, means
from experiments.weight_controls import nearest_cut
from methods.prefix import STRONG, BlockReader, add_series_flags, bic_cut
from opd import cli, disk, files
from opd.answers import question_of
from opd.pictures import COLOURS, check_picture, new_picture, refuse_existing, tidy
from opd.records import BadInput
from opd.stats import mean_or_none, shown
from worlds.predicates import steps_of, terms_of

# ---- against random order


def permuted(s, size, rng):
    """A series [n] and the sizes of its blocks [n], in one random order."""
    order = rng.permutation(len(s))
    return s[order], size[order]


def block_shuffled(s, size, rng):
    """Runs of round(sqrt(n)) (at least 2) neighbours in random order; within a run they keep
    theirs.  n = 4: 0 1 2 3 or 2 3 0 1."""
    n = len(s)
    length = max(2, round(math.sqrt(n)))
    runs = np.split(np.arange(n), np.arange(0, n, length)[1:])
    order = np.concatenate([runs[i] for i in rng.permutation(len(runs))])
    return s[order], size[order]


def linear_trend(s, size, rng):
    """The least-squares line of the series, and its residuals in random order; blocks keep
    their sizes."""
    at = np.arange(len(s)) - (len(s) - 1) / 2
    line = s.mean() + at * (at @ s) / max(at @ at, 1)
    return line + rng.permutation(s - line), size


NULLS = {
    "permuted": permuted,
    "block_shuffled": block_shuffled,
    "linear_trend": linear_trend,
}
GUARD = {"faithful": False, "guarded": True}


def detector(series, sizes, guard):
    """What the detector finds in a list of series: cut rate, share with gain above 6, mean
    gain, median position of the cuts."""
    gains = []
    tokens = []
    for s, size in zip(series, sizes):
        kept, bic0, bic1 = bic_cut(s, guard)
        if bic1 is not None:
            gains.append(bic0 - bic1)
        if kept is not None:
            tokens.append(kept_shares(size)[kept - 1])
    return {
        "cut_rate": len(tokens) / len(series),
        "strong": sum(gain > STRONG for gain in gains) / len(series),
        "gain_mean": mean_or_none(gains),
        "position_tokens": float(np.median(tokens)) if tokens else None,
    }


def pool(repeats):
    """Means over the detector's findings in several random orders, beside them the least and
    greatest cut rate."""
    pooled = {}
    for field in repeats[0]:
        pooled[field] = mean_or_none([row[field] for row in repeats if row[field] is not None])
    rates = np.array([row["cut_rate"] for row in repeats])
    return pooled | {
        "cut_rate_low": float(rates.min()),
        "cut_rate_high": float(rates.max()),
    }


def against_nulls(series, sizes, repeats, seed):
    """{"faithful" | "guarded": {"real" or a name of NULLS: what `detector` finds, of a null
    what `pool` makes of it}}."""
    result = {rule: {"real": detector(series, sizes, guard)} for rule, guard in GUARD.items()}
    for null, draw in NULLS.items():
        rng = np.random.default_rng(seed)
        found = {rule: [] for rule in GUARD}
        for _ in range(repeats):
            drawn = [draw(s, size, rng) for s, size in zip(series, sizes)]
            moved, moved_sizes = zip(*drawn)
            for rule, guard in GUARD.items():
                found[rule].append(detector(moved, moved_sizes, guard))
        for rule, rows in found.items():
            result[rule][null] = pool(rows)
    return result


# ---- against the first slip


def first_slip(question, texts):
    """Index of the first block with a wrong step of a running sum, or None (also for an answer
    that shows no steps).

    A step is wrong when its arithmetic is, when it does not start from the previous total, or
    when its term is not the question's next. first_slip("7+5-3=?", ["7+5=12\\n", "12-3=8\\n",
    "#8"]) -> 1.  Blocks must be whole lines."""
    terms = terms_of(question)
    for i in range(len(texts)):
        total = terms[0]
        steps = steps_of(question, "".join(texts[: i + 1]))
        for k, (before, term, after) in enumerate(steps, 1):
            if k >= len(terms) or term != terms[k] or before != total or before + term != after:
                return i
            total = after
    return None


def about_slips(series, sizes, slips, guard, seed, deals=200):
    """Do cuts follow the first slip?  `real`: share of the cuts of rollouts with a slip whose
    first dropped block is the slip's or a later one; `shuffled`: the same when the cuts are
    dealt out among these rollouts, so often; their difference.  None without cuts."""
    rows = []
    for s, size, slip in zip(series, sizes, slips):
        if slip is not None:
            rows.append((size, slip, bic_cut(s, guard)[0]))
    shares = [kept and kept_shares(size)[kept - 1] for size, _, kept in rows]
    hits = [kept >= slip for _, slip, kept in rows if kept]
    dealt = []
    rng = np.random.default_rng(seed)
    for _ in range(deals):
        for i, (size, slip, _) in zip(rng.permutation(len(rows)), rows):
            if kept := nearest_cut(shares[i], size):
                dealt.append(kept >= slip)
    real, shuffled = mean_or_none(hits), mean_or_none(dealt)
    known = None not in (real, shuffled)
    return {
        "slips": len(rows),
        "cuts": len(hits),
        "real": real,
        "shuffled": shuffled,
        "difference": real - shuffled if known else None,
    }


# ---- the picture


def draw_rates(axes, by_rule):
    """Bars: cut rates of both rules, and of the nulls with their least and greatest."""
    for i, kind in enumerate(("real", *NULLS)):
        rows = [kinds[kind] for kinds in by_rule.values()]
        rates = np.array([row["cut_rate"] for row in rows])
        low = [row.get("cut_rate_low", row["cut_rate"]) for row in rows]
        high = [row.get("cut_rate_high", row["cut_rate"]) for row in rows]
        axes.bar(
            np.arange(len(rows)) + 0.21 * (i - 1.5),
            rates,
            0.19,
            yerr=None if kind == "real" else np.abs([rates - low, high - rates]),
            capsize=3,
            color=(COLOURS[0], "0.8", "0.6", "0.4")[i],
            label=kind.replace("_", "-"),
        )
    axes.set_xticks(range(len(by_rule)), [f"{rule} rule" for rule in by_rule])
    axes.set(ylabel="share of rollouts cut", ylim=(0, 1.3))  # room for the legend
    axes.set_title("cuts; nulls: mean, min to max", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def figure(result):
    """The matplotlib figure: S by block, by blocks since the first slip (with --prompts), cut
    rates beside those of the nulls."""
    slip = result.get("slip")
    picture = new_picture(4.6 * (3 if slip else 2), 3.9)
    panels = picture.subplots(1, 3 if slip else 2)
    band(panels[0], result["by_block"], COLOURS[0], None)
    panels[0].set(xlabel="block", ylabel=f"signal S ({result['signal']}), mean and 95 % band")
    if slip:
        label = "rollouts with a slip"
        level = "same blocks of rollouts without"
        band(panels[1], slip["by_offset"], COLOURS[0], label, level)
        panels[1].axvline(-0.5, color="0.6", linewidth=1)
        panels[1].set(xlabel="blocks since the first slip")
        panels[1].legend(frameon=False, fontsize=8)
    draw_rates(panels[-1], result["detector"])
    for axes in panels:
        tidy(axes)
    return picture


# ---- the command


def question_with_terms(prompts, rollout):
    """The running sum that a rollout answers, or BadInput."""
    key = (str(rollout["id"]),)
    question = question_of(prompts[key]) if key in prompts else "no such prompt"
    if not terms_of(question):
        where = prompts.where(key) if key in prompts else prompts.path
        raise BadInput(
            f"{where}: expected a running sum such as 7+5-3=? for id {rollout['id']!r}, got "
            f"{question[:60]!r}"
        )
    return question


def measure(reader, prompts):
    """(S [n] of every rollout with a loss token, loss tokens a block, first slips); slips are
    looked for with prompts only."""
    series = []
    sizes = []
    slips = []
    for rollout in cli.progress(reader.rollouts, desc="measure", unit="rollout"):
        blocks = reader.read(rollout)
        if not blocks.spans:
            continue  # no loss token, nothing to cut
        series.append(blocks.signal)
        sizes.append(blocks.sizes)
        if prompts:
            ids = rollout["response_ids"]
            parts = [ids[start:end] for start, end in blocks.spans]
            texts = reader.tokenizer.batch_decode(parts, skip_special_tokens=True)
            slips.append(first_slip(question_with_terms(prompts, rollout), texts))
    if not series:
        path = reader.rollouts.path
        raise BadInput(f"{path}: loss_mask: expected rollouts with loss tokens, got none")
    return series, sizes, slips


def tell(out, result):
    for rule, kinds in result["detector"].items():
        for kind, row in kinds.items():
            print(
                f"{rule}, {kind}: {row['cut_rate']:.1%} cut at {shown(row['position_tokens'])} "
                f"of tokens, gain > 6 in {row['strong']:.1%}"
            )
        if "slip" in result:
            row = result["slip"][rule]
            print(
                f"  {row['slips']} rollouts slip, {row['cuts']} of them cut: at or after the "
                f"slip {shown(row['real'])}, shuffled {shown(row['shuffled'])}, difference "
                f"{shown(row['difference'])}"
            )
    blocks = result["blocks_mean"]
    print(
        f"experiments.prefix_null: {out}: {result['rollouts']} rollouts of {blocks:.1f} blocks"
    )


def main(argv=None):
    p = cli.parser(__doc__)
    add_series_flags(p)
    p.add_argument("--prompts", help="running-sum prompts: also hold cuts against slips")
    p.add_argument("--out", required=True, help="JSON to write")
    p.add_argument("--plot", help="picture to write (.png, .svg, .pdf)")
    p.add_argument("--repeats", type=int, default=20, help="random orders a null")
    p.add_argument("--seed", type=int, default=0, help="of orders and deals")
    p.add_argument("--overwrite", action="store_true", help="replace --out and --plot")
    args = p.parse_args(argv)
    if args.repeats < 1:
        raise BadInput(f"--repeats: expected at least 1, got {args.repeats}")
    refuse_existing(args.out, args.overwrite)
    if args.plot:
        check_picture(args.plot, args.overwrite)
    rollouts = files.Table(args.rollouts, "rollouts")
    prompts = files.Table(args.prompts, "prompts") if args.prompts else None
    reader = BlockReader(rollouts, args.scores, args.model, args.signal, args.block_end)
    series, sizes, slips = measure(reader, prompts)
    result = {
        "rollouts": len(series),
        "signal": args.signal,
        "block_end": args.block_end,
        "repeats": args.repeats,
        "seed": args.seed,
        "blocks_mean": float(np.mean([len(s) for s in series])),
        "by_block": means((i, x) for s in series for i, x in enumerate(s)),
        "detector": against_nulls(series, sizes, args.repeats, args.seed),
    }
    if prompts:
        result["slip"] = {"by_offset": by_offset(series, slips)}
        for name, guard in GUARD.items():
            result["slip"][name] = about_slips(series, sizes, slips, guard, args.seed)
    disk.write_atomically(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        figure(result).savefig(args.plot)
    tell(args.out, result)
    return result


if __name__ == "__main__":
    cli.run(main)
