"""Are the change points of `methods.prefix` chance?  The same series in random order, and
curves about the first slip."""

import json
import math

import numpy as np

from experiments.series import band, by_offset, means
from methods.prefix import DEFAULTS, STRONG, add_series_flags, bic_cut, kept_shares, reader
from opd import files
from opd.answers import question_of
from opd.pictures import COLOURS, new_picture, refuse_existing, tidy
from opd.records import BadInput
from worlds.predicates import steps_of, terms_of

# ---- null


def block_shuffled(n, rng):
    """Runs of round(sqrt(n)) (at least 2) neighbours in random order; within a run they keep
    theirs.  n = 4: 0 1 2 3 or 2 3 0 1."""
    runs = np.split(np.arange(n), np.arange(0, n, max(2, round(math.sqrt(n))))[1:])
    return np.concatenate([runs[i] for i in rng.permutation(len(runs))])


NULLS = {"permuted": lambda n, rng: rng.permutation(n), "block_shuffled": block_shuffled}
GUARD = {"faithful": False, "guarded": True}


def lag1(series):
    """Lag-1 autocorrelation around each series' own mean, pooled; biased by about -1/n: read it
    against that of the permuted series."""
    centred = [s - s.mean() for s in series]
    return float(
        sum((c[1:] * c[:-1]).sum() for c in centred)
        / max(sum((c * c).sum() for c in centred), 1e-300)
    )


def detector(series, sizes, guard):
    """What the detector finds in a list of series: cut rate, share with gain above 6, mean
    gain, median position of the cuts; and lag1."""
    found = [bic_cut(s, guard) for s in series]
    gains = [bic0 - bic1 for _, bic0, bic1 in found if bic1 is not None]
    cuts = [
        (kept_shares(size)[kept - 1], kept / len(size))
        for (kept, _, _), size in zip(found, sizes)
        if kept is not None
    ]
    tokens, blocks = np.median(cuts, axis=0).tolist() if cuts else (None, None)
    return {
        "cut_rate": len(cuts) / len(series),
        "strong": sum(g > STRONG for g in gains) / len(series),
        "gain_mean": float(np.mean(gains)) if gains else None,
        "position_tokens": tokens,
        "position_blocks": blocks,
        "lag1": lag1(series),
    }


def against_nulls(series, sizes, repeats, seed):
    """{"faithful" | "guarded": {"real" | "permuted" | "block_shuffled": numbers of `detector`,
    and lag1}}; a null's are means over `repeats`, beside them the least and greatest cut rate,
    and the share of repeats whose rate reaches the real one."""
    result = {rule: {"real": detector(series, sizes, guard)} for rule, guard in GUARD.items()}
    for null, order in NULLS.items():
        rng, rows = np.random.default_rng(seed), {rule: [] for rule in GUARD}
        for _ in range(repeats):
            orders = [order(len(s), rng) for s in series]
            moved = [[x[o] for x, o in zip(values, orders)] for values in (series, sizes)]
            for rule, guard in GUARD.items():
                rows[rule].append(detector(*moved, guard))
        for rule, found in rows.items():
            columns = {
                field: [row[field] for row in found if row[field] is not None]
                for field in found[0]
            }
            rates, real = columns["cut_rate"], result[rule]["real"]["cut_rate"]
            result[rule][null] = {
                field: float(np.mean(values)) if values else None
                for field, values in columns.items()
            } | {
                "cut_rate_low": min(rates),
                "cut_rate_high": max(rates),
                "reach_real": float(np.mean(np.array(rates) >= real)),
            }
    return result


def first_slip(question, texts):
    """Index of the first block with a wrong step of a running sum, or None (also for an answer
    that shows no steps).

    A step is wrong when its arithmetic is, when it does not start from the previous total, or
    when its term is not the question's next. first_slip("7+5-3=?", ["7+5=12\\n", "12-3=8\\n",
    "#8"]) -> 1.  Blocks must be whole lines."""
    terms = terms_of(question)
    for i in range(len(texts)):
        total = terms[0]
        for k, (before, term, after) in enumerate(
            steps_of(question, "".join(texts[: i + 1])), 1
        ):
            if k >= len(terms) or term != terms[k] or before != total or before + term != after:
                return i
            total = after
    return None


def about_slips(series, sizes, slips, guard, seed, draws=1000, deals=8):
    """Do cuts follow the first slip?  `real`: share of the cuts of rollouts with a slip whose
    first dropped block is the slip's or a later one; `shuffled`: the same when the cuts' shares
    are dealt out among these rollouts; their difference with a 95 % bootstrap interval over
    rollouts (None without cuts).

    A dealt share p lands (nearest block end) at or after slip i iff p >= low, the middle
    between the ends of blocks i - 1 and i, and is a cut iff p < high, the middle before the
    last block's end: so a deal is two comparisons."""
    rows = []
    for s, size, slip in zip(series, sizes, slips):
        if slip is not None:
            ends, kept = np.concatenate([[0], kept_shares(size)]), bic_cut(s, guard)[0]
            rows.append(
                (
                    0 if slip < 2 else (ends[slip - 1] + ends[slip]) / 2,
                    (ends[-2] + 1) / 2 if len(s) > 1 else 0,
                    np.nan if kept is None else ends[kept],
                    kept is not None and kept >= slip,
                )
            )
    low, high, share, hit = np.array(rows, np.float64).reshape(-1, 4).T
    rng, everyone, cuts = (
        np.random.default_rng(seed),
        np.arange(len(rows)),
        int(np.isfinite(share).sum()),
    )

    @np.errstate(invalid="ignore")
    # [real, shuffled] of a list of rows; NaN without any cut, and comparisons with NaN (no cut)
    # are false
    def shares(rows, deals):
        dealt = np.stack([share[rng.permutation(rows)] for _ in range(deals)])
        landed = dealt < high[rows]
        return np.array(
            [
                hit[rows].sum() / np.isfinite(share[rows]).sum(),
                (landed & (dealt >= low[rows])).sum() / landed.sum(),
            ]
        )

    real, shuffled = shares(everyone, 200)
    samples = (
        [shares(rng.choice(everyone, len(rows)), deals) for _ in range(draws)]
        if np.isfinite(real + shuffled)
        else [(np.nan, np.nan)]
    )
    bounds = (
        np.nanpercentile(np.subtract(*np.transpose(samples)), [2.5, 97.5])
        if len(samples) > 1
        else (np.nan, np.nan)
    )
    found = {
        "real": real,
        "shuffled": shuffled,
        "difference": real - shuffled,
        "low": bounds[0],
        "high": bounds[1],
    }
    return {"slips": len(rows), "cuts": cuts} | {
        name: float(x) if math.isfinite(x) else None for name, x in found.items()
    }


def figure(result):
    """The matplotlib figure of `null`: S by block, by blocks since the first slip (with
    --prompts), cut rates beside those of the nulls."""
    curves = {"block": result["by_block"]} | (
        {"blocks since the first slip": result["slip"]["by_offset"]} if "slip" in result else {}
    )
    picture = new_picture(4.6 * (len(curves) + 1), 3.9)
    *panels, bars = picture.subplots(1, len(curves) + 1)
    for axes, (label, rows) in zip(panels, curves.items()):
        band(
            axes,
            rows,
            COLOURS[0],
            "rollouts with a slip",
            "same blocks of rollouts without" if label != "block" else None,
        )
        if label != "block":
            axes.axvline(-0.5, color="0.6", linewidth=1)
            axes.legend(frameon=False, fontsize=8)
        axes.set(
            xlabel=label,
            ylabel={
                "margin": "log(1 + mean teacher margin)",
                "spread": "std of the teacher's advantage (nats)",
            }[result["signal"]],
        )
        axes.set_title("signal, mean and 95 % band", loc="left", fontsize=11)
    for i, kind in enumerate(("real", *NULLS)):
        found = [kinds[kind] for kinds in result["detector"].values()]
        rates, at = (
            np.array([row["cut_rate"] for row in found]),
            np.arange(len(found)) + 0.27 * (i - 1),
        )
        error = (
            None
            if kind == "real"
            else np.abs(
                [[row["cut_rate_low"], row["cut_rate_high"]] for row in found] - rates[:, None]
            ).T
        )
        bars.bar(
            at,
            rates,
            0.25,
            yerr=error,
            capsize=3,
            color=(COLOURS[0], "0.75", "0.5")[i],
            label=kind.replace("_", "-"),
        )
    bars.set_xticks(
        range(len(result["detector"])), [f"{rule} rule" for rule in result["detector"]]
    )
    bars.set(ylabel="share of rollouts cut", ylim=(0, None))
    bars.set_title("cuts; nulls: mean, min to max", loc="left", fontsize=11)
    bars.legend(frameon=False, fontsize=8)
    for axes in (*panels, bars):
        tidy(axes)
    return picture


def main(argv=None):
    p = files.parser(__doc__)
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts")
    add_series_flags(p, required=True)
    p.add_argument(
        "--prompts",
        help="the rollouts' running-sum prompts: also hold the cuts against the first wrong "
        "step",
    )
    p.add_argument("--out", required=True, help="JSON to write")
    p.add_argument("--plot", help="picture to write (.png, .svg, .pdf)")
    p.add_argument(
        "--repeats",
        type=int,
        default=20,
        help="random orders a null: more of them, a finer share that reaches the real rate",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="seed of the orders, deals and bootstrap"
    )
    p.add_argument("--overwrite", action="store_true", help="replace --out and --plot")
    args = p.parse_args(argv)
    args.signal, args.block_end = (
        args.signal or DEFAULTS["signal"],
        args.block_end or DEFAULTS["block_end"],
    )
    if args.repeats < 1 or not (args.plot or ".png").endswith((".png", ".svg", ".pdf")):
        raise BadInput(
            f"--repeats {args.repeats} --plot {args.plot}: expected at least 1, and a name "
            f"that ends in .png, .svg or .pdf"
        )
    for path in filter(None, (args.out, args.plot)):
        refuse_existing(path, args.overwrite)
    rollouts, prompts = (
        files.Table(args.rollouts, "rollouts"),
        files.Table(args.prompts, "prompts") if args.prompts else None,
    )
    (measure, tokenizer), series, sizes, slips = reader(args, rollouts), [], [], []
    for rollout in files.progress(
        rollouts, desc="measure", unit="rollout", total=len(rollouts)
    ):
        spans, s, size = measure(rollout)
        if not len(s):
            continue  # no loss token, nothing to cut
        series.append(s)
        sizes.append(size)
        if prompts:
            question = (
                question_of(prompts[key])
                if (key := (str(rollout["id"]),)) in prompts
                else "no such prompt"
            )
            if not terms_of(question):
                where = prompts.where(key) if key in prompts else prompts.path
                raise BadInput(
                    f"{where}: expected a running sum such as 7+5-3=? for id "
                    f"{rollout['id']!r}, got {question[:60]!r}"
                )
            slips.append(
                first_slip(
                    question,
                    [
                        tokenizer.decode(rollout["response_ids"][a:b], skip_special_tokens=True)
                        for a, b in spans
                    ],
                )
            )
    if not series:
        raise BadInput(
            f"{args.rollouts}: loss_mask: expected rollouts with loss tokens, got none"
        )
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
        result["slip"] = {
            name: about_slips(series, sizes, slips, guard, args.seed)
            for name, guard in GUARD.items()
        } | {"by_offset": by_offset(series, slips)}
    files.write_atomically(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        figure(result).savefig(args.plot)

    def show(x):
        return "none" if x is None else f"{x:.3f}"

    for rule, kinds in result["detector"].items():
        print(
            f"experiments.prefix_null: {rule}: "
            + "; ".join(
                f"{kind} {row['cut_rate']:.1%} cut at {show(row['position_tokens'])} of "
                f"tokens, "
                f"gain > 6 in {row['strong']:.1%}"
                for kind, row in kinds.items()
            )
        )
        if prompts:
            row = result["slip"][rule]
            print(
                f"  {row['slips']} rollouts slip, {row['cuts']} of them cut: at or after the "
                f"slip {show(row['real'])}, shuffled {show(row['shuffled'])}, "
                f"difference {show(row['difference'])} (95 % {show(row['low'])} to "
                f"{show(row['high'])})"
            )
    print(
        f"experiments.prefix_null: {args.out}: {len(series)} rollouts of "
        f"{result['blocks_mean']:.1f} "
        f"blocks; lag-1 autocorrelation of S: "
        + ", ".join(
            f"{kind} {show(row['lag1'])}"
            for kind, row in result["detector"]["faithful"].items()
        )
    )
    return result


if __name__ == "__main__":
    files.run(main)
