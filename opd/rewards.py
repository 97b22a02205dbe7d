"""Rewards: the record of one, and what a file of them says.

    {"id": "t7", "sample": 0, "reward": 0.75, "status": "ok", "rollout": "9f2c01d4a7b3",
     "grader": "check", "verdicts": [true, false, true]}

A judgement that failed has reward null, status "failed" and a `reason`: never a zero.
"""

from array import array
from typing import NamedTuple

import numpy as np

from opd import files
from opd.records import final_text, fingerprint


class Reward(NamedTuple):
    """A number, or None for a judgement that failed; note: its verdicts, or why it failed;
    repeats: the verdicts of every time a judge was asked, if that was more than once."""

    value: float | None
    note: list | str | None = None
    repeats: list | None = None


def pass_rate(points, verdicts):
    """ROPD eq. 4: pass_rate([5, 2, 1], [True, False, True]) -> 0.75."""
    return sum(w for w, v in zip(points, verdicts) if v) / sum(points)


def rubric_reward(points, tries):
    """The mean pass rate of an answer.  tries: its verdicts, a list for each time they were
    asked for, or a failure in the place of one, which is left out of the mean.  Where all
    failed there is no reward."""
    good = [verdicts for verdicts in tries if not isinstance(verdicts, Exception)]
    if not good:
        return Reward(None, str(tries[-1]))
    value = sum(pass_rate(points, verdicts) for verdicts in good) / len(good)
    return Reward(value, good[0], good if len(tries) > 1 else None)


def agreement(repeats):
    """How steady a judge is, from the verdicts of each answer's repeats.

    [[[True, False], [True, True]]]: one answer, two criteria, asked twice -> one of two later
    verdicts differs from the first, one of two criteria is judged alike each time."""
    flips = []
    alike = []
    for first, *others in repeats:
        flips += [a != b for other in others for a, b in zip(first, other)]
        alike += [len(set(column)) == 1 for column in zip(first, *others)]
    if not flips:
        return {}
    return {"verdict_flip_rate": float(np.mean(flips)), "agreement": float(np.mean(alike))}


def reward_record(rollout, reward, grader):
    """The line of a rewards file that belongs to a rollout."""
    failed = reward.value is None
    record = {
        "id": rollout["id"],
        "sample": rollout["sample"],
        "reward": reward.value,
        "status": "failed" if failed else "ok",
        "rollout": fingerprint(rollout),
        "grader": grader,
    }
    if reward.note is not None:
        record["reason" if failed else "verdicts"] = reward.note
    if reward.repeats is not None:
        record["repeats"] = reward.repeats
    return record


def paid(rollout, reward):
    """The reward, or 0 for an answer that is all thought, cut before it ended: whatever a judge
    says of an empty text."""
    all_thought = rollout["text"] != "" == final_text(rollout)
    return Reward(0.0) if all_thought and reward.value else reward


def failure_of(record):
    """Why a judgement failed; None for one that did not."""
    return record.get("reason", "no reason given") if record["reward"] is None else None


def summarise(path):
    """What a rewards file says, failed judgements left out of every mean."""
    groups = {}
    repeats = []
    records = failed = 0
    for record in files.read(path, "rewards"):
        records += 1
        if record["reward"] is None:
            failed += 1
        else:
            groups.setdefault(str(record["id"]), array("d")).append(record["reward"])
            repeats += [record["repeats"]] if "repeats" in record else []
    rewards = [reward for group in groups.values() for reward in group]
    flat = sum(max(group) == min(group) for group in groups.values())
    return {
        "out": str(path),
        "records": records,
        "failed": failed,
        "failure_rate": failed / records,
        "reward_mean": float(np.mean(rewards)) if rewards else None,
        "zero_variance_groups": flat / max(1, len(groups)),
    } | agreement(repeats)


def compare_with_teacher(pools):
    """How the teacher's answers fared in pools [(students' rewards, teacher's rewards)].  They
    are logged, never paid."""
    fared, beaten = [], []
    for students, teachers in pools:
        teachers = [r.value for r in teachers if r.value is not None]
        best = max((r.value for r in students if r.value is not None), default=0.0)
        if teachers:
            fared += teachers
            beaten.append(min(teachers) < best)
    if not fared:
        return {}
    return {
        "teacher_reward_mean": float(np.mean(fared)),
        "student_beats_worst_teacher": float(np.mean(beaten)),
    }


def describe(summary):
    """A summary in words."""
    text = f"{summary['records']} rewards, {summary['failed']} failed"
    if summary["reward_mean"] is not None:
        text += f", mean {summary['reward_mean']:.3f}"
        text += f", {summary['zero_variance_groups']:.0%} of groups without a difference"
    if "teacher_reward_mean" in summary:
        text += f", teacher's mean {summary['teacher_reward_mean']:.3f}"
    if "verdict_flip_rate" in summary:
        text += (
            f", {summary['verdict_flip_rate']:.1%} of repeated verdicts differ from the first"
        )
        text += f", {summary['agreement']:.1%} of criteria are judged alike each time"
    return text
