"""Stage 3: rubrics from contrasts, rewards from rubrics.  The heart of ROPD (arXiv 2605.07396).

    python rubric.py create --prompts P --answers A --rollouts R --out rubrics.jsonl
    python rubric.py grade  --prompts P --rubrics rubrics.jsonl --rollouts R --out rewards.jsonl
    python rubric.py create --rubricator llm --model M --base-url http://localhost:8000/v1
    --prompts P --answers A --rollouts R --out C
    python rubric.py grade  --grader judge   --model M --base-url http://localhost:8000/v1
                                             --prompts P --answers A --rubrics C --rollouts R
                                             --out W

`create` (section 3, eq. 2) looks at all m teacher answers and all n rollouts of a prompt and
writes ONE rubric that the whole group shares: 4-12 criteria, each a merit that can be answered
yes or no, with 1-5 points. `grade` (eq. 3-5) asks every criterion of every rollout and pays the
weighted pass rate:

    reward_i = sum_k points_k verdict_ik / sum_k points_k              in [0, 1], always
    computed here from the verdicts

    points (5, 2, 1), verdicts (yes, no, yes)  ->  reward 6/8 = 0.75

Rubricators: `contrast` needs no model.  It mines a library of predicates for those that the
teacher's answers pass and the rollouts fail; most of the library are decoys (length, layout,
opening), so a rubric can be led astray by style.  It never sees the `answer` field, but one
predicate, `total_right`, redoes the sum of the question: an examiner who can do the task.
`--without total_right` takes that one away.  `llm` asks a served model (opd/judge.py). Graders:
`check` evaluates the predicates; `judge` asks a served model, with --answers the teacher's in
the same anonymous pool; `scalar` is the baseline without a rubric (one holistic 0-10 score);
`answer` compares final answers (it reads `answer`; with --ledger it writes down which labels it
spent on what, methods/sparse_to_dense.py); `discriminator` takes the score of a trained one
(methods/gad.py), any number, and with --answers tells how often it scores them above the
rollouts.

A judgement that fails is null, never zero, never cached; train.py drops its group.  More than
--max-failure-rate of them stop the stage.  Run it again to ask only for what failed.

Simplifications: 1. rubrics are shared by a group, never per rollout; 2. `contrast` cannot tell
format from merit, so the paper's cap of 1 point on cosmetic criteria is not applied; 3. without
a server `scalar` is a stand-in: general properties of the same library, one vote each, plus a
taste for length, rounded to 0-10, with the --verifier-noise of `check`.
"""

import hashlib
from pathlib import Path

import numpy as np

from methods import sparse_to_dense
from methods.gad import load_scorer, verdicts
from opd import files, judge, records, served
from opd.answers import is_correct, question_of
from opd.batches import answer_ids
from opd.policy import check_tokens
from opd.records import BadInput
from worlds.predicates import CHECKS, MERITS, Check, passes


def one_piece(rollout, path):
    """The rollout; raises BadInput for an episode with tools: a criterion could be met by a
    tool's words, and a tool could speak to the judge."""
    if len(rollout.get("steps", ())) > 1:
        raise BadInput(
            f"{path}: id {rollout['id']!r}: steps: expected an answer in one piece, got an "
            f"episode with tools: rubrics and judges would read the tools' words "
            f"as the model's; "
            "use --grader answer or discriminator"
        )
    return rollout


def outcome(rollout, answer, shape=False):
    """1 for a right final answer, else 0; shape: a wrong one earns 0.05 a tool call, at most
    0.2, as in SOD's released code (there -1 to -0.6 of +-1)."""
    if is_correct(records.final_text(rollout), answer):
        return 1.0
    return min(0.2, 0.05 * len(rollout.get("calls", ()))) if shape else 0.0


# ---- create


def contrast(question, references, attempts, flat=False, without=(), most=8):
    """A rubric by contrast, or None when fewer than 4 predicates hold for the teacher.

    A predicate qualifies when at least 3/4 of the teacher's answers pass it.  They are ranked
    by the gap between the teacher's and the students' pass rate; ties are broken by a hash, not
    by the library's order.  Points follow the gap as ROPD's prompt asks: 5 for the decisive
    bottleneck and 4 for a second strong discriminator (gap >= 1/2), 2 for supporting merits
    (gap >= 1/5), 1 for what nearly everyone passes.  flat: 3 points for all; without: names to
    leave out.

    references ["7+5=12\\n#12"] * 4, attempts ["#11", "#13"] on "7+5=?" put `total_right` (gap
    1) among the first."""
    found = []
    for name in CHECKS.keys() - set(without):
        for arguments in CHECKS[name].propose(references):
            teacher = np.mean([passes([name, *arguments], question, t) for t in references])
            student = np.mean([passes([name, *arguments], question, t) for t in attempts])
            if teacher >= 0.75:
                tie = hashlib.sha256(f"{question}|{name}".encode()).hexdigest()
                found.append((-(teacher - student), tie, name, arguments))
    found.sort()
    kept = [f for f in found if f[0] < 0][:most]
    kept += [f for f in found if f[0] >= 0][: max(0, 4 - len(kept))]
    if len(kept) < 4:
        return None
    criteria = []
    for rank, (minus_gap, _, name, arguments) in enumerate(kept):
        gap = -minus_gap
        points = 5 - rank if rank < 2 and gap >= 0.5 else 2 if gap >= 0.2 else 1
        criteria.append(
            {
                "id": f"c{rank + 1}",
                "category": CHECKS[name].category,
                "criterion": CHECKS[name].criterion.format(*arguments),
                "points": 3 if flat else points,
                "check": [name, *arguments],
                "gap": round(float(gap), 3),
            }
        )
    return criteria


def by_prompt(path, kind, limit=None):
    """{prompt id: [(text, fingerprint) in sample order]}, at most `limit` a prompt."""
    found = {}
    for r in files.read(path, kind):
        found.setdefault(str(r["id"]), []).append(
            (r["sample"], one_piece(r, path)["text"], records.fingerprint(r))
        )
    return {
        key: [(text, mark) for _, text, mark in sorted(triples)][:limit]
        for key, triples in found.items()
    }


def texts(pairs):
    return [text for text, _ in pairs]


def create(argv):
    p = files.parser(__doc__)
    p.add_argument("--prompts", required=True, help="JSONL of prompts")
    p.add_argument("--answers", required=True, help="JSONL of teacher answers")
    p.add_argument(
        "--rollouts",
        required=True,
        help="JSONL of the student's rollouts; prompts without rollouts get no rubric",
    )
    p.add_argument(
        "--out", required=True, help="JSONL to write; run again to complete an interrupted file"
    )
    p.add_argument(
        "--rubricator",
        default="contrast",
        choices=("contrast", "llm"),
        help="predicate mining, or a served model",
    )
    p.add_argument(
        "--m",
        type=int,
        default=4,
        help="teacher answers a prompt to draw the rubric from; 1 anchors it to one style",
    )
    p.add_argument(
        "--flat-points",
        action="store_true",
        help="contrast: the same points for all criteria, decisive or not",
    )
    p.add_argument(
        "--without",
        default="",
        metavar="NAME,...",
        help="contrast: predicates to leave out of the library",
    )
    add_judge_flags(p, temperature=0.7, max_tokens=8192)
    args = p.parse_args(argv)
    prompts = {str(r["id"]): r for r in files.read(args.prompts, "prompts")}
    answers, attempts = (
        by_prompt(args.answers, "answers", args.m),
        by_prompt(args.rollouts, "rollouts"),
    )
    for key in attempts:
        if key not in prompts:
            raise BadInput(
                f"{args.prompts}: expected a prompt with id {key!r}, of which "
                f"{args.rollouts} has rollouts, but there is none"
            )
        if len(answers.get(key, ())) < args.m:
            raise BadInput(
                f"{args.answers}: expected {args.m} answers (--m) to prompt {key!r}, got "
                f"{len(answers.get(key, ()))}"
            )
    without = [name for name in args.without.split(",") if name]
    if unknown := set(without) - CHECKS.keys():
        raise BadInput(
            f"--without: expected some of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}"
        )
    if (args.flat_points or without) and args.rubricator != "contrast":
        raise BadInput("--flat-points and --without go with --rubricator contrast")
    settings = {
        "rubricator": args.rubricator,
        "m": args.m,
        "flat_points": args.flat_points,
        "without": without,
    } | judge_settings(args)
    failures = []
    with files.Writer(
        args.out,
        "rubrics",
        settings,
        [args.prompts, args.answers, args.rollouts],
        args.overwrite,
    ) as writer:
        todo = [key for key in attempts if (key,) not in writer]
        if args.rubricator == "contrast":
            results = (
                (
                    key,
                    contrast(
                        question_of(prompts[key]),
                        texts(answers[key]),
                        texts(attempts[key]),
                        args.flat_points,
                        without,
                    ),
                )
                for key in todo
            )
            name = "contrast"
        else:
            server, cache, name = served_judge(args)
            results = server.map(
                lambda key: attempt(
                    judge.propose_rubric,
                    server,
                    question_of(prompts[key]),
                    texts(answers[key]),
                    texts(attempts[key]),
                    **judge_options(args, cache),
                ),
                todo,
            )
        for key, criteria in files.progress(results, total=len(todo), desc=Path(args.out).name):
            if criteria is None or isinstance(criteria, Exception):
                failures.append(
                    criteria or "fewer than 4 predicates hold for the teacher's answers"
                )
                served.stop_if_failing(failures, len(writer.done), len(attempts), args, ADVICE)
                continue
            writer.write(
                {
                    "id": prompts[key]["id"],
                    "criteria": criteria,
                    "rubricator": name,
                    "drawn_from": {
                        "answers": [mark for _, mark in answers[key]],
                        "rollouts": [mark for _, mark in attempts[key]],
                    },
                }
            )
        made = len(writer.done)
    rubrics = list(files.read(args.out, "rubrics")) if made else []
    summary = {
        "out": args.out,
        "records": made,
        "failed": len(failures),
        "criteria_mean": float(np.mean([len(r["criteria"]) for r in rubrics])) if made else 0.0,
        "decisive": sum(max(c["points"] for c in r["criteria"]) >= 4 for r in rubrics)
        / max(1, made),
        "distinct_answers": float(
            np.mean([len(set(r["drawn_from"]["answers"])) for r in rubrics])
        )
        if made
        else 0.0,
    }
    print(
        f"rubric.py create: {args.out}: {made} rubrics by {name}, "
        f"{summary['criteria_mean']:.1f} criteria each, "
        f"{summary['decisive']:.0%} with a decisive one, from "
        f"{summary['distinct_answers']:.1f} distinct answers each, {len(failures)} "
        f"failed"
    )
    return summary


# ---- grade


def pass_rate(points, verdicts):
    """Eq. 4: pass_rate([5, 2, 1], [True, False, True]) -> 0.75."""
    return sum(w for w, v in zip(points, verdicts) if v) / sum(points)


def noisy(verdict, rate, *names):
    """The verdict, flipped with probability `rate`: a stand-in for an unreliable verifier,
    fixed by the names."""
    if (
        rate
        and int.from_bytes(
            hashlib.sha256("|".join(map(str, names)).encode()).digest()[:6], "big"
        )
        / 2**48
        < rate
    ):
        return not verdict
    return verdict


def impression(question, text, view, noise, *names):
    """The rubric-free judge of the embedded world, 0-10 over 10: one vote for every general
    property, plus up to two points for length, a known taste of such judges.  view "all": the
    whole library, merit or mere style, for it has no contrast to tell them apart; "merits": a
    judge that knows what is merit."""
    general = [
        name
        for name, check in (CHECKS if view == "all" else MERITS).items()
        if check.propose is Check.propose
    ]
    votes = sum(noisy(passes([name], question, text), noise, *names, name) for name in general)
    return round(8 * votes / len(general) + 2 * min(1.0, len(text) / 40)) / 10


def grade(argv):
    p = files.parser(__doc__)
    p.add_argument(
        "--prompts",
        required=True,
        help="JSONL of prompts (the question; `answer` is read by --grader answer only)",
    )
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts to grade")
    p.add_argument(
        "--out",
        required=True,
        help="JSONL to write; run again for what is missing or has failed",
    )
    p.add_argument(
        "--grader",
        default="check",
        choices=("check", "judge", "scalar", "answer", "discriminator"),
        help="see above",
    )
    p.add_argument(
        "--discriminator",
        metavar="FOLDER",
        help="discriminator: the model whose score is the reward (train.py --method "
        "discriminator)",
    )
    p.add_argument("--rubrics", help="JSONL of rubrics (check, judge)")
    p.add_argument(
        "--answers",
        help="JSONL of teacher answers: the judge sees them in the same anonymous pool; "
        "logged, never in the reward",
    )
    p.add_argument(
        "--mode",
        default="batch",
        choices=("batch", "single"),
        help="judge: one call a prompt, or one a response (calmer, dearer)",
    )
    p.add_argument(
        "--verifier-noise",
        type=float,
        default=0.0,
        help="check, scalar without server: flip verdicts at this rate",
    )
    p.add_argument(
        "--scalar-view",
        default="all",
        choices=("all", "merits"),
        help="scalar without server: properties it votes on",
    )
    p.add_argument(
        "--frozen-rubrics",
        action="store_true",
        help="accept rubrics that were drawn from other rollouts than these",
    )
    p.add_argument(
        "--shuffle",
        action="store_true",
        help="null control: deal each group's rewards out among its rollouts at random",
    )
    p.add_argument(
        "--shape-calls",
        action="store_true",
        help="answer: a wrong answer earns a little for every tool call, as in SOD's "
        "released code: pays for calling, not for being right",
    )
    p.add_argument(
        "--ledger",
        metavar="FILE",
        help="answer: JSONL that keeps which labels were spent on what; a label that was "
        "spent on something else is refused",
    )
    p.add_argument(
        "--spend",
        metavar="PURPOSE",
        help="answer, with --ledger: what these labels are spent on, a name like teacher-rl",
    )
    p.add_argument(
        "--spend-again",
        action="store_true",
        help="answer, with --ledger: take labels that were spent on something else, and "
        "write that down",
    )
    add_judge_flags(p, temperature=0.0, max_tokens=4096)
    args = p.parse_args(argv)
    if (
        bool(args.ledger) != bool(args.spend)
        or (args.spend_again and not args.ledger)
        or (args.ledger and args.grader != "answer")
    ):
        raise BadInput(
            "--ledger, --spend: expected both, with --grader answer, and --spend-again only "
            "beside them: only that grader spends labels"
        )
    if args.shape_calls and args.grader != "answer":
        raise BadInput(f"--shape-calls: goes with --grader answer, got {args.grader}")
    needs_rubric = args.grader in ("check", "judge")
    if needs_rubric != bool(args.rubrics):
        raise BadInput(
            f"--grader {args.grader}: expected "
            f"{'--rubrics FILE' if needs_rubric else 'no --rubrics'}"
        )
    if args.verifier_noise and (args.grader in ("judge", "answer") or args.base_url):
        raise BadInput("--verifier-noise: goes with --grader check or scalar, without a server")
    prompts = {str(r["id"]): r for r in files.read(args.prompts, "prompts")}
    rubrics = (
        {str(r["id"]): r for r in files.read(args.rubrics, "rubrics")} if args.rubrics else {}
    )
    # a discriminator reads their tokens
    pool = by_prompt(args.answers, "answers") if args.answers and not args.discriminator else {}
    groups = {}
    rollouts = files.Table(args.rollouts, "rollouts")
    for key in rollouts.keys():
        if key[0] not in prompts:
            raise BadInput(
                f"{rollouts.where(key)}: id: expected one of the ids in {args.prompts}, got "
                f"{key[0]!r}"
            )
        if args.grader == "answer" and "answer" not in prompts[key[0]]:
            raise BadInput(
                f"{args.prompts}: answer: --grader answer needs it for prompt {key[0]!r}, "
                f"but the field is missing"
            )
        groups.setdefault(key[0], []).append(key)
    # before one is read
    spent = (
        sparse_to_dense.spend(
            args.ledger, [prompts[i] for i in groups], args.spend, args.spend_again
        )
        if args.ledger
        else {}
    )
    if (args.grader == "discriminator") != bool(args.discriminator):
        wanted = (
            "--discriminator FOLDER" if args.grader == "discriminator" else "no --discriminator"
        )
        raise BadInput(f"--grader {args.grader}: expected {wanted}")
    scorer = Discriminator(args, rollouts, groups) if args.discriminator else None
    server = cache = None
    name = (
        f"discriminator {scorer.weights}"
        if scorer
        else args.grader
        if args.grader != "scalar" or args.base_url
        else "scalar stand-in"
    )
    if args.grader == "judge" or args.base_url:
        if args.grader not in ("judge", "scalar"):
            raise BadInput(f"--base-url: goes with --grader judge or scalar, not {args.grader}")
        server, cache, name = served_judge(args)

    # ROPD draws a new rubric for every prompt at every step
    for prompt_id, keys in groups.items():
        made_for = rubrics.get(prompt_id, {}).get("drawn_from", {}).get("rollouts")
        if (
            made_for is not None
            and not args.frozen_rubrics
            and set(made_for) != {records.fingerprint(rollouts[key]) for key in keys}
        ):
            raise BadInput(
                f"{args.rubrics}: id {prompt_id!r}: drawn_from: expected the rollouts of "
                f"{args.rollouts}, but the rubric was drawn from "
                "others: run rubric.py create for these, or --frozen-rubrics if it is meant"
            )

    def grade_group(prompt_id):
        """[(reward or None, verdicts or the reason of a failure)] for the group's rollouts, and
        the teacher's rewards."""
        if args.grader == "answer":
            return [
                (outcome(rollouts[key], prompts[prompt_id]["answer"], args.shape_calls), None)
                for key in groups[prompt_id]
            ], []
        if scorer:
            return [(score, None) for score in scorer.judge(prompt_id)], []
        question, mine = (
            question_of(prompts[prompt_id]),
            [one_piece(rollouts[key], args.rollouts)["text"] for key in groups[prompt_id]],
        )
        if args.grader == "scalar":

            def one(key, text):
                if server:
                    return attempt(
                        judge.holistic, server, question, text, **judge_options(args, cache)
                    )
                return impression(
                    question, text, args.scalar_view, args.verifier_noise, args.seed, key
                )

            values = [one(key, t) for key, t in zip(groups[prompt_id], mine)]
            return [
                (None, str(v)) if isinstance(v, Exception) else (v, None) for v in values
            ], []
        if prompt_id not in rubrics:
            return [(None, "no rubric for this prompt")] * len(mine), []
        criteria, teachers = rubrics[prompt_id]["criteria"], texts(pool.get(prompt_id, []))
        points = [c["points"] for c in criteria]
        if args.grader == "check":
            if any("check" not in c for c in criteria):
                raise BadInput(
                    f"{args.rubrics}: id {prompt_id!r}: check: expected a predicate in every "
                    f"criterion, but the field is missing: "
                    "a rubric written by a model is graded with --grader judge"
                )
            verdicts = [
                [
                    noisy(
                        passes(c["check"], question, t),
                        args.verifier_noise,
                        args.seed,
                        key,
                        c["id"],
                    )
                    for c in criteria
                ]
                for key, t in zip(
                    groups[prompt_id]
                    + [(prompt_id, "teacher", i) for i in range(len(teachers))],
                    mine + teachers,
                )
            ]
        else:
            verdicts = attempt(
                judge.verify,
                server,
                question,
                criteria,
                mine + teachers,
                mode=args.mode,
                seed=args.seed,
                **judge_options(args, cache),
            )
            if isinstance(verdicts, Exception):
                return [(None, str(verdicts))] * len(mine), []
        scores = [None if isinstance(v, Exception) else pass_rate(points, v) for v in verdicts]
        return (
            [
                (s, v if s is not None else str(v))
                for s, v in zip(scores[: len(mine)], verdicts)
            ],
            [s for s in scores[len(mine) :] if s is not None],
        )

    name += ", shuffled" if args.shuffle else ""
    settings = (
        {
            "grader": name,
            "mode": args.mode,
            "noise": args.verifier_noise,
            "view": args.scalar_view,
            "seed": args.seed,
        }
        | judge_settings(args)
        | ({"shape_calls": True} if args.shape_calls else {})
    )
    failures, teacher_scores, beaten = [], [], []
    inputs = [f for f in (args.prompts, args.rubrics, args.rollouts, args.answers) if f]
    with files.Writer(
        args.out,
        "rewards",
        settings,
        inputs,
        args.overwrite,
        retry=lambda r: r["status"] == "failed",
    ) as writer:
        todo = [g for g, keys in groups.items() if any(key not in writer for key in keys)]
        results = (
            server.map(grade_group, todo) if server else ((g, grade_group(g)) for g in todo)
        )
        for prompt_id, result in files.progress(
            results, total=len(todo), desc=Path(args.out).name
        ):
            rewards, teachers = (
                ([(None, str(result))] * len(groups[prompt_id]), [])
                if isinstance(result, Exception)
                else result
            )
            if args.shuffle:  # the group keeps its rewards, each loses its rollout
                order = np.random.default_rng(
                    int(hashlib.sha256(f"{args.seed}|{prompt_id}".encode()).hexdigest()[:8], 16)
                ).permutation(len(rewards))
                rewards = [
                    (rewards[i][0], None if rewards[i][0] is not None else rewards[i][1])
                    for i in order
                ]
            lines = []
            for key, (reward, verdicts) in zip(groups[prompt_id], rewards):
                if key in writer:
                    continue
                rollout = rollouts[key]
                line = {
                    "id": rollout["id"],
                    "sample": rollout["sample"],
                    "reward": reward,
                    "status": "failed" if reward is None else "ok",
                    "rollout": records.fingerprint(rollout),
                    "grader": name,
                }
                if scorer:
                    line["discriminator"] = scorer.weights
                if verdicts is not None:
                    line["verdicts" if reward is not None else "reason"] = verdicts
                lines.append(line)
                if reward is None:
                    failures.append(verdicts)
            writer.write(*lines)
            teacher_scores += teachers
            if teachers:
                beaten.append(
                    min(teachers) < max([r for r, _ in rewards if r is not None], default=0.0)
                )
            served.stop_if_failing(
                failures, len(writer.done) - len(failures), len(rollouts), args, ADVICE
            )

    by_group, failed = {}, 0
    for r in files.read(args.out, "rewards"):
        failed += r["status"] == "failed"
        if r["reward"] is not None:
            by_group.setdefault(str(r["id"]), []).append(r["reward"])
    ok = [x for group in by_group.values() for x in group]
    summary = {
        "out": args.out,
        "records": len(rollouts),
        "failed": failed,
        "failure_rate": failed / len(rollouts),
        "reward_mean": float(np.mean(ok)) if ok else None,
        "zero_variance_groups": sum(max(g) == min(g) for g in by_group.values())
        / max(1, len(by_group)),
    }
    summary |= spent | (scorer.summary() if scorer else {})
    text = f"mean reward {summary['reward_mean']:.3f}, " if ok else ""
    if teacher_scores:
        summary |= {
            "teacher_reward_mean": float(np.mean(teacher_scores)),
            "student_beats_worst_teacher": float(np.mean(beaten)),
        }
        text += f"teacher's {summary['teacher_reward_mean']:.3f}, "
    if ok:
        text += f"{summary['zero_variance_groups']:.0%} of groups without a difference, "
    if "accuracy" in summary:
        text += f"{summary['accuracy']:.0%} of given answers above a rollout, "
    if spent:
        text += (
            f"{spent['labels']} labels, {spent['labels_new']} of them new to {args.ledger}, "
        )
    print(
        f"rubric.py grade: {args.out}: {len(rollouts)} rollouts by {name}, {text}{failed} "
        f"failed"
    )
    return summary


class Discriminator:
    """Scores of groups of rollouts by a trained discriminator, and of the given answers
    (--answers) to compare with, which earn nothing."""

    def __init__(self, args, rollouts, groups):

        self.scorer, self.rollouts, self.groups, self.given, self.seen = (
            load_scorer(args.discriminator),
            rollouts,
            groups,
            {},
            [],
        )
        self.weights = self.scorer.identity["weights"]
        for key in rollouts.keys():
            check_tokens(
                rollouts[key], rollouts.where(key), self.scorer.identity, self.scorer.vocabulary
            )
        for answer in files.read(args.answers, "answers") if args.answers else ():
            self.given.setdefault(str(answer["id"]), []).append(answer)

    def judge(self, prompt_id):
        """Scores of the group's rollouts, in order."""

        rollouts = [self.rollouts[key] for key in self.groups[prompt_id]]
        answers = [
            (rollouts[0]["prompt_ids"], answer_ids(self.scorer, answer))
            for answer in self.given.get(prompt_id, [])
        ]
        scores = self.scorer.scores(
            [
                self.scorer.sees(*text)
                for text in [(r["prompt_ids"], r["response_ids"]) for r in rollouts] + answers
            ]
        )
        self.seen.append(
            (
                scores[len(rollouts) :],
                scores[: len(rollouts)],
                [len(r["response_ids"]) for r in rollouts],
            )
        )
        return scores[: len(rollouts)]

    def summary(self):

        return verdicts(self.seen) if self.seen else {}


# ---- the served judge

ADVICE = "try a stronger judge, a longer --max-tokens or more --re-asks, then run again"


def add_judge_flags(p, temperature, max_tokens):
    p.add_argument(
        "--model",
        help="served model that plays rubricator or verifier; keep it fixed, and never the "
        "student itself",
    )
    p.add_argument("--temperature", type=float, default=temperature, help="of the served judge")
    p.add_argument(
        "--max-tokens", type=int, default=max_tokens, help="longest reply of the served judge"
    )
    p.add_argument(
        "--re-asks",
        type=int,
        default=2,
        help="times a malformed reply is sent back with what was wrong",
    )
    p.add_argument(
        "--cache",
        help="JSONL of good replies, keyed by everything that was asked; saves a re-run's "
        "money",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="order of the anonymous pool, verifier noise"
    )
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    served.add_flags(p)


def served_judge(args):
    """(server, cache, the name rewards carry)."""
    if not args.base_url or not args.model:
        raise BadInput("a served judge needs --base-url and --model")
    return (
        served.Server.from_flags(args),
        judge.Cache(args.cache),
        f"{args.model} (prompts v{judge.PROMPT_VERSION})",
    )


def judge_settings(args):
    if not args.base_url:
        return {}
    return {
        "model": args.model,
        "base_url": args.base_url,
        "temperature": args.temperature,
        "prompts": judge.PROMPT_VERSION,
    }


def judge_options(args, cache):
    return {
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "re_asks": args.re_asks,
        "cache": cache,
    }


def attempt(function, *args, **options):
    """The function's value, or the judgement failure itself: counted by the caller, never
    turned into a number."""
    try:
        return function(*args, **options)
    except (judge.JudgeFailure, served.ServedFailure) as failure:
        return failure


def main(argv=None):
    return files.dispatch(__doc__, {"create": create, "grade": grade}, argv)


if __name__ == "__main__":
    files.run(main)
