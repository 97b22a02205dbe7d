"""SimCT (arXiv 2605.07711): a teacher of another vocabulary; what do text units of several
tokens add to the tokens that both spell alike?

    python -m experiments.simct --seeds 5
    python -m experiments.simct --arms sft,simple,simct,masked
    python -m experiments.simct --smoke
    python -m experiments.simct --report results/simct.jsonl

The teacher writes one character a token.  Students have longer tokens: m16 has 16 of them,
learnt by byte-pair encoding from the same texts (a half of the bytes is then spelt alike), m64,
m4, m1 and d20 (the numbers from 20 to 40) more and fewer; m0 is the teacher's own vocabulary.
Each has learnt right work, then text of which half is right, as its seed deals it.  A round is
--prompts problems, one answer each, in --updates optimiser steps.

    before, teacher     as they start
    sft                 as many of the teacher's texts, re-tokenized: needs no alignment at all
    simple              reverse KL where both spell alike, nothing elsewhere (strict shared
                        vocabulary);  top16: on the student's 16 likeliest
    simct               the paper: and text units, scored by the mean log-prob of their spelling
    masked, sum, logit  tokens that only begin a unit's text dropped;  the whole log-prob in the
                        mean's place;  raw logits, as released
    masked-sum          both of the first two: the probability of a text is then the same
                        however it is spelt
    simple-slow, simct-slow   a third of the learning rate (on dev the best one of simct)
    dpca, uld           each unit's log-prob dealt out among its tokens as an advantage;  sorted
                        probabilities, aligned by nothing
    drop25, 50, 75      simct with that share of the spans left out: what was recovered, given
                        back
    coarse30, 70        simct with that share of neighbouring one-token units joined: opinions
                        made coarser
    shuffled            simct with the spans' scores dealt out among the spans
    VOCABULARY-before, -simple, -simct, -masked   the same for the other vocabularies: the gap
                                                  against the coverage
    m0-...              control: one vocabulary on both sides, where all are ordinary on-policy
                        distillation

`strict` is the share of the answers' bytes in units of one token on either side, `covered` in
units at all.

Rates were chosen on dev, one seed (`--arms simple,simct,sft,dpca,uld,masked --eval-split dev
--final-n 4`, results/simct_dev_lr*.jsonl): simple, masked, dpca and uld are best at 1e-4, simct
at 3e-5, sft at 3e-4.  Bits a byte of the teacher's texts and the angle between the gradients of
one-token units and spans, two diagnostics of the literature, are not built.
"""

import shutil
import time

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    gap,
    imitate,
    last,
    parse,
    report,
    run_arms,
    say,
    settle,
    train_round,
)
from opd import files

VOCABULARIES = {"m16": "16", "m64": "64", "m4": "4", "m1": "1", "d20": "20:40", "m0": None}
MAIN = "m16"
VARIANTS = {
    "sft": dict(method="seqkd"),
    "simple": dict(method="simple-opd"),
    "top16": dict(method="simple-opd", top=16),
    "simct": dict(method="simct"),
    "masked": dict(method="simct", set="prefixes=drop"),
    "sum": dict(method="simct", set="span=sum"),
    "logit": dict(method="simct", set="span=logit"),
    "masked-sum": dict(method="simct", set="prefixes=drop --set span=sum"),
    "simple-slow": dict(method="simple-opd", slow=True),
    "simct-slow": dict(method="simct", slow=True),
    "dpca": dict(method="opd"),
    "uld": dict(method="uld", sorted=True),
    "drop25": dict(method="simct", regroup="--drop-spans 0.25"),
    "drop50": dict(method="simct", regroup="--drop-spans 0.5"),
    "drop75": dict(method="simct", regroup="--drop-spans 0.75"),
    "coarse30": dict(method="simct", regroup="--coarsen 0.3"),
    "coarse70": dict(method="simct", regroup="--coarsen 0.7"),
    "shuffled": dict(method="simct", regroup="--shuffle-spans"),
}
ARMS = {
    "before": dict(vocabulary=MAIN),
    "teacher": dict(vocabulary="m0"),
    **{name: dict(how, vocabulary=MAIN) for name, how in VARIANTS.items()},
    **{
        f"{v}-{name}": dict(VARIANTS.get(name, {}), vocabulary=v)
        for v in VOCABULARIES
        if v != MAIN
        for name in ("before", "simple", "simct", "masked")
    },
    "m0-opd": dict(vocabulary="m0", method="opd-full", ordinary=True),
}
SHARED = (
    "rounds",
    "prompts",
    "updates",
    "learning_rate",
    "sft_learning_rate",
    "max_tokens",
    "right",
    "base_steps",
    "teacher_steps",
    "spoil_steps",
    "spoil_lr",
    "eval_every",
    "eval_n",
    "final_n",
    "eval_split",
)
SMOKE = dict(
    rounds=2,
    prompts=4,
    updates=2,
    max_tokens=8,
    base_steps=2,
    teacher_steps=4,
    spoil_steps=1,
    eval_every=2,
    eval_n=1,
    final_n=1,
)
COLUMNS = (
    "greedy",
    "strict",
    "covered",
    "whole",
    "spans",
    "length_mean",
    "truncated",
    "teacher_tokens",
    "trained_tokens",
    "seconds",
)


CLAIMS = [
    Claim(
        "distillation across vocabularies works at all",
        "simple − before",
        gap("simple", "before"),
    ),
    Claim("text units add to it (the paper's claim)", "simct − simple", gap("simct", "simple")),
    Claim("...more than re-tokenized texts do", "simct − sft", gap("simct", "sft")),
    Claim(
        "the gain shrinks as spans are given back",
        "drop75 − simct",
        gap("drop75", "simct"),
        "below",
    ),
    Claim("...in order", "(drop25 − drop75)", gap("drop25", "drop75")),
    Claim(
        "the gain is the spans' scores and not their presence",
        "shuffled − simct",
        gap("shuffled", "simct"),
        "below",
    ),
    Claim("coarser units lose", "coarse70 − simct", gap("coarse70", "simct"), "below"),
    Claim(
        "tokens that begin a unit's text teach segmentation: dropping them helps",
        "masked − simct",
        gap("masked", "simct"),
    ),
    Claim(
        "...what they teach is seen: the student comes to spell as the teacher does",
        "strict(simct) − strict(simple)",
        last("strict", "simct", "simple"),
    ),
    Claim(
        "...and without them it does not",
        "strict(masked) − strict(simple)",
        last("strict", "masked", "simple"),
        "within",
        0.02,
    ),
    Claim(
        "the mean log-prob is no worse than the whole one",
        "simct − sum",
        gap("simct", "sum"),
        "above",
        -0.02,
    ),
    Claim(
        "raw logits, as released, are no worse than the paper's score",
        "logit − simct",
        gap("logit", "simct"),
        "above",
        -0.02,
    ),
    Claim(
        "the student's 16 likeliest shared tokens are enough",
        "top16 − simple",
        gap("top16", "simple"),
        "within",
        0.02,
    ),
    Claim(
        "dealing a unit's log-prob out as an advantage does as well",
        "dpca − simct",
        gap("dpca", "simct"),
        "above",
        -0.02,
    ),
    Claim(
        "sorted probabilities, aligned by nothing, lose",
        "uld − simple",
        gap("uld", "simple"),
        "below",
    ),
    Claim("the masked form adds to shared tokens", "masked − simple", gap("masked", "simple")),
    Claim(
        "...and so does the one that keeps probabilities",
        "masked-sum − simple",
        gap("masked-sum", "simple"),
    ),
    Claim(
        "at a third of the rate text units add to shared tokens",
        "simct-slow − simple-slow",
        gap("simct-slow", "simple-slow"),
    ),
    *(
        Claim(
            f"gap at another coverage: {v}",
            f"{v}-simct − {v}-simple",
            gap(f"{v}-simct", f"{v}-simple"),
        )
        for v in ("m64", "m4", "m1", "d20")
    ),
    *(
        Claim(
            f"...of the masked form: {v}",
            f"{v}-masked − {v}-simple",
            gap(f"{v}-masked", f"{v}-simple"),
        )
        for v in ("m64", "m4", "m1", "d20")
    ),
    Claim(
        "the gap grows with the mismatch",
        "(simct − simple) at m64 − at d20",
        lambda a: gap("m64-simct", "m64-simple")(a) - gap("d20-simct", "d20-simple")(a),
    ),
    Claim(
        "control: on one vocabulary there is no gap",
        "m0-simct − m0-simple",
        gap("m0-simct", "m0-simple"),
        "within",
        0.02,
    ),
    Claim(
        "control: ...and both are ordinary distillation",
        "m0-simct − m0-opd",
        gap("m0-simct", "m0-opd"),
        "within",
        0.02,
    ),
]


def build(run, args):
    """The corpora, the teacher, and every vocabulary's student after right work."""
    world, texts = run.out / "world", 64 * args.teacher_steps
    for name, merges in VOCABULARIES.items():
        # the same problems and texts in all of them, another untrained student
        if not (world / name).exists():
            run.stage(
                f"worlds.sums --out {world}/{name} --train-prompts "
                f"{args.prompts * args.rounds} "
                f"--right {args.right} --clean {texts} --mixed "
                f"{256 * args.spoil_steps} " + (f"--student-merges {merges}" if merges else "")
            )
    imitate(
        run,
        world / MAIN / "teacher",
        world / MAIN / "clean.jsonl",
        args.teacher_steps,
        4e-3,
        0,
        world / "teacher",
        "--warmup-steps 20 --schedule linear --save-every 200",
    )
    for name, merges in VOCABULARIES.items():
        if not (world / f"base-{name}").exists():
            say(f"pre-training the student of vocabulary {name}")
            imitate(
                run,
                world / name / ("student_merged" if merges else "student"),
                world / MAIN / "clean.jsonl",
                args.base_steps,
                4e-3,
                0,
                world / f"base-{name}",
                f"--warmup-steps 20 --schedule linear --total-steps {args.teacher_steps}",
            )
    return world


def prepare(run, args, world, seed):
    folder = run.out / f"seed{seed}"
    for name in VOCABULARIES:
        imitate(
            run,
            world / f"base-{name}",
            world / MAIN / "mixed.jsonl",
            args.spoil_steps,
            args.spoil_lr,
            seed,
            folder / f"student-{name}",
            "--fresh-optimizer",
        )
    return folder


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    teacher, prompts, method = world / "teacher", world / MAIN / "train.jsonl", a.get("method")
    student = teacher if arm == "teacher" else folder / f"student-{a['vocabulary']}"
    model, row, shares, started = student, None, {}, time.time()
    cost = {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0}

    def measure(step, final):
        nonlocal row
        spent = round(time.time() - started, 2)

        def evaluate(n, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {world}/{MAIN}/{args.eval_split}.jsonl "
                f"--n {n} --max-tokens {args.max_tokens} --seed {2 * 10**6 + seed} "
                f"--out {place}/eval.jsonl --overwrite {more}"
            )

        n = args.final_n if final else args.eval_n
        score = evaluate(n)
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "length_mean": score["length_mean"],
            "truncated": score["truncated_fraction"],
            **shares,
            **cost,
            "seconds": spent,
        }
        if final:
            row["greedy"] = evaluate(1, "--temperature 0")["accuracy"]
        run.result(args, row)

    measure(0, not method)
    if not method:
        return row
    for number in files.progress(range(args.rounds), desc=f"seed {seed} {arm}", unit="round"):
        at, part = (
            place / f"round{number}",
            f"--prompts {prompts} --slice "
            f"{number * args.prompts}:{(number + 1) * args.prompts} --n 1 "
            f"--max-tokens {args.max_tokens} --seed {seed * 1000 + number}",
        )
        if method == "seqkd":
            cost["teacher_tokens"] += run.stage(
                f"teacher.py answer --model {teacher} {part} --out {at}/rollouts.jsonl"
            )["generated_tokens"]
            flags, rate = f"--prompts {prompts}", args.sft_learning_rate
        else:
            cost["generated_tokens"] += run.stage(
                f"rollout.py --model {model} {part} --out {at}/rollouts.jsonl"
            )["generated_tokens"]
            scores, rate, common = (
                f"{at}/scores.jsonl",
                args.learning_rate / (3 if a.get("slow") else 1),
                f"--rollouts {at}/rollouts.jsonl",
            )
            if a.get("ordinary"):
                scored = run.stage(
                    f"teacher.py score --model {teacher} {common} --out {scores} --top-k 1000"
                )
            else:
                more = f"--sorted {1000}" * a.get("sorted", False)
                if "top" in a:
                    run.stage(
                        f"teacher.py score --model {model} {common} --out {at}/own.jsonl "
                        f"--top-k {a['top']}"
                    )
                    more = f"--top-k-of {at}/own.jsonl"
                scored = run.stage(
                    f"methods.simct score --model {teacher} --student {model} --prompts "
                    f"{prompts} {common} --out {scores} {more}"
                )
                shares = {name: scored[name] for name in ("strict", "covered", "whole")}
                if "regroup" in a:
                    scores = f"{at}/regrouped.jsonl"
                    shares["spans"] = run.stage(
                        f"experiments.simct_regroup --scores {at}/scores.jsonl {common} "
                        f"{a['regroup']} --seed {seed * 1000 + number} --out "
                        f"{scores}"
                    )["spans"]
            cost["teacher_tokens"] += scored["teacher_tokens"]
            flags = f"--scores {scores}" + (f" --set {a['set']}" if "set" in a else "")
        model, done = train_round(
            run, args, method, model, student, at, seed, rate, flags, first=number == 0
        )
        cost["trained_tokens"] += done["trained_tokens"]
        if number + 1 == args.rounds or (number + 1) % args.eval_every == 0:
            measure((number + 1) * args.updates, number + 1 == args.rounds)
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "simct")
    p.add_argument("--rounds", type=int, default=20, help="rounds of an arm")
    p.add_argument("--prompts", type=int, default=128, help="problems a round, one answer each")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument("--learning-rate", type=float, default=1e-4, help="of distillation")
    p.add_argument(
        "--sft-learning-rate",
        type=float,
        default=3e-4,
        help="of imitation of the teacher's texts",
    )
    p.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    p.add_argument(
        "--right",
        type=float,
        default=0.5,
        help="share of right work in the text of mixed quality",
    )
    p.add_argument(
        "--base-steps",
        type=int,
        default=600,
        help="pre-training steps of 64 right texts of every student",
    )
    p.add_argument("--teacher-steps", type=int, default=1300, help="of the teacher")
    p.add_argument(
        "--spoil-steps",
        type=int,
        default=100,
        help="steps of 64 texts of mixed quality for a student",
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")
    add_eval_flags(p, every=5, n=2, final_n=8)
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(args, "simct", ARMS)
    run = begin(args, "a teacher of another vocabulary", arms, SHARED)
    world = build(run, args)
    run_arms(
        run,
        args,
        arms,
        lambda seed: prepare(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}"
            + (f", {row['strict']:.0%} of bytes spelt alike" if "strict" in row else "")
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    files.run(main)
