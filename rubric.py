"""Stage 3: rubrics from contrasts, rewards from rubrics.  The heart of ROPD (arXiv 2605.07396).

    python rubric.py create --predicates worlds.predicates --prompts P --answers A \
        --rollouts R --out rubrics.jsonl
    python rubric.py grade --predicates worlds.predicates --prompts P --rubrics rubrics.jsonl \
        --rollouts R --out rewards.jsonl

`create` (section 3, eq. 2) looks at m teacher answers and all n rollouts of a prompt and writes
one rubric for the whole group: 4 to 12 criteria, each a property that an answer has or has
not, with 1 to 5 points.  `--rubricator contrast` (opd/contrast.py) chooses at most 8 from a
library of predicates for the task (worlds.predicates knows running sums): those that at least
3/4 of the teacher's answers pass, ranked by how much rarer the rollouts pass them.  `llm` asks
a served model (--model, --base-url).

    {"id": "t7", "criteria": [{"id": "c1", "category": "result", "criterion": "The final result
     is ...", "points": 5, "check": ["total_right"], "gap": 0.875}, ...], "rubricator":
     "contrast", "drawn_from": {"answers": [fingerprints], "rollouts": [fingerprints]}}

`grade` (eq. 3-5) asks every criterion of every rollout and pays the weighted pass rate, in
[0, 1]: points (5, 2, 1), verdicts (yes, no, yes) -> reward 6/8 = 0.75.  `--grader check`
evaluates the predicates; `judge` asks a served model; with --answers both see the teacher's
answers in the same anonymous pool; `scalar` is the baseline without a rubric, one served 0-10
score; `answer` compares final answers (opd/answers.py) and alone reads the prompts' `answer`.

A judgement that fails is null, never zero, never cached; train.py drops its group.  More than
--max-failure-rate of them stop the stage.  Run it again to ask only for what failed.

Simplifications: 1. rubrics are shared by a group, never per rollout; 2. `contrast` cannot tell
format from merit, so the paper's cap of 1 point on cosmetic criteria is not applied.
"""

import opd.quiet  # noqa: F401

# isort: split

from functools import partial

from opd import cli, files, judge, records, rewards, served
from opd.answers import (
    add_equality_flag,
    equal,
    equality_named,
    is_correct,
    question_of,
    read_answerable,
)
from opd.contrast import check_verdicts, contrast, load_library, summarise
from opd.records import BadInput
from opd.rewards import Reward


def in_one_piece(rollout, path):
    """The rollout; raises BadInput for an episode with tools: a criterion could be met by a
    tool's words, and a tool could speak to the judge."""
    if len(rollout.get("steps", ())) > 1:
        raise BadInput(
            f"{path}: id {rollout['id']!r}: steps: expected an answer in one piece, got an "
            f"episode with tools: rubrics and judges would read the tools' words as the "
            f"model's: use --grader answer"
        )
    return rollout


def by_prompt(path, kind, most=None):
    """{prompt id: text and fingerprint of its records in sample order}, at most `most` a
    prompt."""
    found = {}
    for record in files.read(path, kind):
        text = records.final_text(in_one_piece(record, path))
        short = {"text": text, "fingerprint": records.fingerprint(record)}
        found.setdefault(str(record["id"]), []).append((record["sample"], short))
    for key, group in found.items():
        group.sort(key=lambda pair: pair[0])
        found[key] = [short for _, short in group[:most]]
    return found


def add_library_flag(p):
    p.add_argument(
        "--predicates",
        metavar="MODULE",
        help="contrast, check: the task's library of predicates, CHECKS of a module or "
        "MODULE:NAME",
    )


def judge_from_flags(args, asked, asker, reasons=False):
    """The Judge that the flags name, or None where nobody asks one."""
    if asked and args.predicates:
        raise BadInput(f"--predicates: expected no library with {asker}: a model judges")
    if asked:
        return judge.from_flags(args, reasons)
    if args.model or args.base_url:
        raise BadInput(
            f"--model, --base-url: expected {asker}, which asks a served model, got none"
        )
    return None


def texts(group):
    return [records.final_text(answer) for answer in group]


def for_each(llm, function, items):
    """Yields (item, function(item)): by the judge's threads as replies come, or in order."""
    if llm:
        return llm.for_each(function, items)
    return ((item, function(item)) for item in items)


# ---- create


def rubric_record(prompt, criteria, rubricator, answers, attempts):
    """The line of a rubrics file; it says which texts the rubric was drawn from."""
    drawn_from = {
        "answers": [answer["fingerprint"] for answer in answers],
        "rollouts": [attempt["fingerprint"] for attempt in attempts],
    }
    return {
        "id": prompt["id"],
        "criteria": criteria,
        "rubricator": rubricator,
        "drawn_from": drawn_from,
    }


def drawn_from_others(rubric, fingerprints):
    """Whether a rubric was drawn from others than these rollouts."""
    made_for = rubric.get("drawn_from", {}).get("rollouts")
    return made_for is not None and set(made_for) != set(fingerprints)


def create_parser():
    p = cli.parser(__doc__)
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
        help="teacher answers per prompt that the rubric is drawn from; 1 anchors it to one "
        "style",
    )
    add_library_flag(p)
    judge.add_flags(p, temperature=0.7, max_tokens=8192)
    return p


def create(argv):
    args = create_parser().parse_args(argv)
    cli.check_at_least(1, m=args.m)
    prompts = files.Table(args.prompts, "prompts")
    answers = by_prompt(args.answers, "answers", args.m)
    attempts = by_prompt(args.rollouts, "rollouts")
    for key in attempts:
        if (key,) not in prompts:
            raise BadInput(
                f"{args.prompts}: expected a prompt with id {key!r}, of which "
                f"{args.rollouts} has rollouts, but there is none"
            )
    short = [key for key in attempts if len(answers.get(key, ())) < args.m]
    what = f"{args.answers} has fewer than {args.m} answers (--m) to them"
    attempts = files.without(attempts, short, what)
    llm = judge_from_flags(args, args.rubricator == "llm", "--rubricator llm")
    settings = {"rubricator": args.rubricator, "m": args.m}
    settings |= llm.settings() if llm else {"predicates": args.predicates}
    name = llm.name if llm else args.rubricator
    propose = llm.propose_rubric if llm else partial(contrast, load_library(args.predicates))

    def propose_for(key):
        return propose(question_of(prompts[(key,)]), texts(answers[key]), texts(attempts[key]))

    def outdated(rubric):
        """Why a rubric is drawn anew: its prompt has got more rollouts since."""
        group = attempts.get(str(rubric["id"]))
        if group and drawn_from_others(rubric, [each["fingerprint"] for each in group]):
            return "drawn from other rollouts"

    def work(missing):
        for key, criteria in for_each(llm, propose_for, [key for (key,) in missing]):
            if criteria is None:
                yield ValueError("fewer than 4 predicates hold for the teacher's answers")
            elif isinstance(criteria, Exception):
                yield criteria
            else:
                yield rubric_record(
                    prompts[(key,)], criteria, name, answers[key], attempts[key]
                )

    made, failures = files.fill(
        args.out,
        "rubrics",
        [(key,) for key in attempts],
        work,
        settings,
        [args.prompts, args.answers, args.rollouts],
        args.overwrite,
        outdated,
        served.failure_limit(args),
    )
    summary = {"out": args.out, "records": made, "failed": len(failures)}
    summary |= llm.spent() if llm else {}
    print(
        f"rubric.py create: {args.out}: {made} rubrics by {name}, {len(failures)} failed"
        f"{judge.describe_spent(summary)}"
    )
    if made:
        summary |= summarise(args.out)
        print(
            f"{summary['criteria_mean']:.1f} criteria each, {summary['decisive']:.0%} with a "
            f"decisive one, from {summary['distinct_answers']:.1f} distinct answers each"
        )
    return summary


# ---- grade


def rubric_rewards(prompt, responses, rubrics, verify):
    """The weighted pass rate of the prompt's rubric for every answer.
    verify(question, criteria, texts) gives its verdicts, a list for each time it was asked;
    failures stand in the place of lists."""
    criteria = rubrics[(str(prompt["id"]),)]["criteria"]
    points = [criterion["points"] for criterion in criteria]
    tries = verify(question_of(prompt), criteria, texts(responses))
    return [rewards.rubric_reward(points, each) for each in tries]


def scalar_rewards(prompt, responses, llm):
    """One holistic grade an answer by a served model: the baseline without a rubric."""
    question = question_of(prompt)
    scores = judge.each(lambda text: llm.holistic(question, text), texts(responses))
    return [Reward(None, str(s)) if isinstance(s, Exception) else Reward(s) for s in scores]


def answer_rewards(prompt, responses, same=equal):
    """1 for the right final answer, else 0.  An episode's is looked for in its last step."""
    right = [is_correct(records.final_text(a), prompt["answer"], same) for a in responses]
    return [Reward(float(r)) for r in right]


def read_groups(table, prompts, path, grader):
    """{prompt id: keys of its rollouts}; raises BadInput for what the grader cannot read."""
    groups = {}
    for key in table.keys():
        prompt_id = key[0]
        if (prompt_id,) not in prompts:
            raise BadInput(
                f"{table.where(key)}: id: expected one of the ids in {path}, got {prompt_id!r}"
            )
        if grader != "answer":
            in_one_piece(table[key], table.path)
        groups.setdefault(prompt_id, []).append(key)
    return groups


def read_rubrics(path, groups, table, frozen):
    """The Table of rubrics; unless `frozen`, raises BadInput where one was drawn from other
    rollouts than its group: ROPD draws a new one for every prompt at every step."""
    rubrics = files.Table(path, "rubrics")
    for prompt_id, keys in groups.items():
        if frozen or (prompt_id,) not in rubrics:
            continue
        group = [records.fingerprint(table[key]) for key in keys]
        if drawn_from_others(rubrics[(prompt_id,)], group):
            raise BadInput(
                f"{path}: id {prompt_id!r}: drawn_from: expected the rollouts of "
                f"{table.path}, but the rubric was drawn from others: run rubric.py create for "
                f"these, or --frozen-rubrics if it is meant"
            )
    return rubrics


def grade_parser():
    p = cli.parser(__doc__)
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
        choices=("check", "judge", "scalar", "answer"),
        help="see above",
    )
    p.add_argument("--rubrics", help="JSONL of rubrics (check, judge)")
    p.add_argument(
        "--answers",
        help="check, judge: JSONL of teacher answers, judged in the same anonymous pool; "
        "logged, never in the reward",
    )
    p.add_argument(
        "--mode",
        default="batch",
        choices=("batch", "single"),
        help="judge: one call a prompt, or one a response (calmer, dearer)",
    )
    p.add_argument(
        "--frozen-rubrics",
        action="store_true",
        help="accept rubrics that were drawn from other rollouts than these",
    )
    add_library_flag(p)
    add_equality_flag(p)
    judge.add_flags(p, temperature=0.0, max_tokens=4096)
    p.add_argument("--seed", type=int, default=0, help="judge: order of the anonymous pool")
    p.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="judge: ask so often, in another order each time; the reward is the mean, and how "
        "often verdicts differ is reported",
    )
    p.add_argument(
        "--reason", action="store_true", help="judge: a short reason before each verdict"
    )
    return p


def grader_from_flags(args, llm, rubrics):
    """grader(prompt, responses) -> a Reward for each response."""
    if args.grader == "answer":
        read_answerable(args.prompts)
        return partial(answer_rewards, same=equality_named(args.equality))
    if args.grader == "scalar":
        return partial(scalar_rewards, llm=llm)
    if llm:
        how = dict(mode=args.mode, seed=args.seed)
        verify = partial(llm.verify_repeatedly, args.repeats, **how)
    else:
        library = load_library(args.predicates)

        def verify(*asked):
            return [[verdicts] for verdicts in check_verdicts(*asked, library=library)]

    return partial(rubric_rewards, rubrics=rubrics, verify=verify)


def grade_missing(missing, groups, table, grade_group, llm, name):
    """Yields the records of rollouts that have no reward yet, a group at a time."""
    missing = set(missing)
    todo = [prompt_id for prompt_id, keys in groups.items() if missing & set(keys)]
    for prompt_id, given in for_each(llm, grade_group, todo):
        yield [
            rewards.reward_record(table[key], rewards.paid(table[key], reward), name)
            for key, reward in zip(groups[prompt_id], given)
            if key in missing
        ]


def settings_from_flags(args, llm):
    """What the rewards of a file depend on."""
    settings = {"grader": args.grader, "mode": args.mode, "seed": args.seed}
    if args.repeats > 1:
        settings["repeats"] = args.repeats
    if args.grader == "answer":
        settings["equality"] = args.equality
    if args.grader == "check":
        settings["predicates"] = args.predicates
    return settings | (llm.settings() if llm else {})


def grade(argv):
    args = grade_parser().parse_args(argv)
    cli.check_at_least(1, repeats=args.repeats)
    if args.grader != "judge" and (args.repeats > 1 or args.reason):
        raise BadInput(
            "--repeats, --reason: expected --grader judge, the only one to read them"
        )
    prompts = files.Table(args.prompts, "prompts")
    table = files.Table(args.rollouts, "rollouts")
    groups = read_groups(table, prompts, args.prompts, args.grader)
    asked = args.grader in ("judge", "scalar")
    llm = judge_from_flags(args, asked, "--grader judge or scalar", args.reason)
    rubrics = references = {}
    if args.grader in ("check", "judge"):
        if not args.rubrics:
            raise BadInput(f"--grader {args.grader}: expected --rubrics FILE")
        rubrics = read_rubrics(args.rubrics, groups, table, args.frozen_rubrics)
        unmade = {prompt_id for prompt_id in groups if (prompt_id,) not in rubrics}
        groups = files.without(groups, unmade, f"{args.rubrics} has no rubric for them")
        references = by_prompt(args.answers, "answers") if args.answers else {}
    grader = grader_from_flags(args, llm, rubrics)
    name = llm.name if llm else args.grader
    if args.grader == "answer" and args.equality != "normalised":
        name += f" by {args.equality}"
    pools = []

    def grade_group(prompt_id):
        rollouts = [table[key] for key in groups[prompt_id]]
        given = grader(prompts[(prompt_id,)], rollouts + references.get(prompt_id, []))
        students, teachers = given[: len(rollouts)], given[len(rollouts) :]
        if teachers:
            pools.append((students, teachers))
        return students

    files.fill(
        args.out,
        "rewards",
        [key for keys in groups.values() for key in keys],
        lambda missing: grade_missing(missing, groups, table, grade_group, llm, name),
        settings_from_flags(args, llm),
        [f for f in (args.prompts, args.rubrics, args.rollouts, args.answers) if f],
        args.overwrite,
        rewards.failure_of,
        served.failure_limit(args),
    )
    summary = rewards.summarise(args.out) | rewards.compare_with_teacher(pools)
    summary |= llm.spent() if llm else {}
    print(
        f"rubric.py grade: {args.out}: {name}: {rewards.describe(summary)}"
        f"{judge.describe_spent(summary)}"
    )
    return summary


def main(argv=None):
    return cli.dispatch(__doc__, {"create": create, "grade": grade}, argv)


if __name__ == "__main__":
    cli.run(main)
