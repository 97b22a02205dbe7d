"""Lightning OPD (arXiv 2604.13010): may the student's answers and the teacher's numbers be
computed once, before training?

    python -m experiments.lightning --seeds 5
    python -m experiments.lightning --arms before,sft-a,offline,online
    python -m experiments.lightning --smoke
    python -m experiments.lightning --report results/lightning.jsonl

On-policy distillation samples and scores anew for every round.  Offline, the fine-tuned student
answers once, the teacher scores once, and the student trains on that file several times over,
recomputing only its own log-probs, without importance weights (the row `lightning` of
opd/loss.py). The paper's condition: the teacher is the one whose answers the student was
fine-tuned on.

World: two teachers of like accuracy and unlike style go on from one base: A writes `7+5=12 /
12-3=9 / #9`, B `7 / +5:12 / -3:9 / #9`.  The student (the base after careless text) is
fine-tuned on as many answers of A, of B, or of both halves (`sft-a`, `sft-b`, `sft-ab`). A
round is --prompts problems, one answer each, in --updates optimiser steps.  Online samples
every round from the weights of the moment and uses it once; offline samples half as many
rounds' worth from the fine-tuned weights and walks it twice, as in the paper (2.2 times).

    before, teacher-a, teacher-b, sft-a, sft-b, sft-ab
    offline, online         from sft-a, teacher A: claim 1
    strict                  online with one update a sampling, four times the samplings: what
                            "online" is without any staleness
    b-a-offline, ...        fine-tuned on b, scored by a; and so on: the grid of claim 2, with
                            `ab-a-offline` as the mixture control
    ...-lr3                 three times the learning rate
    long                    offline, --long times as many rounds on the same file: claim 3
    sft-more                control a: as many updates and answers of more fine-tuning on A's
                            answers
    shuffled                control b: the teacher's log-probs dealt out at random among the
                            tokens: must teach nothing
    is-token                control c: truncated importance weights pi / mu, at most 2
    refresh4, refresh8      control c: sampled anew every 4 or 8 rounds, walked twice
    no-clip, no-end         controls d, e: no bound on the advantage; the end token left out, as
                            in the released code
    reuse1, reuse8          control f: as many updates on twice the data, or on a quarter
    t08                     control g: answers sampled at temperature 0.8, as the paper does, in
                            place of 1

Every arm's ledger counts what was generated, scored by the teacher and trained on, and the
seconds of each, without the fine-tuning (whose own stand in the lines of sft-*).  The teacher
scores from files in every arm.  The learning rate was chosen on dev
(results/lightning_dev_lr*.jsonl, two seeds) in favour of offline training: of 1e-5, 3e-5 and
1e-4 only the first did not make it worse than the fine-tuned student; online was best at 3e-5,
hence the arms `-lr3`.  A shorter fine-tuning (--sft-prompts 320, 0.45 nats a token from the
teacher in place of 0.09) was looked at first, on dev, too
(results/lightning_dev_short_lr*.jsonl): there offline training harmed at 1e-4 and 3e-4 and did
not help at 1e-3.  The held-out problems serve for measuring only.
"""

import json
import shutil
import time

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    last,
    parse,
    report,
    run_arms,
    say,
    settle,
)
from experiments import add_world_flags, build_world, spoil_student
from opd.files import parser, progress, read, run, write_atomically

STYLES = {"a": "lines", "b": "ledger"}
ONLINE = dict(refresh=1, reuse=1)
GRID = {
    ("" if (sft, teacher) == ("a", "a") else f"{sft}-{teacher}-") + when: dict(
        sft=sft, teacher=teacher, **how
    )
    for sft in "ab"
    for teacher in "ab"
    for when, how in (("offline", {}), ("online", ONLINE))
}
A = dict(sft="a", teacher="a")
ARMS = {
    "before": {},
    "teacher-a": {},
    "teacher-b": {},
    "sft-a": {},
    "sft-b": {},
    "sft-ab": {},
    **GRID,
    "ab-a-offline": dict(sft="ab", teacher="a"),
    "offline-lr3": dict(A, rate=3),
    "is-token-lr3": dict(A, rate=3, set="ratio=token tis_cap=2"),
    "online-lr3": dict(A, **ONLINE, rate=3),
    "strict": dict(A, **ONLINE, strict=True),
    "long": dict(A, long=True),
    "sft-more": dict(A, more=True),
    "shuffled": dict(A, shuffle=True),
    "is-token": dict(A, set="ratio=token tis_cap=2"),
    "refresh4": dict(A, refresh=4),
    "refresh8": dict(A, refresh=8),
    "no-clip": dict(A, set="advantage_clip=0"),
    "no-end": dict(A, no_end=True, set="token_weight=file"),
    "reuse1": dict(A, reuse=1),
    "reuse8": dict(A, reuse=8),
    "t08": dict(A, temperature=0.8),
}
SHARED = (
    "rounds",
    "prompts",
    "updates",
    "long",
    "learning_rate",
    "sft_prompts",
    "sft_n",
    "sft_learning_rate",
    "max_tokens",
    "base_steps",
    "teacher_steps",
    "style_steps",
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
    long=2,
    sft_prompts=4,
    sft_n=2,
    base_steps=2,
    teacher_steps=4,
    style_steps=2,
    spoil_steps=2,
    eval_every=2,
    eval_n=1,
    final_n=1,
    max_tokens=8,
)
COLUMNS = (
    "greedy",
    "kl",
    "style_a",
    "weight_std",
    "ess",
    "generated_tokens",
    "scored_tokens",
    "trained_tokens",
    "generate_seconds",
    "score_seconds",
    "train_seconds",
)


def column(teacher, when):
    """What fine-tuning on the scoring teacher's answers is worth: accuracy of the consistent
    route minus that of the other."""
    other = {"a": "b", "b": "a"}[teacher]
    return last(
        "accuracy", when if teacher == "a" else f"b-b-{when}", f"{other}-{teacher}-{when}"
    )


def ratio(metric, arm, other):
    return lambda arms: (
        sum(arms[arm][-1][m] for m in metric)
        / max(1e-9, sum(arms[other][-1][m] for m in metric))
    )


def gap(arm, other="offline"):
    return last("accuracy", arm, other)


SECONDS = ("generate_seconds", "score_seconds", "train_seconds")
CLAIMS = [
    Claim(
        "1: online distillation improves on the fine-tuned student",
        "online − sft-a",
        gap("online", "sft-a"),
    ),
    Claim("1: offline distillation does, too", "offline − sft-a", gap("offline", "sft-a")),
    Claim(
        "1: offline is as accurate as online",
        "offline − online",
        gap("offline", "online"),
        "within",
        0.03,
    ),
    Claim(
        "1: ...and as close to the teacher on fresh answers (reverse KL, nats a token)",
        "KL(offline) − KL(online)",
        last("kl", "offline", "online"),
        "within",
        0.03,
    ),
    Claim(
        "1: four updates a sampling are as good as one: `online` is online",
        "strict − online",
        gap("strict", "online"),
        "within",
        0.03,
    ),
    Claim(
        "1: it generates and scores fewer tokens (expected: the reuse factor, 2)",
        "scored(online) / scored(offline)",
        ratio(("scored_tokens",), "online", "offline"),
        "above",
        1.8,
    ),
    Claim(
        "1: it takes less time",
        "seconds(online) / seconds(offline)",
        ratio(SECONDS, "online", "offline"),
        "above",
        1.0,
    ),
    Claim(
        "1: four times less (the paper's headline)",
        "seconds(online) / seconds(offline)",
        ratio(SECONDS, "online", "offline"),
        "above",
        4.0,
    ),
    *(
        Claim(
            f"2: of students scored by {teacher.upper()} {when}, the one fine-tuned on "
            f"{teacher.upper()} ends best",
            f"{teacher}→{teacher} − {'ba'[teacher == 'b']}→{teacher}, {when}",
            column(teacher, when),
        )
        for when in ("offline", "online")
        for teacher in "ab"
    ),
    Claim(
        "2: an inconsistent teacher costs more offline than online",
        "mean offline penalty − mean online penalty",
        lambda arms: (
            sum(column(t, "offline")(arms) - column(t, "online")(arms) for t in "ab") / 2
        ),
    ),
    Claim(
        "2 control: fine-tuning on a mixture of both teachers costs nothing",
        "ab→a − a→a, offline",
        gap("ab-a-offline"),
        "within",
        0.03,
    ),
    Claim(
        "3: the spread of pi / mu stays as it is",
        "weight_std(long) / weight_std(offline)",
        ratio(("weight_std",), "long", "offline"),
        "below",
        1.5,
    ),
    Claim(
        "3: many walks over the same numbers do no harm",
        "long − offline",
        gap("long"),
        "above",
        -0.03,
    ),
    Claim(
        "control a: more fine-tuning is worse than distillation",
        "offline − sft-more",
        gap("offline", "sft-more"),
    ),
    Claim(
        "control b: shuffled teacher numbers teach nothing",
        "shuffled − sft-a",
        gap("shuffled", "sft-a"),
        "below",
        0.02,
    ),
    Claim(
        "control c: importance weights change nothing",
        "is-token − offline",
        gap("is-token"),
        "within",
        0.03,
    ),
    Claim(
        "control c: sampling anew every 4 rounds changes nothing",
        "refresh4 − offline",
        gap("refresh4"),
        "within",
        0.03,
    ),
    Claim("control c: ...every 8", "refresh8 − offline", gap("refresh8"), "within", 0.03),
    Claim(
        "control c: at three times the rate offline training harms",
        "offline-lr3 − sft-a",
        gap("offline-lr3", "sft-a"),
        "below",
    ),
    Claim(
        "control c: ...importance weights prevent that",
        "is-token-lr3 − offline-lr3",
        gap("is-token-lr3", "offline-lr3"),
    ),
    Claim(
        "control c: ...and online it is no harm",
        "online-lr3 − online",
        gap("online-lr3", "online"),
        "above",
        -0.03,
    ),
    Claim(
        "control d: the bound on the advantage changes nothing",
        "no-clip − offline",
        gap("no-clip"),
        "within",
        0.03,
    ),
    Claim(
        "control e: leaving out the end token changes nothing",
        "no-end − offline",
        gap("no-end"),
        "within",
        0.03,
    ),
    Claim(
        "control f: twice the data, walked once, is no better",
        "reuse1 − offline",
        gap("reuse1"),
        "within",
        0.03,
    ),
    Claim(
        "control f: a quarter of the data, walked eight times, is no worse",
        "reuse8 − offline",
        gap("reuse8"),
        "within",
        0.03,
    ),
    Claim(
        "control g: sampling at 0.8 changes nothing",
        "t08 − offline",
        gap("t08"),
        "within",
        0.03,
    ),
]


def build_teachers(run, args):
    """The world with two more teachers: both go on from the base, each on clean work in its own
    style."""
    world = build_world(run, args, problems=args.sft_prompts + 4 * args.rounds * args.prompts)
    for name, style in STYLES.items():
        if not (world / f"toy-{name}").exists():
            run.stage(
                f"worlds.sums --out {world}/toy-{name} --styles {style} --train-prompts 8 "
                f"--eval-prompts 8 --clean {64 * args.style_steps} --mixed 8"
            )
        if not (world / f"teacher-{name}").exists():
            say(
                f"pre-training teacher {name} ({style}): {args.style_steps} steps of 64 "
                f"clean texts"
            )
            run.stage(
                f"train.py --method sft --model {world}/teacher --rollouts "
                f"{world}/toy-{name}/clean.jsonl --batch-size 64 --learning-rate "
                f"1e-3 --warmup-steps 20 "
                f"--schedule linear --adam-beta2 0.95 --micro-batch-tokens 4096 "
                f"--fresh-optimizer --steps {args.style_steps} --out "
                f"{world}/teacher-{name}"
            )
    return world


def fine_tune(run, args, world, folder, name):
    """The student fine-tuned on one teacher's answers, or on those of both, half the problems
    each.  Returns its ledger."""
    out, seed, parts, tokens, started = (
        folder / f"sft-{name}",
        int(folder.name[4:]),
        [],
        0,
        time.time(),
    )
    number = args.sft_prompts // len(name)
    for i, teacher in enumerate(name):
        parts.append(folder / "answers" / f"{name}-{teacher}.jsonl")
        tokens += run.stage(
            f"teacher.py answer --model {world}/teacher-{teacher} --prompts "
            f"{world}/toy/train.jsonl --slice {i * number}:{(i + 1) * number} --n "
            f"{args.sft_n} "
            f"--max-tokens {args.max_tokens} --seed {10**6 + seed} --out {parts[-1]}"
        )["generated_tokens"]
    texts = (
        parts[0]
        if len(parts) == 1
        else run.concatenate(parts, folder / "answers" / f"{name}.jsonl")
    )
    generated = time.time()
    trained = train(
        run,
        args,
        folder / "student",
        out,
        texts,
        seed,
        "--method seqkd --fresh-optimizer",
        args.sft_learning_rate,
        args.sft_n,
    )
    return {
        "generated_tokens": tokens,
        "scored_tokens": 0,
        "trained_tokens": trained["trained_tokens"],
        "generate_seconds": round(generated - started, 2),
        "score_seconds": 0,
        "train_seconds": round(time.time() - generated, 2),
    }


def train(run, args, model, out, rollouts, seed, more, rate, n=1):
    """One call of train.py, with as many answers in an update whatever their number a problem,
    n."""
    size = max(1, args.prompts // args.updates // n)
    return run.stage(
        f"train.py {more} --model {model} --rollouts {rollouts} --out {out} --batch-size "
        f"{size} --learning-rate {rate} --seed {seed}"
    )


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    if not arm.startswith("sft-") or arm == "sft-more":
        shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True, exist_ok=True)
    # strict: as many answers and updates, sampled an update's worth at a time
    parts = args.updates if a.get("strict") else 1
    rounds, problems = (
        args.rounds * parts * (args.long if a.get("long") else 1),
        args.prompts // parts,
    )
    refresh, reuse = min(rounds, a.get("refresh", args.rounds)), a.get("reuse", 2)
    if a.get("long"):
        refresh, reuse = rounds, 2 * args.long
    ledger = {
        "generated_tokens": 0,
        "scored_tokens": 0,
        "trained_tokens": 0,
        "generate_seconds": 0.0,
        "score_seconds": 0.0,
        "train_seconds": 0.0,
    }
    teacher, spread, row = (
        world / f"teacher-{a.get('teacher', 'a')}",
        {"weight_std": None, "ess": None},
        None,
    )
    model = {
        "before": folder / "student",
        "teacher-a": world / "teacher-a",
        "teacher-b": world / "teacher-b",
    }.get(arm, folder / f"sft-{a.get('sft', arm[4:])}")

    def measure(step, final):
        nonlocal row

        def evaluate(n, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {world}/toy/{args.eval_split}.jsonl --n "
                f"{n} --max-tokens {args.max_tokens} --seed {2 * 10**6 + seed} "
                f"--out {place}/eval.jsonl --overwrite {more}"
            )

        n = args.final_n if final else args.eval_n
        score = evaluate(n)
        texts = [r["text"] for r in read(place / "eval.jsonl", "evals")]
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "truncated": score["truncated_fraction"],
            "length_mean": score["length_mean"],
            "style_a": sum("=" in text for text in texts) / len(texts),
            "teacher_tokens": ledger["scored_tokens"],
            **ledger,
            **spread,
            "seconds": round(sum(ledger[name] for name in SECONDS), 2),
        }
        if final:
            kl = run.stage(
                f"teacher.py score --model {teacher} --rollouts {place}/eval.rollouts.jsonl "
                f"--out {place}/fresh.jsonl --overwrite"
            )["kl_mean"]
            row |= {"kl": kl, "greedy": evaluate(1, "--temperature 0")["accuracy"]}
        run.result(args, row)

    def timed(name, line):
        started = time.time()
        done = run.stage(line)
        ledger[f"{name}_seconds"] = round(ledger[f"{name}_seconds"] + time.time() - started, 3)
        return done

    def sample(number):
        """One round's worth of answers by the model of the moment, and the teacher's numbers
        for them: what train.py reads."""
        at = place / f"data{number}"
        part = (
            f"--slice "
            f"{args.sft_prompts + number * problems}:"
            f"{args.sft_prompts + (number + 1) * problems} "
            f"--max-tokens {args.max_tokens} --n 1 --seed {seed * 1000 + number}"
        )
        if a.get("more"):
            done = timed(
                "generate",
                f"teacher.py answer --model {teacher} --prompts {world}/toy/train.jsonl "
                f"{part} --out {at}/rollouts.jsonl",
            )
            ledger["generated_tokens"] += done["generated_tokens"]
            return f"{at}/rollouts.jsonl", "--method seqkd"
        done = timed(
            "generate",
            f"rollout.py --model {model} --prompts {world}/toy/train.jsonl {part} "
            f"--temperature {a.get('temperature', 1.0)} --out {at}/rollouts.jsonl",
        )
        ledger["generated_tokens"] += done["generated_tokens"]
        ledger["scored_tokens"] += timed(
            "score",
            f"teacher.py score --model {teacher} --rollouts {at}/rollouts.jsonl --out "
            f"{at}/scores.jsonl",
        )["teacher_tokens"]
        scores, more = (
            f"{at}/scores.jsonl",
            " ".join(f"--set {column}" for column in a.get("set", "").split()),
        )
        if a.get("shuffle"):
            scores = f"{at}/null.jsonl"
            run.stage(
                f"experiments.shuffle_scores --scores {at}/scores.jsonl --seed {seed} --out "
                f"{scores}"
            )
        if a.get("no_end"):
            run.stage(
                f"methods.prefix weigh --rollouts {at}/rollouts.jsonl --rule no-end --out "
                f"{at}/weights.jsonl"
            )
            more += f" --token-weights {at}/weights.jsonl"
        mismatch = "" if a["sft"] == a["teacher"] else "--allow-teacher-mismatch"
        return (
            f"{at}/rollouts.jsonl",
            f"--method lightning --scores {scores} --allow-stale {mismatch} {more}",
        )

    rate = args.sft_learning_rate if a.get("more") else args.learning_rate * a.get("rate", 1)
    if not a:
        if arm.startswith("sft-"):  # prepared with the seed: others start from it
            ledger |= json.loads((folder / f"ledger-{arm}.json").read_text())
        measure(0, True)
        return row
    measure(0, False)
    number, files, step = 0, [], 0
    for turn in progress(range(rounds), desc=f"seed {seed} {arm}", unit="round"):
        if turn % refresh == 0:
            files = []
            for _ in range(max(1, -(-refresh // reuse))):
                files.append(sample(number))
                number += 1
        rollouts, flags = files[turn % refresh % len(files)]
        out, started = place / f"model{turn}", time.time()
        done = train(
            run,
            args,
            model,
            out,
            rollouts,
            seed,
            flags + (" --fresh-optimizer" if turn == 0 else ""),
            rate,
        )
        ledger["train_seconds"] = round(ledger["train_seconds"] + time.time() - started, 3)
        ledger["trained_tokens"] += done["trained_tokens"]
        metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        spread = {
            "weight_std": metrics.get("policy/weight_std"),
            "ess": metrics.get("policy/weight_ess"),
        }
        if turn:
            shutil.rmtree(model)
        model, step = out, step + done["steps"]
        if turn + 1 < rounds and (turn + 1) % (args.eval_every * parts) == 0:
            measure(step, False)
    measure(step, True)
    return row


def prepare(run, args, world, seed):
    """This seed's folder with its student and the three fine-tuned ones."""
    folder = spoil_student(run, args, world, seed)
    for name in ("a", "b", "ab"):
        if not (folder / f"ledger-sft-{name}.json").exists():
            ledger = fine_tune(run, args, world, folder, name)
            write_atomically(folder / f"ledger-sft-{name}.json", json.dumps(ledger) + "\n")
    return folder


def main(argv=None):
    p = parser(__doc__)
    add_run_flags(p, "lightning")
    p.add_argument("--rounds", type=int, default=16, help="rounds of a distillation arm")
    p.add_argument("--prompts", type=int, default=256, help="problems a round, one answer each")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument(
        "--long", type=int, default=5, help="the arm `long` has so many times the rounds"
    )
    p.add_argument("--learning-rate", type=float, default=1e-5, help="of distillation")
    p.add_argument(
        "--sft-prompts",
        type=int,
        default=1280,
        help="problems whose answers the student is fine-tuned on",
    )
    p.add_argument("--sft-n", type=int, default=4, help="answers to each")
    p.add_argument("--sft-learning-rate", type=float, default=3e-4, help="of fine-tuning")
    p.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    p.add_argument(
        "--style-steps",
        type=int,
        default=300,
        help="steps of 64 clean texts in its own style that make each of the two teachers "
        "out of one",
    )
    add_world_flags(p, teacher_steps=2000)
    add_eval_flags(p, every=8, n=4, final_n=8)
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(args, "lightning", ARMS)
    run = begin(args, "offline on-policy distillation on running sums", arms, SHARED)
    world = build_teachers(run, args)
    run_arms(
        run,
        args,
        arms,
        lambda seed: prepare(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, KL {row['kl']:.3f}, style A "
            f"{row['style_a']:.0%}, {row['seconds']:.1f} s of stages"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    run(main)
