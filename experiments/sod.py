"""SOD (arXiv 2605.07725): agents with a tool, and a teacher that is faded at the steps that
have drifted away from it.

    python -m experiments.sod --seeds 5
    python -m experiments.sod --arms uniform,sod,shuffled,mean
    python -m experiments.sod --smoke
    python -m experiments.sod --report results/sod.jsonl

World: chains of operations to be worked out with a calculator (worlds/agents.py).  The teacher
calls rightly and knows how to go on after an error; the student has learnt the same and then
text in which three calls in ten are malformed and an error is followed by another, or by a
guess.  A fifth of all calls fail for no fault of the model's: an outage, after which the same
call again is right.  A round is 32 problems, 8 episodes each, in 4 updates:

    rollout.py --tools calculator        episodes; a tool that broke would stop the stage, so no
                                         episode holds one
    rubric.py grade --grader answer      1 for the right final answer
    teacher.py score                     the teacher's log-prob of every token, the tool's among
                                         them, which nobody looks at
    methods.sod weigh --rule ...            a weight for every step
    train.py --method sod                GRPO's advantage + weight x (log p_T - log mu), PPO's
                                         clip around the sum

    before, teacher      as they start;  before is also looked at step by step
                         (experiments.sod_drift),
                         with a placebo: results as long as an error,
                         and with signal and noise of the teacher's gradient
    sft                  imitation of as many of the teacher's episodes
    grpo                 the reward alone;  opd: the teacher alone, every step alike;
                         opd-weighted: the teacher alone, weighted as sod
    uniform              both, every step alike: what the paper calls OPD
    sod                  both, weighted: the method
    no-cap, mask, decay  its ablations: no bound; nothing after the first mistake; 0.9 to the
                         power of the steps since then
    shuffled, mean       its controls: the weights of an episode dealt out among its steps; one
                         weight everywhere, sod's mean of the round
    amount               one weight everywhere: the share of the teacher's term that sod leaves
                         of it
    batch                d measured against the mean first step of the round
    half, double         uniform with half and twice the weight of the teacher
    shaped               sod, and a wrong answer earns a little for every call, as in the
                         released code
    large-teacher, large-uniform, large-sod      a larger teacher (0.69 M weights; the other has
                                                 0.25 M, the student 0.11 M)
    calm-before, calm-uniform, calm-sod          no outages

`d_first` and `w_mean` are of the last round; `after_error` is accuracy on episodes with a
failed call.  `alarm` counts evaluations that found less than half of the calls that an arm
started with: agents that stop calling were the collapse that users of the released code met.

The learning rate was chosen on dev, one seed (`--arms sft,grpo,uniform,sod --eval-split dev
--final-n 4`, results/sod_dev_lr*.jsonl): 3e-4 is best for all four.
"""

import json
import shutil
import time

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    gap,
    imitate,
    parse,
    report,
    run_arms,
    say,
    settle,
    sod_drift,
    train_round,
)
from opd import files
from opd.stats import interval

# as the row sod has it: what differs is then the reward alone
CLIP = "clip_low=0.2 --set clip_high=0.28 --set dual_clip=3"
ARMS = {  # method and what it reads; rule: how steps are weighted
    "before": {},
    "teacher": {},
    "sft": dict(method="seqkd"),
    "grpo": dict(method="opd-grpo", set="teacher_weight=0"),
    "opd": dict(method="opd", set=CLIP, rewards=False),
    "opd-weighted": dict(
        method="opd", set=CLIP + " --set token_weight=file", rule="sod", rewards=False
    ),
    "uniform": dict(method="opd-grpo"),
    "sod": dict(rule="sod"),
    "no-cap": dict(rule="no-cap"),
    "mask": dict(rule="mask"),
    "decay": dict(rule="decay"),
    "shuffled": dict(rule="shuffled"),
    "mean": dict(rule="mean"),
    "amount": dict(rule="amount"),
    "batch": dict(rule="batch"),
    "half": dict(method="opd-grpo", set="teacher_weight=0.5"),
    "double": dict(method="opd-grpo", set="teacher_weight=2"),
    "shaped": dict(rule="sod", shape=True),
    "large-teacher": dict(large=True),
    "large-uniform": dict(method="opd-grpo", large=True),
    "large-sod": dict(rule="sod", large=True),
    "calm-before": dict(calm=True),
    "calm-uniform": dict(method="opd-grpo", calm=True),
    "calm-sod": dict(rule="sod", calm=True),
}
SHARED = (
    "rounds",
    "prompts",
    "n",
    "updates",
    "learning_rate",
    "sft_learning_rate",
    "outage",
    "max_calls",
    "max_tokens",
    "terms",
    "pad",
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
    rounds=1,
    prompts=4,
    n=2,
    updates=2,
    max_tokens=48,
    max_calls=2,
    base_steps=4,
    teacher_steps=4,
    spoil_steps=1,
    eval_every=1,
    eval_n=1,
    final_n=1,
)
COLUMNS = (
    "greedy",
    "after_error",
    "without_error",
    "calls",
    "call_errors",
    "error_episodes",
    "tool_limit",
    "truncated",
    "length_mean",
    "d_first",
    "w_mean",
    "alarm",
    "trained_tokens",
    "seconds",
)
DENSE = ("uniform", "sod", "no-cap", "mask", "decay", "shuffled", "mean", "amount", "batch")


def look(field):
    """A number that `before` was found to have by experiments.sod_drift, or the difference of
    two."""
    one, _, other = field.partition(" - ")

    def value(arms):
        # an episode without errors has nothing to say of them
        found = {name: x for name, x in arms["before"][-1]["drift"].items() if x is not None}
        return found[one] - (found[other] if other else 0)

    return value


CLAIMS = [
    Claim(
        "stage 0: after a mistake the teacher and the student are further apart",
        "d above clean episodes at the same step",
        look("mistake"),
    ),
    Claim(
        "...than after a result as long as an error (placebo)",
        "after a mistake − after a padded result",
        look("mistake - placebo"),
    ),
    Claim(
        "...also after an outage, where the student was right",
        "d above clean episodes at the same step",
        look("outage"),
    ),
    Claim(
        "...the more the longer the error is",
        "correlation of length and d above clean",
        look("length_correlation"),
    ),
    Claim(
        "...and come back after a recovery",
        "after a recovery − after a mistake",
        look("recovery - mistake"),
        "below",
    ),
    Claim(
        "...the teacher itself is unsure after a mistake",
        "change of its entropy − after a result",
        look("mistake_entropy - result_entropy"),
    ),
    Claim(
        "d is larger at mistakes, where it is the student who is wrong",
        "d(mistakes) − d(calls with results)",
        look("d_mistake - d_result"),
    ),
    Claim(
        "where the next call is right, too, d is larger after a mistake than after a result",
        "d of calls with results, after a mistake − after a result",
        look("way_mistake_result - way_result_result"),
    ),
    Claim(
        "the teacher's gradient has less signal to noise after a mistake (Prop. 2)",
        "snr of calls after a mistake − after a result",
        look("snr_after_mistake - snr_after_result"),
        "below",
    ),
    Claim(
        "...and at a mistake",
        "snr of mistakes − of calls with results",
        look("snr_at_mistake - snr_at_result"),
        "below",
    ),
    Claim(
        "step weights make an episode's gradient smaller (Prop. 3 bounds it)",
        "squared norm of the gradient, sod / uniform",
        look("size_sod"),
        "below",
        1,
    ),
    Claim(
        "...and its signal to noise larger, which is what for",
        "snr of an episode's gradient, sod − uniform",
        look("snr_sod - snr_uniform"),
    ),
    Claim(
        "...more than the same weights shuffled",
        "snr(sod) − snr(shuffled)",
        look("snr_sod - snr_shuffled"),
    ),
    Claim(
        "step weights leave as much of the teacher in episodes with a quiet first step",
        "share left in the quieter half − in all",
        look("left_quiet_sod - left_sod"),
        "within",
        0.05,
    ),
    Claim(
        "...held against the file's mean first step they do",
        "the same of batch",
        look("left_quiet_batch - left_batch"),
        "within",
        0.05,
    ),
    Claim("step weights help (the paper's claim)", "sod − uniform", gap("sod", "uniform")),
    Claim("...without the reward, too", "opd-weighted − opd", gap("opd-weighted", "opd")),
    Claim(
        "...on episodes with a failed call",
        "after_error(sod) − after_error(uniform)",
        gap("sod", "uniform", "after_error"),
    ),
    Claim("it is the steps: shuffled weights lose", "sod − shuffled", gap("sod", "shuffled")),
    Claim(
        "it is not only a smaller coefficient: one weight everywhere loses",
        "sod − mean",
        gap("sod", "mean"),
    ),
    Claim(
        "nor only less of the teacher: as little of it everywhere loses",
        "sod − amount",
        gap("sod", "amount"),
    ),
    Claim(
        "one weight everywhere is as good as none",
        "mean − uniform",
        gap("mean", "uniform"),
        "within",
        0.03,
    ),
    Claim(
        "...even if it leaves as little as sod does",
        "amount − uniform",
        gap("amount", "uniform"),
        "within",
        0.03,
    ),
    Claim(
        "masking all that follows an error is the worst of the dense arms",
        "mask − lowest other",
        lambda a: (
            gap("mask", "before")(a) - min(gap(x, "before")(a) for x in DENSE if x != "mask")
        ),
        "below",
    ),
    Claim("the bound helps", "sod − no-cap", gap("sod", "no-cap")),
    Claim("decay is below sod", "sod − decay", gap("sod", "decay")),
    Claim(
        "a batch's first step serves as well as an episode's own",
        "batch − sod",
        gap("batch", "sod"),
        "within",
        0.03,
    ),
    Claim(
        "...and as uniform weights", "batch − uniform", gap("batch", "uniform"), "within", 0.03
    ),
    Claim("weighted, the teacher adds to the reward", "sod − grpo", gap("sod", "grpo")),
    Claim("uniform, it does", "uniform − grpo", gap("uniform", "grpo")),
    Claim("the reward adds to the teacher", "uniform − opd", gap("uniform", "opd")),
    Claim("the method beats imitation", "sod − sft", gap("sod", "sft")),
    Claim("...and so do uniform weights", "uniform − sft", gap("uniform", "sft")),
    Claim(
        "greedily decoded, too, sod is better than the student",
        "greedy(sod) − greedy(before)",
        gap("sod", "before", "greedy"),
    ),
    Claim(
        "...and uniform", "greedy(uniform) − greedy(before)", gap("uniform", "before", "greedy")
    ),
    Claim(
        "paying for calls adds calls",
        "calls(shaped) − calls(sod)",
        gap("shaped", "sod", "calls"),
    ),
    Claim("...and no accuracy", "shaped − sod", gap("shaped", "sod"), "below", 0.02),
    Claim(
        "a larger teacher hurts uniform weights more",
        "(large-uniform − uniform) − (large-sod − sod)",
        lambda a: gap("large-uniform", "uniform")(a) - gap("large-sod", "sod")(a),
        "below",
    ),
    Claim(
        "without outages there is no gap",
        "calm-sod − calm-uniform",
        gap("calm-sod", "calm-uniform"),
        "within",
        0.03,
    ),
    Claim(
        "sod's agent goes on calling",
        "calls(sod) / calls(before)",
        lambda a: a["sod"][-1]["calls"] / max(a["before"][-1]["calls"], 1e-9),
        "above",
        0.5,
    ),
]


# what came of a step
STEPS = {
    "result": "call with a result",
    "mistake": "mistake",
    "outage": "call into an outage",
    "answer": "answer",
}
BEFORE = {
    "start": "first call",
    "result": "call after a result",
    "mistake": "call after a mistake",
    "outage": "call after an outage",
    "recovery": "call after a recovery",
}
WEIGHED = ("uniform", "sod", "no-cap", "mask", "decay", "shuffled", "mean", "amount", "batch")


def look_table(path):
    """Markdown: the numbers of stage 0, mean over seeds ± half of the 95 % t-interval."""
    seen = {}
    for row in files.read(path, "results"):
        for name, x in row.get("drift", {}).items():
            seen.setdefault(name, []).extend([] if x is None else [x])

    def show(name, digits=3):
        mean, half = interval(seen[name]) if seen.get(name) else (None, None)
        return (
            ""
            if mean is None
            else f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")
        )

    lines = [
        "| step | d | d, after a result | d, after a mistake | the teacher's entropy | "
        "signal to noise |",
        "| --- |" + " --- |" * 5,
    ]
    lines += [
        f"| {words} | {show(f'd_{name}')} | {show(f'way_result_{name}')} | "
        f"{show(f'way_mistake_{name}')} | {show(f'entropy_{name}')} | "
        f"{show(f'snr_at_{name}', 4)} |"
        for name, words in STEPS.items()
    ]
    lines += [
        f"| {words} | | | | | {show(f'snr_after_{name}', 4)} |"
        for name, words in BEFORE.items()
    ]
    lines += [
        "",
        "| rule | left of the teacher's term | in the half of the episodes with the smaller "
        "d_1 | squared norm of an episode's gradient, of uniform's | its signal to "
        "noise |",
        "| --- |" + " --- |" * 4,
    ]
    lines += [
        f"| {rule} | {show(f'left_{rule}', 2)} | {show(f'left_quiet_{rule}', 2)} | "
        f"{show(f'size_{rule}', 2)} | {show(f'snr_{rule}', 4)} |"
        for rule in WEIGHED
    ]
    return "\n".join(lines) + (
        f"\n\nd_1: mean {show('d_first')}, median {show('d_first_median')}; an error's "
        f"text has {show('mistake_length', 0)} tokens, a padded result "
        f"{show('placebo_length', 0)}.\n"
    )


def build(run, args, arms):
    """Problems, corpora, the teachers, and the base model that every seed's student is made
    from."""
    world, texts = run.out / "world", 64 * args.base_steps
    if not (world / "toy").exists():
        run.stage(
            f"worlds.agents --terms {args.terms} --out {world}/toy --train-prompts "
            f"{args.prompts * args.rounds} --clean {texts} --mixed "
            f"{64 * args.spoil_steps} --outage {args.outage} --eval-prompts "
            f"{8 if args.smoke else 200}"
        )
    for name, source, steps, out in (
        ("student", "student", args.base_steps, "base"),
        ("teacher", "teacher", args.teacher_steps, "teacher"),
        ("large teacher", "large", args.teacher_steps, "large"),
    ):
        if out == "large" and not any(ARMS[arm].get("large") for arm in arms):
            continue
        if not (world / out).exists():
            say(f"pre-training the {name}: {steps} steps of 64 episodes")
        imitate(
            run,
            world / "toy" / source,
            world / "toy" / "clean.jsonl",
            steps,
            4e-3,
            0,
            world / out,
            "--warmup-steps 20 --schedule linear --save-every 200",
        )
    return world


def prepare(run, args, world, seed):
    folder = run.out / f"seed{seed}"
    imitate(
        run,
        world / "base",
        world / "toy" / "mixed.jsonl",
        args.spoil_steps,
        args.spoil_lr,
        seed,
        folder / "student",
        "--fresh-optimizer",
    )
    return folder


def tools(args, calm=False, **options):
    """The flags of rollout.py that give an agent its calculator."""
    options = ({} if calm else {"outage": args.outage}) | options
    return (
        f"--tools calculator --call-format brackets --max-calls {args.max_calls} "
        f"--max-tokens {args.max_tokens} --tool-options '{json.dumps(options)}'"
    )


def look_at(run, args, world, folder, seed):
    """Stage 0: what experiments.sod_drift finds in the student's own episodes, and with results
    padded to an error's length."""
    found = {}
    for name, options in (("plain", {}), ("placebo", {"pad": args.pad})):
        at = folder / "drift" / name
        run.stage(
            f"rollout.py --model {folder}/student --prompts "
            f"{world}/toy/{args.eval_split}.jsonl --n {args.eval_n} --seed {seed} "
            f"{tools(args, **options)} --out {at}/rollouts.jsonl"
        )
        run.stage(
            f"teacher.py score --model {world}/teacher --rollouts {at}/rollouts.jsonl "
            f"--top-k 1000 --out {at}/scores.jsonl"
        )
        found[name] = run.stage(
            f"experiments.sod_drift --rollouts {at}/rollouts.jsonl --scores "
            f"{at}/scores.jsonl --out "
            f"{at}/drift.json --plot {at}/drift.png --overwrite"
            + (
                f" --against {folder}/drift/plain/drift.json"
                if name == "placebo"
                else f" --model {folder}/student"
            )
        )
    plain, after = found["plain"], found["plain"]["after"]
    seen = {event: after[event]["above"] for event in ("mistake", "outage", "recovery")} | {
        "placebo": found["placebo"]["after"]["result"]["above"]
    }
    seen |= {
        "length_correlation": after["mistake"]["length_correlation"],
        "mistake_length": after["mistake"]["length"],
        "placebo_length": found["placebo"]["after"]["result"]["length"],
    }
    seen |= {
        f"{event}_entropy": after[event]["entropy_change"]
        for event in ("mistake", "outage", "result")
    }
    seen |= {"d_first": plain["first"]["mean"], "d_first_median": plain["first"]["median"]}
    for name in STEPS:
        seen |= {
            f"d_{name}": plain["by_outcome"].get(name),
            f"entropy_{name}": plain["entropy_by_outcome"].get(name),
            f"snr_at_{name}": plain["gradient"]["outcome"].get(name, {}).get("snr"),
        }
        seen |= {
            f"way_{before}_{name}": plain["ways"].get(before, {}).get(name, {}).get("mean")
            for before in sod_drift.EVENTS
        }
    seen |= {
        f"snr_after_{name}": plain["gradient"]["after"].get(name, {}).get("snr")
        for name in BEFORE
    }
    rules = plain["gradient"]["rule"]
    seen |= {f"snr_{rule}": numbers["snr"] for rule, numbers in rules.items()}
    seen |= {
        f"size_{rule}": (x["signal"] + x["noise"])
        / (rules["uniform"]["signal"] + rules["uniform"]["noise"])
        for rule, x in rules.items()
        if x["noise"]
    }
    return seen | {
        f"{name}_{rule}": x
        for name in ("left", "left_quiet")
        for rule, x in plain[name].items()
    }


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    teacher, prompts, calm = (
        world / ("large" if a.get("large") else "teacher"),
        world / "toy" / "train.jsonl",
        a.get("calm", False),
    )
    method = a.get("method", "sod" if "rule" in a else None)
    model = student = teacher if arm in ("teacher", "large-teacher") else folder / "student"
    row, signal, started, calls, alarm = None, {}, time.time(), None, 0
    cost = {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0}
    drift = {"drift": look_at(run, args, world, folder, seed)} if arm == "before" else {}

    def measure(step, final):
        nonlocal row, calls, alarm
        spent = round(time.time() - started, 2)

        def evaluate(n, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {world}/toy/{args.eval_split}.jsonl --n "
                f"{n} {tools(args, calm)} --seed {2 * 10**6 + seed} --out "
                f"{place}/eval.jsonl --overwrite {more}"
            )

        n = args.final_n if final else args.eval_n
        score = evaluate(n)
        calls = score["calls"] if calls is None else calls
        alarm += score["calls"] < calls / 2
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "after_error": score["accuracy_after_error"],
            "without_error": score["accuracy_without_error"],
            **{
                name: score[name]
                for name in (
                    "calls",
                    "call_errors",
                    "error_episodes",
                    "tool_limit",
                    "length_mean",
                )
            },
            "truncated": score["truncated_fraction"],
            "alarm": alarm,
            **signal,
            **drift,
            **cost,
            "seconds": spent,
        }
        if final:
            row["greedy"] = evaluate(1, "--temperature 0")["accuracy"]
        run.result(args, {name: value for name, value in row.items() if value is not None})

    measure(0, not method)
    if not method:
        return row
    for number in files.progress(range(args.rounds), desc=f"seed {seed} {arm}", unit="round"):
        at = place / f"round{number}"
        part = (
            f"--prompts {prompts} --slice "
            f"{number * args.prompts}:{(number + 1) * args.prompts} --n {args.n} "
            f"--seed {seed * 1000 + number} {tools(args, calm)} --out "
            f"{at}/rollouts.jsonl"
        )
        rollouts, flags, rate = f"--rollouts {at}/rollouts.jsonl", "", args.learning_rate
        if method == "seqkd":
            cost["teacher_tokens"] += run.stage(f"teacher.py answer --model {teacher} {part}")[
                "generated_tokens"
            ]
            rate = args.sft_learning_rate
        else:
            cost["generated_tokens"] += run.stage(f"rollout.py --model {model} {part}")[
                "generated_tokens"
            ]
            scored = run.stage(
                f"teacher.py score --model {teacher} {rollouts} --out {at}/scores.jsonl"
            )
            cost["teacher_tokens"] += scored["teacher_tokens"]
            flags = f"--scores {at}/scores.jsonl"
            if a.get("rewards", True):
                run.stage(
                    f"rubric.py grade --grader answer --prompts {prompts} {rollouts} --out "
                    f"{at}/rewards.jsonl" + " --shape-calls" * a.get("shape", False)
                )
                flags += f" --rewards {at}/rewards.jsonl"
            if "rule" in a:
                weights = run.stage(
                    f"methods.sod weigh {rollouts} --scores {at}/scores.jsonl --rule "
                    f"{a['rule']} --seed {seed * 1000 + number} --out "
                    f"{at}/weights.jsonl"
                )
                signal = {
                    name: weights[name] for name in ("d_first", "w_mean", "w_low", "w_bound")
                }
                flags += f" --token-weights {at}/weights.jsonl"
        model, done = train_round(
            run,
            args,
            method,
            model,
            student,
            at,
            seed,
            rate,
            flags + (f" --set {a['set']}" if "set" in a else ""),
            first=number == 0,
        )
        cost["trained_tokens"] += done["trained_tokens"]
        if number + 1 == args.rounds or (number + 1) % args.eval_every == 0:
            measure((number + 1) * args.updates, number + 1 == args.rounds)
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "sod")
    p.add_argument("--rounds", type=int, default=15, help="rounds of an arm")
    p.add_argument("--prompts", type=int, default=32, help="problems a round")
    p.add_argument("--n", type=int, default=8, help="episodes a problem")
    p.add_argument(
        "--updates",
        type=int,
        default=4,
        help="optimiser steps a round, as in the released scripts",
    )
    p.add_argument("--learning-rate", type=float, default=3e-4, help="of all arms but sft")
    p.add_argument("--sft-learning-rate", type=float, default=3e-4, help="of imitation")
    p.add_argument(
        "--outage",
        type=float,
        default=0.2,
        help="share of calls that fail without being wrong, but in the calm arms",
    )
    p.add_argument("--terms", default="2:4", help="fewest and most operations of a problem")
    p.add_argument(
        "--pad",
        type=int,
        default=45,
        help="placebo: characters of a padded result, about those of an error",
    )
    p.add_argument("--max-calls", type=int, default=10, help="calls of an episode")
    p.add_argument(
        "--max-tokens", type=int, default=256, help="longest episode, with the tool's text"
    )
    p.add_argument(
        "--base-steps",
        type=int,
        default=900,
        help="pre-training steps of 64 right episodes of the student",
    )
    p.add_argument("--teacher-steps", type=int, default=1500, help="of the teachers")
    p.add_argument(
        "--spoil-steps",
        type=int,
        default=100,
        help="steps of 64 careless episodes for a student",
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")
    add_eval_flags(p, every=5, n=2, final_n=8)
    if not (args := parse(p, argv, CLAIMS, SMOKE, more=look_table)):
        return None
    arms = settle(args, "sod", ARMS)
    run = begin(args, "agents with a calculator", arms, SHARED)
    world = build(run, args, arms)
    run_arms(
        run,
        args,
        arms,
        lambda seed: prepare(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, {row['calls']:.2f} calls an "
            f"episode, {row['call_errors']:.0%} of them failed"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS, more=look_table)


if __name__ == "__main__":
    files.run(main)
