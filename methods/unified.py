"""What a training run did to what a model can write: effective support before and after,
measured exactly.

    python -m methods.unified support --before M0 --after M1 --max-tokens 5 \\
        --prompts runs/forks/heldout.jsonl --out support.jsonl

Reads two model folders of one tokenizer and prompts with an `answer`; writes a line for the two
models, then a line an eps.  The roles are those of arXiv 2604.07941 (equations 2 and 5-8).  A
pair (s, a) is a prompt x with the first tokens of an answer, and the next token:

    d(s, a)    = E_x E_y~pi(.|x) [ 1/T sum_t 1{s_t = s, a_t = a} ]
                 occupancy, which sums to 1: x uniform over the lines of --prompts, T the tokens
                 of y with its end token
    E_eps      = {(s, a): d(s, a) >= eps}             effective support
    expansion  = E_eps(after) without E_eps(before)   counted, and its mass under d_after
    attrition  = E_eps(before) without E_eps(after)   counted, and its mass under d_before
    common C   = E_eps(before) and E_eps(after)       counted, and its mass under both
    moved      = 1/2 sum_{(s,a) in C} |d_after - d_before|
                 reshaping, not normalised to C: what C as a whole gained or lost counts by
                 half; `total_variation` is the same over all pairs

d is a share of all prompts and of all tokens: an answer with P(y|x) = 1 gives each of its pairs
1 / (prompts T).  So eps means little without these two, and one eps alone is arbitrary.

Every answer of either model that has an end token or --max-tokens tokens is listed with its
probability at temperature 1, over the whole vocabulary: for worlds.forks and its like.

Simplification: branches whose probability is below --floor are cut.  Their own pairs are below
every eps, and what they held still counts for the pairs above the cut, as if they went on to
--max-tokens.  `missed_mass` is that mass, the mean over prompts, of the model that has more of
it; above 0.01 it is refused, for accuracy and the like lack it.
"""

import json
import math
from collections import Counter, defaultdict
from typing import NamedTuple

import torch

from opd import cli, disk, records
from opd.answers import is_correct, read_answerable
from opd.chat import render
from opd.kernel import all_logits
from opd.pictures import refuse_existing
from opd.policy import lasting_identity, load_policy
from opd.records import BadInput
from opd.stats import shown

PASS_AT = (1, 4, 16, 64, 256)
MOST_MISSED = 0.01
ROWS_TIMES_WORDS = 1 << 20  # logits held at once


class Limits(NamedTuple):
    """What is listed: answers of so many tokens, whose prefixes all have at least the
    probability `floor`, as long as there are no more than max_prefixes of a model."""

    max_tokens: int
    floor: float
    max_prefixes: int


class Listing(NamedTuple):
    """All answers of a model: {(x, y): P(y|x)}, {(x, prefix): mass cut right below it}, and the
    mean over prompts of what was cut.  x counts prompts, y is a tuple of token ids."""

    answers: dict
    stubs: dict
    missed: float


# ---- the measures, on plain dicts


def occupancy(answers, weight, stubs=None, longest=None):
    """{(x, y[:t]): d} of answers {(x, y): P(y|x)}, y a tuple of token ids: the pair (s, a) is
    keyed by its prompt and its tokens up to a.

    weight[x] is the share of x among the prompts.  One prompt, {(0, (1, 9)): 0.75, (0, (9,)):
    0.25}: the first answer has two pairs, each gets 0.75 / 2, the second has one: {(0, (1,)):
    0.375, (0, (1, 9)): 0.375, (0, (9,)): 0.25}.

    stubs {(x, prefix): mass}: answers that go on below a prefix but were not listed; they are
    taken to have `longest` tokens."""
    d = defaultdict(float)
    for (x, y), p in answers.items():
        for t in range(1, len(y) + 1):
            d[x, y[:t]] += weight[x] * p / len(y)
    for (x, y), p in (stubs or {}).items():
        for t in range(1, len(y) + 1):
            d[x, y[:t]] += weight[x] * p / longest
    return dict(d)


def total_variation(before, after, pairs):
    """1/2 sum over `pairs` of |after - before|; a pair that a dict does not list has 0
    there."""
    return math.fsum(abs(after.get(pair, 0.0) - before.get(pair, 0.0)) for pair in pairs) / 2


def change(before, after, after_right, eps):
    """The numbers of one eps; `after_right` is the part of `after` that comes from right
    answers.

    before {A: 0.6, B: 0.4}, after {A: 0.3, B: 0.05, C: 0.65}, right {C: 0.13}, eps 0.1: support
    {A, B} and {A, C}, so expansion is C with mass 0.65, a fifth of it right; attrition is B
    with mass 0.4; moved, in the common {A}, 0.3 / 2 = 0.15."""
    had, has = ({pair for pair, mass in d.items() if mass >= eps} for d in (before, after))
    new, lost, common = has - had, had - has, had & has

    def mass(d, pairs):
        return math.fsum(d.get(pair, 0.0) for pair in pairs)

    return {
        "support_before": len(had),
        "support_after": len(has),
        "support_mass_before": mass(before, had),
        "support_mass_after": mass(after, has),
        "expansion": len(new),
        "expansion_mass": mass(after, new),
        "expansion_right": mass(after_right, new) / mass(after, new) if new else None,
        "attrition": len(lost),
        "attrition_mass": mass(before, lost),
        "common": len(common),
        "common_mass_before": mass(before, common),
        "common_mass_after": mass(after, common),
        "moved": total_variation(before, after, common),
    }


def answer_numbers(answers, right, weight):
    """Of all answers of a model {(x, y): P(y|x)}, and the set of the right ones: accuracy,
    pass@k, entropy.

    p_x is the probability of a right answer to x: accuracy E_x[p_x], pass@k E_x[1 - (1 -
    p_x)^k].  The entropy of P(.|x) in nats, mean over prompts.  {(0, (1,)): 0.25, (0, (2,)):
    0.75}, right {(0, (1,))}: 0.25, pass@4 1 - 0.75^4 = 0.684, 0.562."""
    p_right, entropy = [0.0] * len(weight), 0.0
    for (x, y), p in answers.items():
        p_right[x] += p if (x, y) in right else 0.0
        entropy -= weight[x] * p * math.log(p) if p > 0 else 0.0
    passes = {
        f"pass@{k}": sum(w * (1 - (1 - min(p, 1.0)) ** k) for w, p in zip(weight, p_right))
        for k in PASS_AT
    }
    return (
        {"accuracy": sum(w * p for w, p in zip(weight, p_right))}
        | passes
        | {"entropy": entropy}
    )


# ---- the tree of answers


def next_probabilities(policy, prompt_ids, prefixes):
    """P(a | prompt, prefix) in float64, [B, vocabulary], of prefixes [B, t] of equal length."""
    prompt = torch.tensor([prompt_ids], device=policy.device).expand(len(prefixes), -1)
    ids = torch.cat([prompt, prefixes], 1)
    with torch.no_grad():
        states = policy.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = all_logits(states[:, -1], policy.head, **policy.head_options)
        p = torch.softmax(logits.double(), -1)
    if not torch.isfinite(p).all():
        raise BadInput(
            f"{policy.identity['model']}: the model's logits are not finite: try another "
            f"checkpoint"
        )
    return p


def enumerate_answers(policy, prompt_ids, limits):
    """({y: P(y|x)}, {prefix: mass cut right below it}): every answer to a prompt whose prefixes
    all have probability >= limits.floor.

    y is a tuple of ids that ends in an end token or has limits.max_tokens of them.  Breadth
    first: the prefixes of one level are equally long.  Answers and cut masses sum to 1.
    Returns None when there are more than limits.max_prefixes prefixes to keep."""
    stops = torch.tensor(policy.stop_ids, device=policy.device)
    rows = max(1, ROWS_TIMES_WORDS // policy.head_options["vocabulary"])
    live = torch.zeros(1, 0, dtype=torch.int64, device=policy.device)
    p_live = torch.ones(1, dtype=torch.float64, device=policy.device)
    answers = {}
    stubs = {}
    for t in range(limits.max_tokens):
        level = []
        p_level = []
        count = len(answers)
        for prefixes, p_prefixes in zip(live.split(rows), p_live.split(rows)):
            p = p_prefixes[:, None] * next_probabilities(policy, prompt_ids, prefixes)
            kept = p >= limits.floor
            cut = torch.where(kept, 0.0, p).sum(1)
            stubs.update(zip(map(tuple, prefixes[cut > 0].tolist()), cut[cut > 0].tolist()))
            row, token = kept.nonzero(as_tuple=True)
            count += len(row)
            if count > limits.max_prefixes:
                return None
            level.append(torch.cat([prefixes[row], token[:, None]], 1))
            p_level.append(p[kept])
        live = torch.cat(level)
        p_live = torch.cat(p_level)
        done = torch.isin(live[:, -1], stops)
        if t + 1 == limits.max_tokens:
            done[:] = True
        answers.update(zip(map(tuple, live[done].tolist()), p_live[done].tolist()))
        live = live[~done]
        p_live = p_live[~done]
        if not len(live):
            break
    return answers, stubs


def all_answers(policy, states, weight, limits):
    """The Listing over all prompts, or BadInput where the tree is too wide to list or too much
    of it was cut."""
    model = policy.identity["model"]
    answers = {}
    stubs = {}
    for x, ids in enumerate(cli.progress(states, desc="enumerate", unit="prompt")):
        left = limits.max_prefixes - len(answers)
        found = enumerate_answers(policy, ids, limits._replace(max_prefixes=left))
        if found is None:
            raise BadInput(
                f"{model}: expected at most {limits.max_prefixes} live prefixes and answers "
                f"(--max-prefixes), got more at prompt {x + 1} of {len(states)}: give fewer "
                f"prompts, a larger --floor or --max-prefixes"
            )
        answers.update(((x, y), p) for y, p in found[0].items())
        stubs.update(((x, y), p) for y, p in found[1].items())
    missed = sum(weight[x] * p for (x, _), p in stubs.items())
    if missed > MOST_MISSED:
        raise BadInput(
            f"{model}: missed_mass: expected at most {MOST_MISSED:g} below --floor "
            f"{limits.floor:g}, got {missed:.2g}, which is not exact: lower --floor and raise "
            f"--max-prefixes"
        )
    return Listing(answers, stubs, missed)


# ---- the comparison


def load_pair(before, after):
    """Two policies whose token ids mean the same texts."""
    policies = (load_policy(before), load_policy(after))
    for field in ("vocabulary", "template"):
        expected, got = (policy.identity[field] for policy in policies)
        if got != expected:
            raise BadInput(
                f"--after {after}: policy.{field}: expected {expected}, that of --before "
                f"{before}, got {got}: the same ids would be other texts, so the two supports "
                f"cannot be compared"
            )
    return policies


def read_states(path, policy, max_tokens):
    """(x as tuples of prompt ids, their shares of the lines, their right answers); a prompt
    that stands twice is two draws of one x."""
    prompts = read_answerable(path)
    draws = Counter()
    wanted = {}
    config = policy.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    for prompt in prompts:
        where = prompts.where(records.key_of(prompt, "prompts"))
        ids = tuple(render(policy.tokenizer, prompt))
        if len(ids) + max_tokens > limit:
            raise BadInput(
                f"{where}: its {len(ids)} tokens and --max-tokens {max_tokens} pass the "
                f"model's {limit} positions"
            )
        if str(wanted.setdefault(ids, prompt["answer"])) != str(prompt["answer"]):
            raise BadInput(
                f"{where}: answer: expected {wanted[ids]!r}, as on an earlier line with the "
                f"same prompt, got {prompt['answer']!r}"
            )
        draws[ids] += 1
    return list(draws), [n / len(prompts) for n in draws.values()], list(wanted.values())


def right_answers(listings, wanted, tokenizer):
    """The set of those (x, y) of all listings whose text is a right answer."""
    keys = list(listings[0].answers.keys() | listings[1].answers.keys())
    texts = tokenizer.batch_decode([list(y) for _, y in keys], skip_special_tokens=True)
    given = dict(zip(keys, map(records.visible, texts)))
    return {(x, y) for (x, y), text in given.items() if is_correct(text, wanted[x])}


def compare(listings, right, weight, limits, all_eps):
    """(numbers of the two models, {eps: numbers}) of two listings."""
    before, after = (
        occupancy(listing.answers, weight, listing.stubs, limits.max_tokens)
        for listing in listings
    )
    answers_after = listings[1].answers
    after_right = occupancy(
        {key: p for key, p in answers_after.items() if key in right}, weight
    )
    numbers = {
        "prompts": len(weight),
        "missed_mass": max(listing.missed for listing in listings),
        "total_variation": total_variation(before, after, before.keys() | after.keys()),
    }
    for when, listing in zip(("before", "after"), listings):
        for name, value in answer_numbers(listing.answers, right, weight).items():
            numbers[f"{name}_{when}"] = value
    at_eps = {}
    for eps in all_eps:
        at_eps[eps] = change(before, after, after_right, eps)
        for when, listing in zip(("before", "after"), listings):
            # of a prompt, distinct by their tokens
            known = [x for (x, y), p in listing.answers.items() if p >= eps and (x, y) in right]
            at_eps[eps][f"right_answers_{when}"] = sum(weight[x] for x in known)
    return numbers, at_eps


# ---- the command


def tell(out, n, at_eps):
    """Prints the numbers of the two models, and a line an eps."""
    print(
        f"methods.unified support: {out}: {n['prompts']} prompts, accuracy "
        f"{n['accuracy_before']:.3f} -> {n['accuracy_after']:.3f}, pass@256 "
        f"{n['pass@256_before']:.3f} -> {n['pass@256_after']:.3f}, entropy "
        f"{n['entropy_before']:.2f} -> {n['entropy_after']:.2f} nats, total variation "
        f"{n['total_variation']:.3f}, missed mass {n['missed_mass']:.1g}"
    )
    for eps, line in at_eps.items():
        print(
            f"    at eps {eps:g}: support {line['support_before']} -> "
            f"{line['support_after']}, expansion {line['expansion']} (mass "
            f"{line['expansion_mass']:.3f}; right {shown(line['expansion_right'], '.0%')}), "
            f"attrition {line['attrition']} (mass {line['attrition_mass']:.3f}), moved "
            f"{line['moved']:.3f}"
        )


def add_flags(p):
    p.add_argument("--before", required=True, help="the model folder before training")
    p.add_argument("--after", required=True, help="the model folder after it")
    p.add_argument(
        "--prompts", required=True, help="prompts with an `answer`; a line is one draw of x"
    )
    p.add_argument(
        "--max-tokens",
        type=int,
        required=True,
        help="longest answer; a longer one is cut there, as rollout.py would",
    )
    p.add_argument(
        "--eps",
        type=float,
        nargs="+",
        default=[1e-2, 1e-3, 1e-4],
        help="thresholds of effective support",
    )
    p.add_argument(
        "--floor",
        type=float,
        default=1e-9,
        help="branches less likely than this are cut: time against missed mass",
    )
    p.add_argument(
        "--max-prefixes",
        type=int,
        default=300_000,
        help="stop rather than hold more live prefixes and answers of a model",
    )
    p.add_argument("--out", required=True, help="JSONL to write")
    p.add_argument("--overwrite", action="store_true", help="replace --out")


def support(argv):
    p = cli.parser(__doc__)
    add_flags(p)
    args = p.parse_args(argv)
    limits = Limits(args.max_tokens, args.floor, args.max_prefixes)
    eps_fit = all(0 < eps < 1 for eps in args.eps)
    if limits.max_tokens < 1 or not eps_fit or not 0 <= limits.floor <= min(args.eps):
        raise BadInput(
            "--max-tokens must be at least 1, every --eps in (0, 1), --floor at least 0 and "
            "not above the smallest --eps"
        )
    refuse_existing(args.out, args.overwrite)
    policies = load_pair(args.before, args.after)
    states, weight, wanted = read_states(args.prompts, policies[0], args.max_tokens)
    listings = [all_answers(policy, states, weight, limits) for policy in policies]
    right = right_answers(listings, wanted, policies[0].tokenizer)
    numbers, at_eps = compare(listings, right, weight, limits, args.eps)
    first = {
        "mode": "exact",
        "before": lasting_identity(policies[0].identity),
        "after": lasting_identity(policies[1].identity),
        "max_tokens": limits.max_tokens,
        "floor": limits.floor,
    }
    lines = [first | numbers, *({"eps": eps} | line for eps, line in at_eps.items())]
    disk.write_atomically(args.out, (json.dumps(line) + "\n" for line in lines))
    tell(args.out, numbers, at_eps)
    summary = {"out": args.out} | numbers
    for eps, line in at_eps.items():
        summary |= {f"{name}@{eps:g}": value for name, value in line.items()}
    return summary


def main(argv=None):
    return cli.dispatch(__doc__, {"support": support}, argv)


if __name__ == "__main__":
    cli.run(main)
