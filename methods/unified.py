"""What a training run did to what a model can write: effective support before and after,
measured instead of declared.

    python -m methods.unified --before M0 --after M1 --prompts runs/forks/heldout.jsonl
    --max-tokens 5 --out support.jsonl
    python -m methods.unified --before-evals E0.jsonl --after-evals E1.jsonl --out support.jsonl

The roles of 2604.07941 (equations 2 and 5-8).  A pair (s, a) is a prompt x with the first
tokens of an answer, and the next token:

    d(s, a)    = E_x E_y~pi(.|x) [ 1/T sum_t 1{s_t = s, a_t = a} ]      occupancy: x uniform
               over the lines of --prompts, T the
                                                                      tokens of y with its end
                                                                      token.  It sums to 1.
    E_eps      = {(s, a): d(s, a) >= eps}                             effective support
    expansion  = E_eps(after) without E_eps(before)                   counted, and its mass
               under d_after
    attrition  = E_eps(before) without E_eps(after)                   counted, and its mass
               under d_before
    common C   = E_eps(before) and E_eps(after)                       counted, and its mass
               under both
    moved      = 1/2 sum_{(s,a) in C} |d_after - d_before|            reshaping: not normalised
               to C, so what C as a whole gained or
                                                                      lost counts by half; of
                                                                      `total_variation`, the
                                                                      same over all pairs

d is a share of all prompts and of all tokens: an answer with P(y|x) = 1 gives each of its pairs
1 / (prompts T), so eps means little without these two, and one eps alone is arbitrary.  Choose
several.

Exact (first command): lists every answer of either model that has an end token or --max-tokens
tokens, with its probability at temperature 1, over the whole vocabulary.  Branches whose
probability is below --floor are cut: their own pairs are below every eps, and what they held
still counts for the pairs above the cut, as if they went on to --max-tokens.  `missed_mass` is
that mass, the mean over prompts, the larger of the two models: what accuracy and the like may
lack.  Above 0.01 it is refused: not exact any more. Writes a line for the two models, then a
line an eps.  This is for worlds.forks and its like.

Sampled (second command): from two outputs of eval.py on the same prompts, completions instead
of pairs.  A right answer is new if no text before was it, lost if no text after is.  Styles are
the same for right texts with every run of digits replaced by 0, lines and all other characters
kept: "7+5=12 / #12" has the style "0+0=0 / #0".  That is a proxy: it does not see the order of
terms, and takes a text with one more step for another style.  All of these are lower bounds on
support: what n samples do not show may still be written.  And new and lost answers both come
out above 0 for two sets of samples of one and the same model: compare with that. Writes a line
a prompt.
"""

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

from opd import files, records
from opd.answers import is_correct
from opd.kernel import all_logits
from opd.policy import load_policy, render
from opd.records import BadInput

# of the exact mode
DEFAULTS = {"eps": [1e-2, 1e-3, 1e-4], "floor": 1e-9, "max_prefixes": 300_000}
PASS_AT = (1, 4, 16, 64, 256)
MISSED = 0.01

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


def style(text):
    """style("17+5=22\\n#22") -> "0+0=0\\n#0"."""
    return re.sub("[0-9]+", "0", text)


def prompt_change(before, after):
    """One line of the sampled mode, from [(text, right?), ...] of a prompt before and after.

    before [("a#4", True), ("b#7", False)], after [("a#4", True), ("c#4", True)]: right 1 -> 2,
    distinct 1 -> 2, new ["c#4"], lost []."""
    line = {
        "right_before": sum(right for _, right in before),
        "right_after": sum(right for _, right in after),
    }
    for name, of in (("answers", str), ("styles", style)):
        had, has = ({of(text) for text, right in texts if right} for texts in (before, after))
        line |= {
            f"{name}_before": len(had),
            f"{name}_after": len(has),
            f"new_{name}": sorted(has - had),
            f"lost_{name}": sorted(had - has),
        }
    return line


# ---- exact: the tree of answers


def enumerate_answers(policy, prompt_ids, max_tokens, floor, most):
    """({y: P(y|x)}, {prefix: mass cut right below it}): every answer to a prompt whose prefixes
    all have probability >= floor.

    y is a tuple of ids that ends in an end token or has max_tokens of them.  Breadth first: the
    prefixes of one level are equally long. Answers and cut masses sum to 1.  Returns None when
    there are more than `most` prefixes to keep."""

    prompt, vocabulary = (
        torch.tensor([prompt_ids], device=policy.device),
        policy.head_options["vocabulary"],
    )
    stops, rows = (
        torch.tensor(policy.stop_ids, device=policy.device),
        max(1, (1 << 20) // vocabulary),
    )
    live, p_live = (
        prompt.new_zeros(1, 0),
        torch.ones(1, dtype=torch.float64, device=policy.device),
    )
    answers, stubs = {}, {}
    for t in range(max_tokens):
        level, p_level, count = [], [], len(answers)
        for prefixes, p_prefixes in zip(live.split(rows), p_live.split(rows)):
            with torch.no_grad():
                ids = torch.cat([prompt.expand(len(prefixes), -1), prefixes], 1)
                hidden = policy.model.get_decoder()(
                    input_ids=ids, use_cache=False
                ).last_hidden_state[:, -1]
                step = torch.softmax(
                    all_logits(hidden, policy.head, **policy.head_options).double(), -1
                )
            if not torch.isfinite(step).all():
                raise BadInput(
                    f"{policy.identity['model']}: the model's logits are not finite: try "
                    f"another checkpoint"
                )
            p = p_prefixes[:, None] * step
            kept = p >= floor
            cut = torch.where(kept, 0.0, p).sum(1)
            stubs.update(zip(map(tuple, prefixes[cut > 0].tolist()), cut[cut > 0].tolist()))
            row, token = kept.nonzero(as_tuple=True)
            count += len(row)
            if count > most:
                return None
            level.append(torch.cat([prefixes[row], token[:, None]], 1))
            p_level.append(p[kept])
        live, p_live = torch.cat(level), torch.cat(p_level)
        done = (
            torch.isin(live[:, -1], stops)
            if t + 1 < max_tokens
            else torch.ones_like(live[:, -1], dtype=torch.bool)
        )
        answers.update(zip(map(tuple, live[done].tolist()), p_live[done].tolist()))
        live, p_live = live[~done], p_live[~done]
        if not len(live):
            break
    return answers, stubs


def read_states(path, policy, max_tokens):
    """(x as tuples of prompt ids, their shares of the lines, their right answers); a prompt
    that stands twice is two draws of one x."""

    prompts, draws, wanted = files.Table(path, "prompts"), Counter(), {}
    limit = getattr(
        policy.model.config.get_text_config(), "max_position_embeddings", None
    ) or float("inf")
    for prompt in prompts:
        where = prompts.where(records.key_of(prompt, "prompts"))
        if prompt.get("answer") in (None, ""):
            raise BadInput(
                f"{where}: answer: expected the right final answer, but there is none"
            )
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


def all_answers(policy, states, weight, args):
    """({(x, y): P(y|x)}, {(x, prefix): cut mass}, missed mass) over all prompts, or BadInput
    where the tree is too wide to list or too much of it was cut."""
    answers, stubs = {}, {}
    instead = "or measure with samples: methods.unified --before-evals E0 --after-evals E1"
    for x, ids in enumerate(files.progress(states, desc="enumerate", unit="prompt")):
        found = enumerate_answers(
            policy, ids, args.max_tokens, args.floor, args.max_prefixes - len(answers)
        )
        if found is None:
            raise BadInput(
                f"{policy.identity['model']}: expected at most {args.max_prefixes} live "
                f"prefixes and answers (--max-prefixes), got more at "
                f"prompt {x + 1} of {len(states)}: give fewer prompts, a larger --floor or "
                f"--max-prefixes, {instead}"
            )
        answers.update(((x, y), p) for y, p in found[0].items())
        stubs.update(((x, y), p) for y, p in found[1].items())
    missed = sum(weight[x] * p for (x, _), p in stubs.items())
    if missed > MISSED:
        raise BadInput(
            f"{policy.identity['model']}: missed_mass: expected at most {MISSED:g} below "
            f"--floor {args.floor:g}, got "
            f"{missed:.2g}, which is not exact: lower --floor and raise --max-prefixes, "
            f"{instead}"
        )
    return answers, stubs, missed


def exact(args):
    """(lines of the output, summary, sentences to print) of the exact mode."""

    if (
        args.max_tokens < 1
        or not all(0 < eps < 1 for eps in args.eps)
        or not 0 <= args.floor <= min(args.eps)
    ):
        raise BadInput(
            "--max-tokens must be at least 1, every --eps in (0, 1), --floor at least 0 and "
            "not above the smallest --eps"
        )
    policies = {
        "before": load_policy(args.before),
        "after": load_policy(args.after),
    }
    for field in ("vocabulary", "template"):
        expected, got = (policy.identity[field] for policy in policies.values())
        if got != expected:
            raise BadInput(
                f"--after {args.after}: policy.{field}: expected {expected}, that of "
                f"--before {args.before}, got {got}: the same ids would be "
                "other texts, so the two supports cannot be compared"
            )
    states, weight, wanted = read_states(args.prompts, policies["before"], args.max_tokens)
    answers, stubs, missed = zip(
        *(all_answers(policy, states, weight, args) for policy in policies.values())
    )
    keys = list(answers[0].keys() | answers[1].keys())
    texts = policies["before"].tokenizer.batch_decode(
        [list(y) for _, y in keys], skip_special_tokens=True
    )
    right = {(x, y) for (x, y), text in zip(keys, texts) if is_correct(text, wanted[x])}

    before, after = (
        occupancy(a, weight, cut, args.max_tokens) for a, cut in zip(answers, stubs)
    )
    after_right = occupancy({key: p for key, p in answers[1].items() if key in right}, weight)
    summary = {
        "prompts": len(states),
        "missed_mass": max(missed),
        "total_variation": total_variation(before, after, before.keys() | after.keys()),
    }
    for when, listed in zip(policies, answers):
        summary |= {
            f"{name}_{when}": value
            for name, value in answer_numbers(listed, right, weight).items()
        }
    lines = [
        {
            "mode": "exact",
            "before": policies["before"].identity,
            "after": policies["after"].identity,
            "max_tokens": args.max_tokens,
            "floor": args.floor,
        }
        | summary
    ]
    for eps in args.eps:
        numbers = change(before, after, after_right, eps)
        for when, listed in zip(policies, answers):  # a prompt, distinct by their tokens
            numbers[f"right_answers_{when}"] = sum(
                weight[x] for (x, y), p in listed.items() if p >= eps and (x, y) in right
            )
        lines.append({"eps": eps} | numbers)
        summary |= {f"{name}@{eps:g}": value for name, value in numbers.items()}

    def at_each_eps(name, form):
        return " / ".join(
            "-" if line[name] is None else form.format(line[name]) for line in lines[1:]
        )

    return (
        lines,
        summary,
        (
            f"exact over {len(states)} prompts, accuracy {summary['accuracy_before']:.3f} -> "
            f"{summary['accuracy_after']:.3f}, pass@256 "
            f"{summary['pass@256_before']:.3f} -> {summary['pass@256_after']:.3f}, entropy "
            f"{summary['entropy_before']:.2f} -> "
            f"{summary['entropy_after']:.2f} nats, total variation "
            f"{summary['total_variation']:.3f}, missed mass "
            f"{summary['missed_mass']:.1g}",
            f"at eps {' / '.join(f'{eps:g}' for eps in args.eps)}: support "
            f"{at_each_eps('support_before', '{}')} -> "
            f"{at_each_eps('support_after', '{}')}, "
            f"expansion {at_each_eps('expansion', '{}')} (mass "
            f"{at_each_eps('expansion_mass', '{:.3f}')}; right "
            f"{at_each_eps('expansion_right', '{:.0%}')}), "
            f"attrition {at_each_eps('attrition', '{}')} (mass "
            f"{at_each_eps('attrition_mass', '{:.3f}')}), moved "
            f"{at_each_eps('moved', '{:.3f}')}",
        ),
    )


# ---- sampled: two outputs of eval.py


def read_samples(path):
    """({id: [(text, right?), ...]}, samples a prompt, hash of the prompts file or None) of an
    output of eval.py."""
    samples = defaultdict(list)
    for r in files.read(path, "evals"):
        samples[str(r["id"])].append((r["text"], bool(r["correct"])))
    counts = Counter(map(len, samples.values()))
    if len(counts) > 1:
        raise BadInput(
            f"{path}: expected as many samples of every prompt, got "
            f"{' and '.join(map(str, sorted(counts)))}: "
            "the more samples, the more support they show"
        )
    sidecar, prompts = Path(f"{path}.run.json"), None
    if sidecar.exists():  # ids alone do not tell one toy world's prompts from another's
        try:
            prompts = next(iter(json.loads(sidecar.read_text())["inputs"].values()))
        except (ValueError, TypeError, KeyError, AttributeError, StopIteration):
            raise BadInput(
                f"{sidecar}: expected the settings and inputs of {path}, but it is damaged: "
                f"run eval.py again"
            ) from None
    return samples, next(iter(counts)), prompts


def sampled(args):
    """(lines of the output, summary, sentences to print) of the sampled mode."""
    (before, n, prompts), (after, n_after, prompts_after) = (
        read_samples(args.before_evals),
        read_samples(args.after_evals),
    )
    if odd := sorted(before.keys() ^ after.keys()):
        raise BadInput(
            f"{args.after_evals}: id: expected the prompts of {args.before_evals}, but only "
            f"one of the two has id {odd[0]!r}"
        )
    if prompts and prompts_after and prompts != prompts_after:
        raise BadInput(
            f"{args.after_evals}: expected answers to the prompts file of "
            f"{args.before_evals}, but its .run.json names one with other contents"
        )
    if n_after != n:
        raise BadInput(
            f"{args.after_evals}: expected {n} samples a prompt, as in {args.before_evals}, "
            f"got {n_after}: the more samples, the more support "
            "they show"
        )
    lines = [{"id": name, "n": n} | prompt_change(before[name], after[name]) for name in before]
    summary = {"prompts": len(lines), "n": n}
    for when, other in (("before", "after"), ("after", "before")):
        summary[f"accuracy_{when}"] = summary[f"pass@1_{when}"] = float(
            np.mean([line[f"right_{when}"] / n for line in lines])
        )
        summary[f"pass@{n}_{when}"] = float(
            np.mean([line[f"right_{when}"] > 0 for line in lines])
        )
        summary[f"solved_only_{when}"] = float(
            np.mean(
                [line[f"right_{when}"] > 0 and not line[f"right_{other}"] for line in lines]
            )
        )
    for name in ("answers", "styles"):
        for when, what in (("before", "new"), ("after", "lost")):
            summary[f"right_{name}_{when}"] = float(
                np.mean([line[f"{name}_{when}"] for line in lines])
            )
            summary[f"{what}_{name}"] = float(
                np.mean([len(line[f"{what}_{name}"]) for line in lines])
            )
    return (
        lines,
        summary,
        (
            f"{n} samples of each of {len(lines)} prompts, pass@1 "
            f"{summary['pass@1_before']:.3f} -> {summary['pass@1_after']:.3f}, "
            f"pass@{n} "
            f"{summary[f'pass@{n}_before']:.3f} -> {summary[f'pass@{n}_after']:.3f}, solved "
            f"only after {summary['solved_only_after']:.1%}, only before "
            f"{summary['solved_only_before']:.1%}",
            "distinct right a prompt (lower bounds): "
            + "; ".join(
                f"{name} {summary[f'right_{name}_before']:.2f} -> "
                f"{summary[f'right_{name}_after']:.2f}, new "
                f"{summary[f'new_{name}']:.2f}, "
                f"lost {summary[f'lost_{name}']:.2f}"
                for name in ("answers", "styles")
            ),
        ),
    )


# ---- the command


def main(argv=None):
    p = files.parser(__doc__)
    p.add_argument("--before", help="exact: the model folder before training")
    p.add_argument(
        "--after", help="exact: the model folder after it, of the same tokenizer and template"
    )
    p.add_argument(
        "--prompts",
        help="exact: JSONL of prompts with an `answer`; every line is one draw of x",
    )
    p.add_argument(
        "--max-tokens",
        type=int,
        help="exact: longest answer; a longer one is cut there, as rollout.py would",
    )
    p.add_argument(
        "--eps",
        type=float,
        nargs="+",
        help="exact: thresholds of effective support (default: 1e-2 1e-3 1e-4)",
    )
    p.add_argument(
        "--floor",
        type=float,
        help="exact: branches less likely than this are cut: time against missed mass "
        "(default: 1e-9)",
    )
    p.add_argument(
        "--max-prefixes",
        type=int,
        help="exact: stop rather than hold more live prefixes and answers of a model "
        "(default: 300000)",
    )
    p.add_argument(
        "--before-evals", help="sampled: output of eval.py for the model before training"
    )
    p.add_argument(
        "--after-evals",
        help="sampled: output of eval.py for the model after it, as many samples of the same "
        "prompts",
    )
    p.add_argument("--out", required=True, help="JSONL to write")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    by_sampling = args.before_evals is not None or args.after_evals is not None
    needed = (
        ("before_evals", "after_evals")
        if by_sampling
        else ("before", "after", "prompts", "max_tokens")
    )
    idle = ("before", "after", "prompts", "max_tokens", *DEFAULTS) if by_sampling else ()
    for names, wrong, verdict in (
        (needed, True, "is missing"),
        (idle, False, "belongs to the exact mode and has no effect on samples"),
    ):
        for name in names:
            if (getattr(args, name) is None) == wrong:
                p.error(
                    f"--{name.replace('_', '-')}: {verdict}; expected --before --after "
                    f"--prompts --max-tokens (exact) or --before-evals "
                    f"--after-evals"
                )
    for name, default in DEFAULTS.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    if Path(args.out).exists() and not args.overwrite:
        raise BadInput(
            f"{args.out}: exists already: give another --out, or --overwrite to replace it"
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    lines, summary, sentences = sampled(args) if by_sampling else exact(args)
    files.write_atomically(args.out, (json.dumps(line) + "\n" for line in lines))
    print(f"methods.unified: {args.out}: " + "\n    ".join(sentences))
    return {"out": args.out} | summary


if __name__ == "__main__":
    files.run(main)
