"""A real student and a real teacher: what the methods do to accuracy, and what that costs.

    python -m experiments.real_tasks make --task chain_sum --out runs/sum
    python -m experiments.real_pair --student FOLDER --teacher FOLDER --problems runs/sum \\
        --judge NAME --judge-url http://localhost:8011/v1 --out runs/pair --arms sft,opd,ropd
    python -m experiments.real_pair --student SMALL ... --out runs/cold --arms sft
    python -m experiments.real_pair --student runs/cold/seed0/sft/round9/model ... --arms opd

Arms, all with the same problems and number of updates:

    before      the student as it starts
    sft         imitation of the teacher's answers to the round's problems
    opd         reverse KL, on own answers, over the teacher's 20 likeliest tokens and one bin
                for the rest.  Under a teacher of another vocabulary `simple-opd`, where both
                spell a text with one token: over those of the student's 64 likeliest that the
                teacher has, too
    ropd        rubrics from own answers and four of the teacher's: by the judge, or without one
                by the predicates of experiments.real_checks, which know sums (chain_sum)
    shuffled    as ropd, its rewards dealt out at random within each group: must not help
    answer      reward 1 for the right final answer, by eval.py's grader
    teacher     the teacher

A killed run goes on with the round that it was in.  Every command is in OUT/commands.sh.  A
student that cannot do the task imitates first: the last two commands.

Simplifications: 1. one task; 2. real models allow few seeds: the report has the differences
once more, with intervals over problems.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import teacher
from experiments import study
from experiments.claims import finished_lines, markdown, more, plus_minus
from experiments.real_checks import sum_asked
from experiments.real_tasks import mean_of_known, right_somehow
from experiments.study import setting
from opd import cli, disk, files, records
from opd.answers import final_answer, is_correct, question_of
from opd.policy import (
    find_folder,
    hash_weights,
    identity_of,
    load_tokenizer,
    same_template,
)
from opd.records import BadInput
from opd.shared import shares_prompts
from opd.stats import auc_by_prompt


@dataclass(frozen=True)
class Settings(study.Measured):
    student: str = setting("", "folder or Hugging Face id", smoke="-")
    teacher: str = setting("", "folder or Hugging Face id", smoke="-")
    problems: str = setting(
        "", "folder with train, dev and heldout.jsonl (real_tasks make)", smoke="-"
    )
    judge: str = setting("", "name of a served model that writes and applies rubrics")
    judge_url: str = setting("", "its OpenAI-compatible server", free=True)
    dtype: str = setting("float32", "of both models", choices=("float32", "bfloat16"))
    rounds: int = setting(10, "rounds an arm", smoke=2)
    prompts: int = setting(16, "problems a round", smoke=4)
    n: int = setting(4, "answers a problem", smoke=4)
    updates: int = setting(1, "optimiser steps a round")
    # low, for AdamW's first step moves every weight by the rate
    sft_learning_rate: float = setting(1e-6, "of imitation")
    opd_learning_rate: float = setting(1e-6, "of arms that read log-probs")
    rl_learning_rate: float = setting(1e-6, "of arms that read rewards")
    micro_batch_tokens: int = setting(1024, "tokens in one forward pass")
    max_tokens: int = setting(200, "longest answer", smoke=12)
    final_n: int = setting(2, "samples a problem at the end of an arm", smoke=1)

    def __post_init__(self):
        super().__post_init__()
        if not (self.student and self.teacher and self.problems):
            raise BadInput("expected --student, --teacher and --problems (or --smoke)")
        if bool(self.judge) != bool(self.judge_url):
            raise BadInput("--judge, --judge-url: expected both or neither")


ARMS = {
    "before": {},
    "sft": dict(method="sft", reads="texts", rate="sft"),
    "opd": dict(method="opd-full", reads="scores", rate="opd"),
    "ropd": dict(method="ropd", reads="rewards", rate="rl"),
    "shuffled": dict(method="ropd", reads="rewards", rate="rl", shuffled=True),
    "answer": dict(method="ropd", reads="rewards", rate="rl", answer=True),
    "teacher": {},
}
COLUMNS = (
    "greedy",
    "flexible",
    "greedy_flexible",
    "answered",
    "greedy_answered",
    "length_mean",
    "truncated",
    "generated_tokens",
    "teacher_tokens",
    "seconds",
)
# sentence, an arm, and the one that it beats
COMPARED = [
    ("Distillation from log-probs lifts a real student", "opd", "before"),
    ("...more than imitation of as many answers", "opd", "sft"),
    ("Rubrics lift a real student", "ropd", "before"),
    ("...because of which answer gets which reward", "ropd", "shuffled"),
    ("A hidden exact checker is a ceiling of rubrics", "answer", "ropd"),
    ("Imitation lifts a real student", "sft", "before"),
]
CLAIMS = [more(*each) for each in COMPARED]
# arms that are compared by problem: these, and pairs without a claim
PAIRS = [(arm, other) for _, arm, other in COMPARED]
PAIRS += [("ropd", "sft"), ("ropd", "opd"), ("shuffled", "before"), ("answer", "before")]
PAIRS += [("answer", "teacher")]


def build(run):
    """The tiny world of --smoke; else everything is given, has to be enough, and stays."""
    s = run.settings
    if run.smoke:
        sizes = dict(train_prompts=16, eval_prompts=4, clean=8, mixed=8)
        run.once("worlds.sums", "world/toy", **sizes)
        return
    path = Path(s.problems) / "train.jsonl"
    problems = list(files.read(path, "prompts"))
    for problem in problems:
        if "answer" not in problem:
            raise BadInput(f"{path}: id {problem['id']!r}: answer: expected one, found none")
    if len(problems) < s.rounds * s.prompts:
        raise BadInput(
            f"{path}: expected {s.rounds * s.prompts} problems for {s.rounds} rounds of "
            f"{s.prompts}, got {len(problems)}"
        )
    if not s.judge and {"ropd", "shuffled"} & set(run.arms):
        for problem in problems:
            question = question_of(problem)
            if sum_asked(question) is None:
                raise BadInput(
                    f"{path}: id {problem['id']!r}: expected a sum as chain_sum asks for, got "
                    f"{question[:60]!r}: without --judge, ropd and shuffled have "
                    f"experiments.real_checks alone"
                )
    models = {"student": s.student, "teacher": s.teacher}
    if "opd" in run.arms:
        check_templates(**models)
    inputs = {name: hash_weights(find_folder(model)) for name, model in models.items()}
    for split in ("train", s.eval_split):
        name = f"{split}.jsonl"
        inputs[name] = files.hash_file(path.with_name(name))["sha256"]
    run.keep("inputs", inputs)


def check_templates(student, teacher):
    """Refuses a teacher that would read the student's tokens in a foreign chat template."""
    ours, theirs = (
        identity_of(name, None, load_tokenizer(name), {}) for name in (student, teacher)
    )
    if ours["vocabulary"] == theirs["vocabulary"] and not same_template(theirs, ours):
        raise BadInput(
            f"--teacher {teacher}: opd: expected the chat template of {student}, whose "
            f"vocabulary it shares, got another one: a teacher off its own template scores "
            f"badly: leave the arm out"
        )


def prepare(run, seed):
    """Every arm starts from the given student."""


class Trial(study.Trial):
    """An arm that is not begun again: state.json says which rounds stand.

    The order of a round: train; state.json; the model before is removed; then, where a line is
    due, measure, the line, state.json.  `resume` mends what a kill in between leaves."""

    def setup(self):
        s = self.settings
        self.rows = []  # result lines so far
        self.start = s.student
        self.teacher = s.teacher
        self.data = Path(s.problems)
        if self.run.smoke:
            self.data = self.run.world / "toy"
            self.start, self.teacher = str(self.data / "student"), str(self.data / "teacher")
        vocabularies = [load_tokenizer(x).get_vocab() for x in (self.start, self.teacher)]
        self.same_vocabulary = vocabularies[0] == vocabularies[1]
        if self.arm == "teacher":
            self.start = self.teacher
        if not self.how:
            self.rounds = 0

    # ---- going on

    def clear(self):
        pass

    def resume(self):
        state = self.place / "state.json"
        if not state.exists():
            return 0
        kept = json.loads(state.read_text())
        self.began = time.time() - kept["seconds"]
        for name in ("cost", "steps", "signal", "rows"):
            setattr(self, name, kept[name])
        for row in self.rows:
            self.run.record(row)
        self.row = self.rows[-1]
        done = kept["done"]
        if done:
            self.model = self.place / self.weights.format(done - 1)
        for model in self.place.glob(self.weights.format("*")):
            if model != self.model:
                shutil.rmtree(model)  # a kill has left it
        due = done == self.rounds or self.due(done)
        if due and self.rows[-1]["step"] != self.step(done):
            self.measure(self.step(done), done == self.rounds)
        return done

    def keep(self, done):
        """Writes down that so many rounds stand."""
        kept = dict(done=done, cost=self.cost, steps=self.steps, signal=self.signal)
        kept |= dict(seconds=time.time() - self.began, rows=self.rows)
        disk.write_atomically(self.place / "state.json", json.dumps(kept, indent=1) + "\n")

    def trained(self, old):
        self.keep(self.number + 1)
        super().trained(old)

    def measure(self, step, final=False):
        if final:
            self.signal["course"] = self.course()
        if step or final:
            super().measure(step, final)
        else:  # every arm begins where `before` ends
            lines = study.result_lines(self.run.results)
            start = next(r for r in lines if (r["arm"], r["seed"]) == ("before", self.seed))
            self.row = start | {"arm": self.arm, "final": False, "seconds": 0.0}
            self.run.record(self.row)
        self.rows.append(self.row)
        self.keep(step // self.settings.updates)

    def outcomes(self, prefix=""):
        """Of the last evaluation: the share of answers that have a final answer and of those
        that are right in whatever form (training may mend the form alone), and how often each
        problem was solved, by id, and solved in whatever form."""
        problems = {str(p["id"]): p for p in files.read(self.heldout, "prompts")}
        answered = []
        right = {}
        loose = {}
        for row in files.read(self.place / "eval.jsonl", "evals"):
            text, key = records.final_text(row), str(row["id"])
            answered.append(final_answer(text) is not None)
            right.setdefault(key, []).append(row["correct"])
            loose.setdefault(key, []).append(right_somehow(problems[key], text, row["correct"]))
        return {
            f"{prefix}answered": float(np.mean(answered)),
            f"{prefix}flexible": mean_of_known(x for each in loose.values() for x in each),
            f"{prefix}right": [float(np.mean(each)) for _, each in sorted(right.items())],
            f"{prefix}any_form": [mean_of_known(each) for _, each in sorted(loose.items())],
        }

    def columns(self, score, n, final):
        sampled = self.outcomes()
        found = super().columns(score, n, final)  # at the end: eval.jsonl is greedy from here
        return found | sampled | (self.outcomes("greedy_") if final else {})

    def course(self):
        """Of every round: mean tokens of the answers that it learned from, the share that is
        right; where a teacher of the same vocabulary scored them, the mean over all tokens of
        log mu - log p_T, whose expectation is the reverse KL; see `about_rewards`."""
        wanted = {str(p["id"]): p["answer"] for p in files.read(self.prompts, "prompts")}
        rows = []
        for number in range(self.rounds):
            at = self.place / f"round{number}"
            texts = self.how["reads"] == "texts"
            path = self.asked(number, self.settings.n) if texts else at / "rollouts.jsonl"
            found = files.read(path, "rollouts")
            answers = {records.key_of(r, "rollouts"): r for r in found}
            right = {
                key: is_correct(records.final_text(r), wanted[key[0]])
                for key, r in answers.items()
            }
            lengths = [len(r["response_ids"]) for r in answers.values()]
            row = {"tokens": np.mean(lengths), "right": np.mean(list(right.values()))}
            if (at / "scores.jsonl").exists():
                row["gap"] = teacher.summarise(at / "scores.jsonl", answers)["kl_mean"]
            if (at / "rewards.jsonl").exists():
                row |= about_rewards(at, right)
            rows.append(row)
        return [{name: rounded(x) for name, x in row.items()} for row in rows]

    # ---- a round

    def generation(self):
        return super().generation() | {"dtype": self.settings.dtype}

    def round(self):
        s, how = self.settings, self.how
        method = how["method"]
        options = {"micro_batch_tokens": s.micro_batch_tokens, "dtype": s.dtype}
        options["compute"] = {"shared_prompts": int(shares_prompts(self.start))}
        if how["reads"] == "texts":
            rollouts = self.ask(s.n)
            options["prompts"] = self.prompts  # for another vocabulary or template
        else:
            rollouts = self.rollout()
        if how["reads"] == "rewards":
            options["rewards"] = self.reward(rollouts)
        elif how["reads"] == "scores" and self.same_vocabulary:
            scored = dict(top_k=20, dtype=s.dtype, share_prompts=shares_prompts(self.teacher))
            options["scores"], _ = self.teach(rollouts, **scored)
        elif how["reads"] == "scores":
            method = "simple-opd"
            options["scores"] = self.score_units(rollouts)
        rate = getattr(s, f"{how['rate']}_learning_rate")
        self.train(method, rollouts, rate=rate, **options)

    def asked(self, number, n):
        """The file of the teacher's n answers to each problem of a round: one for all arms of a
        seed, which ask for the same at the same random numbers.  Each arm is charged their
        tokens, the first to ask also their seconds."""
        return self.folder / f"answers/round{number}x{n}.jsonl"

    def ask(self, n):
        """Makes that file, unless an arm has done so; returns it."""
        return self.answer(out=self.asked(self.number, n), n=n)

    def reward(self, rollouts):
        """Rewards by rubrics, or by the final answer."""
        s = self.settings
        if "answer" in self.how:
            return self.grade(rollouts, grader="answer")[0]
        library = "worlds.predicates" if self.run.smoke else "experiments.real_checks"
        common = {"predicates": library}
        if s.judge:
            common = dict(model=s.judge, base_url=s.judge_url, timeout=3600)
            common["cache"] = self.place / "judge.jsonl"
        drawn = {"answers": self.ask(4), "prompts": self.prompts, "m": 4}
        drawn["rubricator"] = "llm" if s.judge else "contrast"
        rubrics, _ = self.beside(rollouts, "rubrics", "rubric.py create", **common, **drawn)
        name = "verdicts" if "shuffled" in self.how else "rewards"
        grader = {"grader": "judge" if s.judge else "check", "rubrics": rubrics}
        rewards, graded = self.grade(rollouts, name, **common, **grader)
        self.signal["failure_rate"] = graded["failure_rate"]
        if "shuffled" in self.how:
            rewards, _ = self.control("shuffle-rewards", rewards)
        return rewards

    def score_units(self, rollouts):
        """Scores of a teacher with another vocabulary, for the student's likeliest tokens:
        for all shared ones the file would take some 15 MB an answer."""
        dtype = self.settings.dtype
        shared = dict(dtype=dtype, share_prompts=shares_prompts(self.start))
        own, _ = self.score(self.model, rollouts, "own", top_k=64, **shared)
        how = dict(student=self.model, prompts=self.prompts, model=self.teacher, top_k_of=own)
        how |= dict(dtype=dtype, share_prompts=shares_prompts(self.teacher))
        scores, done = self.beside(rollouts, "units", "methods.simct score", **how)
        self.cost["teacher_tokens"] += done["teacher_tokens"]
        return scores


def about_rewards(folder, right):
    """What a round was trained on (`shuffled`: as it was dealt).  Of the rewards: the mean; the
    mean over problems of the AUC for right against wrong answers; how many problems have both.
    Of rubrics of predicates: the share of a rubric's points that each is worth, mean over
    rubrics.  right: {key: whether it is}."""
    found = files.read(folder / "rewards.jsonl", "rewards")
    rewards = {records.key_of(r, "rewards"): r["reward"] for r in found}
    known = {key: x for key, x in rewards.items() if x is not None}
    aucs = auc_by_prompt(known, right).values()
    row = {
        "reward_mean": mean_of_known(known.values()),
        "reward_auc_within": mean_of_known(aucs),
        "problems_with_both": sum(auc is not None for auc in aucs),
    }
    shares = {}
    rubrics = 0
    if (folder / "rubrics.jsonl").exists():
        for rubric in files.read(folder / "rubrics.jsonl", "rubrics"):
            worth = {}
            for criterion in rubric["criteria"]:
                name = criterion.get("check", [None])[0]
                worth[name] = worth.get(name, 0) + criterion["points"]
            rubrics += 1
            for name, points in worth.items():
                shares[name] = shares.get(name, 0) + points / sum(worth.values())
    shares.pop(None, None)  # criteria of a judge
    if shares:
        row["points"] = {name: x / rubrics for name, x in sorted(shares.items())}
    return row


def rounded(x):
    """A number, None or a dict of them to four decimals."""
    if isinstance(x, dict):
        return {name: rounded(each) for name, each in x.items()}
    return None if x is None else round(float(x), 4)


def by_problem(path):
    """Markdown of what arms differ by, with intervals over problems: all that one seed has."""
    seeds = finished_lines(path)
    fields = ("right", "any_form", "greedy_right", "greedy_any_form")
    rows = [["difference", "sampled", "in any form", "greedy", "in any form"]]
    for arm, other in PAIRS:
        if all(arm in arms and other in arms for arms in seeds):
            pairs = [(arms[arm][-1], arms[other][-1]) for arms in seeds]
            rows.append([f"{arm} − {other}", *(paired(pairs, field) for field in fields)])
    return (
        f"{markdown(rows)}\nMeans over problems ± half of the 95 % t-interval over problems, "
        f"each with its mean over {len(seeds)} seed(s).\n"
    )


def paired(pairs, field):
    """The mean difference of a field of two result lines, lists over problems; "-" where the
    answers are no numbers."""
    if any(None in row[field] for pair in pairs for row in pair):
        return "-"
    return plus_minus(np.mean([np.subtract(a[field], b[field]) for a, b in pairs], 0))


STUDY = study.Study(
    "real_pair",
    "a real student and a real teacher",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    Trial,
    prepare,
    more=by_problem,
)


def main(argv=None):
    return study.conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
