"""Stage 3b: how much each token of a rollout counts.  Prefix teach, suffix fade (arXiv
2605.13643), its controls and its nulls.

    python -m methods.prefix weigh  --rollouts R --scores S --model runs/toy/student --rule
                                    release --out
                         weights.jsonl
    python -m methods.prefix weigh  --rollouts R --rule fixed --tokens 16 --out weights.jsonl
    python -m experiments.prefix_null --rollouts R --scores S --model runs/toy/student --prompts
    P --out
    null.json --plot null.png
    python -m methods.sod weigh --rollouts R --scores S --rule sod --out weights.jsonl
    # of episodes with tools, and `drift`: methods/sod/weights.py

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

import math
import re

import numpy as np

from opd import files, records
from opd.loss import Method
from opd.policy import check_tokens, identity_of, load_tokenizer, vocabulary_size
from opd.records import BadInput

ROWS = {
    "release": Method(
        "self",
        "k1",
        token_weight="file",
        formula="w π/μ (log p_T − log μ) [a = y]",
        about="on-policy distillation up to where the teacher's margin collapses: "
        "methods.prefix weigh (arXiv 2605.13643)",
    )
}
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

    tokenizer, scores, pieces = (
        load_tokenizer(args.model),
        files.Table(args.scores, "scores"),
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
                f"{where}: topk_of: expected {wanted['topk_of']}, got {score['topk_of']}: "
                f"these are another model's likeliest tokens"
            )
        top = records.unpack(score["topk"]["logprobs"])
        if top.shape[1] < 2 or not np.isfinite(top).all():
            raise BadInput(
                f"{where}: topk: expected at least 2 tokens a position with finite "
                f"log-probs, got {top.shape[1]}"
                + (", not all of them finite" if top.shape[1] >= 2 else "")
            )
        return margins(top)

    def measure(rollout):
        key, ids = records.key_of(rollout, "rollouts"), rollout["response_ids"]
        check_tokens(rollout, rollouts.where(key), identity, vocabulary, ("vocabulary",))
        score, where = files.record_for(scores, rollout, rollouts), scores.where(key)
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
        raise BadInput(f"--cap: expected 0 or a number of at least 1, got {args.cap}")
    if "tokens" in reads and args.tokens < 1:
        raise BadInput(f"--tokens: expected at least 1, got {args.tokens}")
    return {name: getattr(args, name) for name in reads if name not in ("scores", "model")}


def cut(argv):
    p = files.parser(__doc__)
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
    rollouts, by_series = files.Table(args.rollouts, "rollouts"), "scores" in RULES[args.rule]
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
    with files.Writer(
        args.out,
        "weights",
        settings,
        [args.rollouts] + [args.scores] * by_series,
        args.overwrite,
    ) as writer:
        for key in files.progress(rollouts.keys(), desc="weigh", unit="rollout"):
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
    summary = {"out": args.out} | summarise(files.read(args.out, "weights"))
    shown = {
        name: "none" if value is None else f"{value:.3g}"
        for name, value in summary.items()
        if name != "out"
    }
    print(
        f"methods.prefix weigh: {args.out}: {summary['records']} rollouts, rule {args.rule}: "
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


def main(argv=None):
    return files.dispatch(__doc__, {"weigh": cut}, argv)


if __name__ == "__main__":
    files.run(main)
