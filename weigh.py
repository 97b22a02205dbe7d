"""Stage 3b: how much each token of a rollout counts.  Prefix teach, suffix fade (arXiv
2605.13643), its controls and its nulls.

    python weigh.py cut  --rollouts R --scores S --model runs/toy/student --rule release --out
                         weights.jsonl
    python weigh.py cut  --rollouts R --rule fixed --tokens 16 --out weights.jsonl
    python weigh.py null --rollouts R --scores S --model runs/toy/student --prompts P --out
    null.json --plot null.png
    python weigh.py steps --rollouts R --scores S --rule sod --out weights.jsonl
    # of episodes with tools, and `drift`: stepweights.py

Late in a rollout a strong teacher still disagrees with the student, but no longer prefers one
of the student's own likely tokens to another: there is feedback and no contrast.  `cut` looks
for the block after which that happens and writes kind "weights", one a response token.  It
reads scores whose `topk` are the TEACHER's log-probs of the STUDENT's likeliest tokens (K = 4
in the paper), which their field `topk_of` attests: `teacher.py score --top-k 4` by the student,
then `--top-k-of` that file by the teacher.  Section 3 of the paper:

    margin      M_t = largest - second largest teacher log-prob among the K       >= 0, nats
    signal      S_i = log(1 + mean of M_t over the loss tokens of block i)        --signal
                spread: std of log p_T(y_t) - log mu(y_t)
    no change   BIC0 = n log((RSS0 + eps) / n) + log n                            n blocks
                around one mean
    a drop      BIC1 = n log((RSS1 + eps) / n) + 3 log n                          two means, the
                first larger, at the best place
    cut         where BIC1 < BIC0: weight sum(l) / sum(l q) on the prefix, 0 after it; l = loss
                mask, q = kept

Rules: `release` is that.  `shuffled` deals its cuts, as shares of a rollout, out at random
among the rollouts of the file: truncation without its reason.  `fixed` keeps the first N loss
tokens.  `suffix` keeps what release drops.  `boost` has release's weight on the prefix and 1 on
the suffix: the larger step without the truncation.  `no-end` takes out the end token, which
release nearly always does by the way (then nothing teaches when to stop).  `all` is weight 1.
shuffled, fixed and suffix are rescaled and capped as release is. A rollout without a cut has
weight 1 everywhere, with `suffix` too.

The rule cuts easily: noise of 5 blocks in 29 % of cases, of 10 in 17 %, strongly autocorrelated
noise in half; two unequal blocks always. --guard (recommended) asks for 8 blocks, 2 on either
side.  `null` holds the cuts against chance, without training: the same series with their blocks
in random order, and with runs of about sqrt(n) blocks in random order, which keeps most of the
autocorrelation.  With --prompts (running sums) also against the first wrong step of a rollout.

Simplifications: 1. blocks end at a regular expression, not where a sentence splitter says, and
tokens are decoded one by one: right for byte-level tokenizers, others lose the spaces between
words; 2. rollouts are cut when complete, which saves no sampling; 3. a rollout keeps its number
of loss tokens, not the size of its loss; 4. runs of the null begin at fixed places and can
hardly move below 5 blocks: it errs on the side of the null; 5. `null` holds all series in
memory, a number a block.
"""

import json
import math
import re

import numpy as np

import records
from eval import COLOURS, claim, interval, new_picture, tidy
from records import BadInput
from rubric import question_of, steps_of, terms_of

SERIES = ("scores", "model", "signal", "block_end", "guard")
RULES = {
    "all": (),
    "release": (*SERIES, "no_rescale", "cap"),
    "shuffled": (*SERIES, "no_rescale", "cap", "seed"),
    "fixed": ("tokens", "no_rescale", "cap"),
    # rule -> the flags that it reads
    "suffix": (*SERIES, "no_rescale", "cap"),
    "boost": (*SERIES, "cap"),
    "no-end": (),
}
DEFAULTS = {"signal": "margin", "block_end": r"\n+", "cap": 20.0, "seed": 0}
STRONG = 6.0  # a BIC gain that is commonly called strong; the paper counts these

# ---- blocks and their signal


def block_spans(pieces, mask, block_end):
    """[[start, end)] token spans: a block ends with the token in which a match of `block_end`
    ends, the last with the last token.

    pieces: T strings; mask: T of 0 and 1; block_end: a compiled expression.  A block without a
    loss token has no signal and joins its predecessor (the first its successor); no loss token
    at all: no block. ["7", "+5=12", "\\n", "\\n#", "12", "<|end|>"] at \\n+ -> [[0, 4], [4,
    6]]: the match ends in the fourth token, which stays whole."""
    after = np.cumsum([len(p) for p in pieces])  # characters up to and including each token
    ends = {
        int(np.searchsorted(after, match.end())) + 1
        for match in block_end.finditer("".join(pieces))
        if match.end()
    }
    spans = []
    for end in sorted(ends | {len(pieces)} if pieces else ()):
        start = spans[-1][1] if spans else 0
        if any(mask[start:end]):
            spans.append([start, end])
        elif spans:
            spans[-1][1] = end
    return spans


def margins(top_logprobs):
    """Teacher margin of every position, [T]: largest minus second largest of [T, K] log-probs.
    [[-1, -4, -1.5]] -> [0.5]."""
    return np.diff(np.sort(np.asarray(top_logprobs, np.float64), 1)[:, -2:])[:, 0]


def block_signal(values, mask, spans, signal="margin"):
    """S_i of every block from its loss tokens, [n]: log1p of the mean margin, or the standard
    deviation of the advantage.

    values [1, 3, 9], mask [1, 1, 0], one span -> log(1 + 2) as margins, 1 as advantages."""
    values, mask = np.asarray(values, np.float64), np.asarray(mask, bool)
    parts = [values[start:end][mask[start:end]] for start, end in spans]
    return np.array(
        [np.log1p(part.mean()) if signal == "margin" else part.std() for part in parts]
    )


def reader(args, rollouts):
    """measure(rollout) -> (spans [n][2], S [n], loss tokens of each block [n]), with the
    tokenizer; raises BadInput at file:line."""
    from rollout import check_tokens, identity_of, load_tokenizer, vocabulary_size

    tokenizer, scores, pieces = (
        load_tokenizer(args.model),
        records.Table(args.scores, "scores"),
        {},
    )
    identity, vocabulary = (
        identity_of(args.model, None, tokenizer, {}),
        vocabulary_size(tokenizer),
    )
    try:
        block_end = re.compile(args.block_end)
    except re.error as error:
        raise BadInput(
            f"--block-end {args.block_end}: expected a regular expression ({error})"
        ) from None

    def margins_of(score, where, weights):
        wanted = {
            "topk": "the teacher's log-probs of the student's likeliest tokens",
            "topk_of": f"{weights}, the weights that wrote the rollout",
        }
        for field in wanted:
            if field not in score:
                raise BadInput(
                    f"{where}: {field}: expected {wanted[field]}, but the field is missing: "
                    f"teacher.py score --top-k-of writes it"
                )
        if score["topk_of"] != weights:
            raise BadInput(
                f"{where}: topk_of: expected {wanted['topk_of']}, came {score['topk_of']}: "
                f"these are another model's likeliest tokens"
            )
        top = records.unpack(score["topk"]["logprobs"])
        if top.shape[1] < 2 or not np.isfinite(top).all():
            raise BadInput(
                f"{where}: topk: expected at least 2 tokens a position with finite "
                f"log-probs, came {top.shape[1]}"
                + (", not all of them finite" if top.shape[1] >= 2 else "")
            )
        return margins(top)

    def measure(rollout):
        key, ids = records.key_of(rollout, "rollouts"), rollout["response_ids"]
        check_tokens(rollout, rollouts.where(key), identity, vocabulary, ("vocabulary",))
        score, where = records.partner(scores, rollout, rollouts), scores.where(key)
        # a line break is never part of a longer character: one token at a time finds it
        for token in {*ids} - pieces.keys():
            pieces[token] = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        spans = block_spans([pieces[i] for i in ids], mask := rollout["loss_mask"], block_end)
        advantage = args.signal == "spread"
        values = (
            np.subtract(score["logprobs"], rollout["logprobs"])
            if advantage
            else margins_of(score, where, rollout["policy"].get("weights"))
        )
        return (
            spans,
            block_signal(values, mask, spans, args.signal),
            np.array([sum(mask[start:end]) for start, end in spans]),
        )

    return measure, tokenizer


# ---- the change point


def bic_cut(series, guard=False, eps=1e-12):
    """(blocks kept or None, BIC0, BIC1 of the best downward split or None): section 3's test
    for one drop of the mean.

    Only splits with a larger mean before than after are candidates; the best of them counts iff
    BIC1 < BIC0 (strictly). guard: at least 8 blocks, and 2 on either side.  eps keeps the
    logarithm finite where the residuals vanish. [2, 2, 2, 1, 1, 1, 1, 1] -> 3 kept;  [1, 1, 1,
    2, 2, 2] -> None, there is no downward split;  [] -> (None, None, None)."""
    n = len(series)
    if not n:
        return None, None, None
    # centred: the running sums below lose no digits to a large mean
    s = np.asarray(series, np.float64) - np.mean(series)
    kept, left, squares = np.arange(1, n), s.cumsum(), (s * s).cumsum()
    before, after = left[:-1] / kept, (left[-1] - left[:-1]) / (n - kept)
    rss = np.maximum(squares[-1] - kept * before**2 - (n - kept) * after**2, 0)
    bic0 = float(n * np.log((squares[-1] + eps) / n) + np.log(n))
    candidates = (before > after) & (not guard or (kept >= 2) & (n - kept >= 2) & (n >= 8))
    if not candidates.any():
        return None, bic0, None
    bic1 = np.where(candidates, n * np.log((rss + eps) / n) + 3 * np.log(n), np.inf)
    best = int(bic1.argmin())
    return best + 1 if bic1[best] < bic0 else None, bic0, float(bic1[best])


def kept_shares(sizes):
    """Share of the loss tokens in the first 1..n blocks: sizes [2, 6] -> [0.25, 1.0]."""
    return np.cumsum(sizes) / np.sum(sizes)


def nearest_cut(share, sizes):
    """The number of blocks (>= 1) whose end is nearest to `share` of the loss tokens; None for
    no cut, or where that is all of them.

    nearest_cut(0.3, [2, 6]) -> 1;  nearest_cut(0.8, [2, 6]) -> None."""
    if share is None or not len(sizes):
        return None
    kept = int(np.abs(kept_shares(sizes) - share).argmin()) + 1
    return kept if kept < len(sizes) else None


def token_weights(mask, prefix, rule="release", rescale=True, cap=20.0):
    """(weights [T], share of loss tokens kept, scale) when the first `prefix` of T response
    tokens are before the cut (T: no cut).

    scale = sum(l) / sum(l q), so that a rollout has as many units of loss as before, at most
    `cap` (0: no bound); 1 without rescale. mask [1, 1, 1, 1], prefix 1: release [4, 0, 0, 0],
    boost [4, 1, 1, 1], suffix [0, 4/3, 4/3, 4/3]."""
    mask, q = np.asarray(mask), np.arange(len(mask)) < prefix
    if rule == "suffix" and prefix < len(mask):
        q = ~q
    kept = float(mask[q].sum() / mask.sum()) if mask.any() else 1.0
    scale = float(f"{min(1 / kept, cap or math.inf) if rescale else 1.0:.9g}")
    return np.where(q, scale, 1.0 if rule == "boost" else 0.0), kept, scale


# ---- cut


def add_series_flags(p, required):
    p.add_argument(
        "--scores",
        required=required,
        help="the teacher's scores of these rollouts, made with --top-k-of",
    )
    p.add_argument(
        "--model",
        required=required,
        help="folder or Hugging Face id whose tokenizer the rollouts were sampled with",
    )
    p.add_argument(
        "--signal",
        choices=("margin", "spread"),
        help="margin (default), or the paper's control, which needs no `topk`: "
        "the spread of the teacher's advantage on the sampled tokens",
    )
    p.add_argument(
        "--block-end",
        metavar="REGEX",
        help=r"""a block ends where a match of this does (default: \n+); """
        r"""for prose: [.!?]["')]*\s+|\n+""",
    )


def options_of(args):
    """The flags that --rule reads, with defaults filled in; BadInput for one that it does not
    read or that it lacks."""
    reads = RULES[args.rule]
    if args.no_rescale and args.cap is not None:
        raise BadInput(
            "--cap: bounds the scale, which --no-rescale leaves at 1: expected one of the two"
        )
    for name in sorted({flag for flags in RULES.values() for flag in flags} - {*reads}):
        if getattr(args, name) not in (None, False):
            raise BadInput(
                f"--{name.replace('_', '-')}: --rule {args.rule} does not read it, expected "
                f"no such flag"
            )
    for name in reads:
        if getattr(args, name) is None:
            if name not in DEFAULTS:
                raise BadInput(f"--{name}: --rule {args.rule} needs it, but it is missing")
            setattr(args, name, DEFAULTS[name])
    if "cap" in reads and args.cap != 0 and not (1 <= args.cap < math.inf):
        raise BadInput(f"--cap: expected 0 or a number of at least 1, came {args.cap}")
    if "tokens" in reads and args.tokens < 1:
        raise BadInput(f"--tokens: expected at least 1, came {args.tokens}")
    return {name: getattr(args, name) for name in reads if name not in ("scores", "model")}


def cut(argv):
    p = records.parser(__doc__)
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts")
    p.add_argument("--rule", required=True, choices=RULES, help="which tokens count, see above")
    p.add_argument(
        "--out",
        required=True,
        help="JSONL of weights to write; run again to complete an interrupted file",
    )
    add_series_flags(p, required=False)
    p.add_argument(
        "--guard",
        action="store_true",
        help="ask for at least 8 blocks and 2 on either side: fewer false cuts, none in "
        "short rollouts",
    )
    p.add_argument(
        "--no-rescale",
        action="store_true",
        help="weight 1 instead of the scale: tells truncation from a larger step",
    )
    p.add_argument(
        "--cap",
        type=float,
        help="largest scale, 0 for no bound (default: 20): a short prefix in a long rollout "
        "would rule its batch",
    )
    p.add_argument("--tokens", type=int, help="--rule fixed: loss tokens to keep")
    p.add_argument(
        "--seed", type=int, help="--rule shuffled: how the cuts are dealt out (default: 0)"
    )
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    args = p.parse_args(argv)
    settings = {"rule": args.rule} | options_of(args)
    rollouts, by_series = records.Table(args.rollouts, "rollouts"), "scores" in RULES[args.rule]
    measure = reader(args, rollouts)[0] if by_series else None
    # all cuts must be known before one can be dealt out: with more rollouts it would be another
    # deal
    if args.rule == "shuffled":
        settings["of_rollouts"] = len(rollouts)
        own = [
            None
            if (kept := bic_cut(s, args.guard)[0]) is None
            else kept_shares(sizes)[kept - 1]
            for _, s, sizes in map(measure, rollouts)
        ]
        dealt = {
            key: own[i]
            for key, i in zip(
                rollouts.keys(), np.random.default_rng(args.seed).permutation(len(own))
            )
        }
    with records.Writer(
        args.out,
        "weights",
        settings,
        [args.rollouts] + [args.scores] * by_series,
        args.overwrite,
    ) as writer:
        for key in records.progress(rollouts.keys(), desc="weigh", unit="rollout"):
            if key in writer:
                continue
            rollout, reading = rollouts[key], {}
            prefix = len(mask := rollout["loss_mask"])
            if by_series:
                spans, s, sizes = measure(rollout)
                kept_blocks, bic0, bic1 = bic_cut(s, args.guard)
                if args.rule == "shuffled":
                    kept_blocks = nearest_cut(dealt[key], sizes)
                prefix = prefix if kept_blocks is None else spans[kept_blocks - 1][1]
                reading = {
                    "blocks": spans,
                    "signal": [round(float(x), 6) for x in s],
                    "bic0": bic0,
                    "bic1": bic1,
                    "cut": kept_blocks,
                    "gain": None if bic1 is None else bic0 - bic1,
                }
            elif args.rule == "fixed":
                prefix = next(
                    (i for i, seen in enumerate(np.cumsum(mask), 1) if seen == args.tokens),
                    prefix,
                )
            weights, kept, scale = token_weights(
                mask, prefix, args.rule, not args.no_rescale, args.cap or 0
            )
            if args.rule == "no-end" and mask and rollout["finish_reason"] == "stop":
                weights[-1], kept = 0, 1 - mask[-1] / max(1, sum(mask))
            writer.write(
                {
                    "id": rollout["id"],
                    "sample": rollout["sample"],
                    "rollout": records.fingerprint(rollout),
                    "rule": args.rule,
                    "weights": weights.tolist(),
                    "kept": kept,
                    "scale": scale,
                }
                | reading
            )
    summary = {"out": args.out} | summarise(records.read(args.out, "weights"))
    shown = {
        name: "none" if value is None else f"{value:.3g}"
        for name, value in summary.items()
        if name != "out"
    }
    print(
        f"weigh.py cut: {args.out}: {summary['records']} rollouts, rule {args.rule}: "
        f"{summary['cut_rate']:.1%} cut, median share kept of these "
        f"{shown['kept_median']}, share cut after the first block {shown['first_block']}; "
        f"BIC gain mean {shown['gain_mean']}, share above 6 "
        f"{shown['strong']}; scale mean {shown['scale_mean']}, max {shown['scale_max']}, "
        f"{summary['capped']} capped"
    )
    return summary


def summarise(weights):
    """The summary of weights records (any iterable, walked once).  cut_rate: rollouts that lose
    a loss token (`boost`: whose prefix is not all of them); kept_median and first_block are of
    those, the rest of all; strong: share with a BIC gain above 6; None: no such number."""
    kept, scales, gains, cuts, capped = [], [], [], [], 0
    for r in weights:
        kept.append(r["kept"])
        scales.append(r["scale"])
        gains.append(r.get("gain"))
        cuts.append(r.get("cut"))
        # no scale was needed, or none wanted, where it is 1
        capped += 1 < r["scale"] < (1 - 1e-6) / r["kept"]
    some, found, lost = (
        [g for g in gains if g is not None],
        [c for c in cuts if c is not None],
        [k for k in kept if k < 1],
    )
    return {
        "records": len(kept),
        "cut_rate": len(lost) / len(kept),
        "strong": sum(g > STRONG for g in some) / len(kept) if some else None,
        "gain_mean": float(np.mean(some)) if some else None,
        "kept_median": float(np.median(lost)) if lost else None,
        "kept_mean": float(np.mean(kept)),
        "scale_mean": float(np.mean(scales)),
        "scale_max": max(scales),
        "first_block": found.count(1) / len(found) if found else None,
        "capped": capped,
    }


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


def means(pairs):
    """(place, value) pairs -> a row a place, in order: at, mean, half of its 95 % t-interval
    (None for one value), count."""
    groups = {}
    for place, value in pairs:
        groups.setdefault(place, []).append(float(value))
    return [
        dict(
            zip(
                ("at", "mean", "half", "count"),
                (place, *interval(groups[place]), len(groups[place])),
            )
        )
        for place in sorted(groups)
    ]


def by_offset(series, slips):
    """`means` of S by blocks since the first slip (negative: before it); `no_slip`: mean S of
    rollouts without a slip at the same block numbers, which tells what is due to the slip from
    what is due to being late (None where no such rollout is that long)."""
    level = {
        row["at"]: row["mean"]
        for row in means(
            (i, x)
            for s, slip in zip(series, slips)
            if slip is None
            for i, x in enumerate(s)
            if math.isfinite(x)
        )
    }
    after = [
        (i - slip, i, x)
        for s, slip in zip(series, slips)
        if slip is not None
        for i, x in enumerate(s)
        if math.isfinite(x)
    ]
    alike = {
        row["at"]: row["mean"]
        for row in means((offset, level[i]) for offset, i, _ in after if i in level)
    }
    return [
        row | {"no_slip": alike.get(row["at"])}
        for row in means((offset, x) for offset, _, x in after)
    ]


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


def band(axes, rows, colour, label, level=None):
    """Draws rows of `means` with their intervals; level: also `no_slip` of `by_offset`, dashed,
    under this name."""
    # of fewer, the band hides the rest
    rows = [row for row in rows if row["count"] >= min(10, max(row["count"] for row in rows))]
    at, mean, half, alike = (
        np.array([row.get(field) for row in rows], float)
        for field in ("at", "mean", "half", "no_slip")
    )
    axes.plot(at, mean, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    if level:
        axes.plot(at, alike, color="0.35", linestyle="--", label=level)


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


def null(argv):
    p = records.parser(__doc__)
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
    for path in (args.out, args.plot):
        claim(path, args.overwrite)
    rollouts, prompts = (
        records.Table(args.rollouts, "rollouts"),
        records.Table(args.prompts, "prompts") if args.prompts else None,
    )
    (measure, tokenizer), series, sizes, slips = reader(args, rollouts), [], [], []
    for rollout in records.progress(
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
                    f"{rollout['id']!r}, came {question[:60]!r}"
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
            f"{args.rollouts}: loss_mask: expected rollouts with loss tokens, came none"
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
    records.write_atomically(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if args.plot:
        figure(result).savefig(args.plot)

    def show(x):
        return "none" if x is None else f"{x:.3f}"

    for rule, kinds in result["detector"].items():
        print(
            f"weigh.py null: {rule}: "
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
        f"weigh.py null: {args.out}: {len(series)} rollouts of {result['blocks_mean']:.1f} "
        f"blocks; lag-1 autocorrelation of S: "
        + ", ".join(
            f"{kind} {show(row['lag1'])}"
            for kind, row in result["detector"]["faithful"].items()
        )
    )
    return result


def main(argv=None):
    import stepweights

    return records.dispatch(
        __doc__,
        {"cut": cut, "null": null, "steps": stepweights.steps, "drift": stepweights.drift},
        argv,
    )


if __name__ == "__main__":
    records.run(main)
