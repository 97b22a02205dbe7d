"""Prefix teach, suffix fade (arXiv 2605.13643): token weights that drop what follows the block
after which the teacher's margin falls.

    python -m methods.prefix weigh --rollouts R --scores S --model runs/toy/student \\
        --guard --out weights.jsonl
    python train.py --method release --rollouts R --scores S --token-weights weights.jsonl ...

Late in a rollout a strong teacher still disagrees with the student, but no longer prefers one
of the student's own likely tokens to another: there is feedback and no contrast.  `weigh` reads
scores whose `topk` are the TEACHER's log-probs of the STUDENT's likeliest tokens (K = 4 in the
paper), which their field `topk_of` attests: `teacher.py score --top-k 4` by the student, then
`--top-k-of` that file by the teacher.  It writes kind "weights", a number a response token.
Section 3 of the paper, as notes on it give it:

    margin      M_t = largest - second largest teacher log-prob among the K >= 0, nats
    signal      S_i = log(1 + mean of M_t over the loss tokens of block i)
                --signal spread, the paper's control, needs no topk: the standard deviation of
                the teacher's advantage log p_T(y_t) - log mu(y_t) in block i
    no change   BIC0 = n log((RSS0 + eps) / n) + log n     n blocks around one mean
    a drop      BIC1 = n log((RSS1 + eps) / n) + 3 log n   two means, the first larger, split at
                the best place
    cut         where BIC1 < BIC0: weight sum(l) / sum(l q) on the prefix, 0 after it; l = loss
                mask, q = kept.  Without a cut: weight 1

The rule cuts easily: noise of 5 blocks in 29 % of cases, of 10 in 17 %, strongly correlated
noise in half; two unequal blocks always.  --guard (recommended) asks for 8 blocks, 2 on either
side.  experiments.weight_controls makes controls of these weights; experiments.prefix_null
holds the cuts against chance, without training.

Simplifications:
1. Blocks end at a regular expression, not where a sentence splitter says.  Tokens are decoded
   one by one: right for byte-level tokenizers, others lose the spaces between words.
2. Rollouts are cut when complete, which saves no sampling.
3. A rollout keeps its number of loss tokens, not the size of its loss.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from opd import cli, files, records
from opd.loss import Method
from opd.policy import check_tokens, identity_of, load_tokenizer, vocabulary_size
from opd.records import (
    LARGEST,
    NUMBERS,
    SHARE,
    BadInput,
    Type,
    declare,
    is_count,
    list_of,
    number_in,
    or_none,
)
from opd.stats import mean_or_none, shown

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
KNOWN = Type("a finite number or null", or_none(number_in(-LARGEST, LARGEST)))


def check_shares(record):
    """`kept` and `scale`, which `summarise` reads, stand in every record of the rule; what is
    missing, or None."""
    missing = [name for name in ("kept", "scale") if name not in record]
    if not missing or len(missing) == 2 and record["rule"] != "release":
        return None
    return f"{missing[0]}: expected a number, but the field is missing"


declare(
    "weights",
    check_shares,
    kept=SHARE,
    scale=Type("a number above 0", number_in(1e-9, LARGEST)),
    blocks=Type("a list of [start, end]", list_of(list_of(is_count))),
    cut=Type("an integer >= 1 or null", or_none(number_in(1, LARGEST))),
    signal=NUMBERS,
    bic0=KNOWN,
    bic1=KNOWN,
    gain=KNOWN,
)
STRONG = 6.0  # a BIC gain that is commonly called strong; the paper counts these

# ---- blocks and their signal


class Blocks(NamedTuple):
    """The blocks of a rollout: [start, end) token spans [n][2], S [n], loss tokens [n]."""

    spans: list
    signal: np.ndarray
    sizes: np.ndarray


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


def likeliest_logprobs(score, where, student):
    """The teacher's log-probs [T, K] of the student's likeliest tokens, or BadInput where the
    score has those of another model; student: hash of the weights that wrote the rollout."""
    if "topk" not in score:
        raise BadInput(
            f"{where}: topk: expected the teacher's log-probs of the student's likeliest "
            f"tokens, but the field is missing: teacher.py score --top-k-of writes it"
        )
    if "topk_of" not in score or score["topk_of"] != student:
        raise BadInput(
            f"{where}: topk_of: expected {student}, the weights that wrote the rollout, got "
            f"{score.get('topk_of')}: these are another model's likeliest tokens"
        )
    top = records.unpack(score["topk"]["logprobs"])
    if top.shape[1] < 2 or not np.isfinite(top).all():
        raise BadInput(
            f"{where}: topk: expected at least 2 tokens a position with finite log-probs, got "
            f"{top.shape[1]}, of which {np.isfinite(top).mean():.1%} are finite"
        )
    return top


class BlockReader:
    """Reads the Blocks of rollouts (a Table) from their scores and texts."""

    def __init__(self, rollouts, scores, model, signal, block_end):
        """scores, model: paths; signal: "margin" or "spread"; block_end: a regular
        expression."""
        self.rollouts = rollouts
        self.scores = files.Table(scores, "scores")
        self.tokenizer = load_tokenizer(model)
        self.identity = identity_of(model, None, self.tokenizer, {})
        self.vocabulary = vocabulary_size(self.tokenizer)
        self.signal = signal
        self.pieces = {}  # token id -> its text
        try:
            self.block_end = re.compile(block_end)
        except re.error as error:
            raise BadInput(
                f"--block-end {block_end}: expected a regular expression ({error})"
            ) from None

    def read(self, rollout):
        key = records.key_of(rollout, "rollouts")
        where = self.rollouts.where(key)
        check_tokens(rollout, where, self.identity, self.vocabulary, ("vocabulary",))
        mask = rollout["loss_mask"]
        spans = block_spans(self.texts(rollout["response_ids"]), mask, self.block_end)
        score = files.record_for(self.scores, rollout, self.rollouts)
        if self.signal == "spread":
            values = np.subtract(score["logprobs"], rollout["logprobs"])
        else:
            student = rollout["policy"].get("weights")
            top = likeliest_logprobs(score, self.scores.where(key), student)
            values = margins(top)
        sizes = np.array([sum(mask[start:end]) for start, end in spans])
        return Blocks(spans, block_signal(values, mask, spans, self.signal), sizes)

    def texts(self, ids):
        """Of every token: a line break is never part of a longer character, so one token at a
        time shows it."""
        for token in {*ids} - self.pieces.keys():
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self.pieces[token] = text
        return [self.pieces[token] for token in ids]


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
    kept = np.arange(1, n)
    left = s.cumsum()
    total = (s * s).cumsum()[-1]
    before = left[:-1] / kept
    after = (left[-1] - left[:-1]) / (n - kept)
    rss = np.maximum(total - kept * before**2 - (n - kept) * after**2, 0)
    bic0 = float(n * np.log((total + eps) / n) + np.log(n))
    candidates = before > after
    if guard:
        candidates &= (kept >= 2) & (n - kept >= 2) & (n >= 8)
    if not candidates.any():
        return None, bic0, None
    bic1 = np.where(candidates, n * np.log((rss + eps) / n) + 3 * np.log(n), np.inf)
    best = int(bic1.argmin())
    found = best + 1 if bic1[best] < bic0 else None
    return found, bic0, float(bic1[best])


# ---- weights


def token_weights(mask, kept, cap=20.0):
    """(weights [T], share of loss tokens kept, scale) of a loss mask [T] and the kept tokens
    [T] of bool.

    scale = sum(l) / sum(l q), so that a rollout has as many units of loss as before, at most
    `cap` (0: no bound; 1: no rescaling).
    mask [1, 1, 1, 1], kept [1, 0, 0, 0] -> [4, 0, 0, 0], 0.25, 4."""
    mask = np.asarray(mask)
    share = float(mask[kept].sum() / mask.sum()) if mask.any() else 1.0
    scale = float(f"{min(1 / share, cap or math.inf):.9g}")
    return np.where(kept, scale, 0.0), share, scale


def weights_record(rollout, rule, weights, kept, scale):
    """A record of kind "weights"; kept: the share of its loss tokens that count."""
    return records.weights_record(rollout, rule, weights) | {"kept": kept, "scale": scale}


def release(rollout, blocks, guard, cap):
    """The weights record of a rollout by the paper's rule."""
    mask = rollout["loss_mask"]
    cut, bic0, bic1 = bic_cut(blocks.signal, guard)
    end = len(mask) if cut is None else blocks.spans[cut - 1][1]
    record = weights_record(
        rollout, "release", *token_weights(mask, np.arange(len(mask)) < end, cap)
    )
    return record | {
        "blocks": blocks.spans,
        "signal": [round(float(x), 6) for x in blocks.signal],
        "bic0": bic0,
        "bic1": bic1,
        "cut": cut,
        "gain": None if bic1 is None else bic0 - bic1,
    }


def summarise(weights):
    """The summary of weights records (any iterable, walked once).

    cut_rate: rollouts that lose a loss token; kept_median and first_block are of those, the
    rest of all; strong: share with a BIC gain above 6; None: no such number."""
    kept = []
    scales = []
    gains = []
    cuts = []
    capped = 0
    for r in weights:
        kept.append(r["kept"])
        scales.append(r["scale"])
        if r.get("gain") is not None:
            gains.append(r["gain"])
        if r.get("cut") is not None:
            cuts.append(r["cut"])
        # no scale was needed, or none wanted, where it is 1
        capped += 1 < r["scale"] < (1 - 1e-6) / r["kept"]
    lost = [share for share in kept if share < 1]
    return {
        "records": len(kept),
        "cut_rate": len(lost) / len(kept),
        "strong": sum(gain > STRONG for gain in gains) / len(kept) if gains else None,
        "gain_mean": mean_or_none(gains),
        "kept_median": float(np.median(lost)) if lost else None,
        "kept_mean": float(np.mean(kept)),
        "scale_mean": float(np.mean(scales)),
        "scale_max": max(scales),
        "first_block": cuts.count(1) / len(cuts) if cuts else None,
        "capped": capped,
    }


def tell(command, path, s):
    """Prints the summary of a weights file that a command has written."""
    print(
        f"{command}: {path}: {s['records']} rollouts, {s['cut_rate']:.1%} cut, median share "
        f"kept of these {shown(s['kept_median'])}, share cut after the first block "
        f"{shown(s['first_block'])}; BIC gain mean {shown(s['gain_mean'])}, share above "
        f"{STRONG:g} {shown(s['strong'])}; scale mean {s['scale_mean']:.3g}, max "
        f"{s['scale_max']:.3g}, {s['capped']} capped"
    )


# ---- the command


def add_series_flags(p):
    """What a BlockReader needs; experiments.prefix_null has the same."""
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts")
    p.add_argument(
        "--scores",
        required=True,
        help="the teacher's scores of these rollouts, made with --top-k-of",
    )
    p.add_argument(
        "--model",
        required=True,
        help="folder or Hugging Face id whose tokenizer the rollouts were sampled with",
    )
    p.add_argument(
        "--signal",
        choices=("margin", "spread"),
        default="margin",
        help="spread: the paper's control, of the teacher's advantage on the sampled tokens",
    )
    p.add_argument(
        "--block-end",
        metavar="REGEX",
        default=r"\n+",
        help=r"""a block ends where a match of this does; for prose: [.!?]["')]*\s+|\n+""",
    )


def weigh(argv):
    p = cli.parser(__doc__)
    add_series_flags(p)
    p.add_argument("--out", required=True, help="JSONL of weights to write")
    p.add_argument(
        "--guard",
        action="store_true",
        help="ask for at least 8 blocks and 2 on either side: fewer false cuts, none in "
        "short rollouts",
    )
    p.add_argument(
        "--cap",
        type=float,
        default=20.0,
        help="largest scale: a short prefix in a long rollout would rule its batch; 0: no "
        "bound, 1: no rescaling, which tells truncation from a larger step",
    )
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    args = p.parse_args(argv)
    if args.cap != 0 and not 1 <= args.cap < math.inf:
        raise BadInput(f"--cap: expected 0 or a number of at least 1, got {args.cap}")
    rollouts = files.Table(args.rollouts, "rollouts")
    reader = BlockReader(rollouts, args.scores, args.model, args.signal, args.block_end)

    def work(missing):
        for key in missing:
            rollout = rollouts[key]
            yield release(rollout, reader.read(rollout), args.guard, args.cap)

    settings = {"rule": "release", "signal": args.signal, "block_end": args.block_end}
    settings |= {"guard": args.guard, "cap": args.cap}
    inputs = [args.rollouts, args.scores]
    files.fill(args.out, "weights", rollouts.keys(), work, settings, inputs, args.overwrite)
    summary = summarise(files.read(args.out, "weights"))
    tell("methods.prefix weigh", args.out, summary)
    return {"out": args.out} | summary


def main(argv=None):
    return cli.dispatch(__doc__, {"weigh": weigh}, argv)


if __name__ == "__main__":
    cli.run(main)
