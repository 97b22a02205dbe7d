"""The ledger of labels: which problems' answers have been paid out as reward, and for what.

    python -m methods.sparse_to_dense spend --ledger labels.jsonl --prompts P --rollouts R \\
        --purpose teacher-rl
    python rubric.py grade --grader answer --prompts P --rollouts R --out W
    python -m opd.files check labels.jsonl

A label that a teacher was trained with is in its student too, so a second stage that is to
learn from new labels must not meet the old ones (2605.12483, the contrast of new and replayed
labels).  `spend` writes down the label of every prompt that has rollouts, before rubric.py
reads one:

    {"id": "t00017", "question": "1f0c9be2a4d7", "spent_on": "teacher-rl", "again": false}

A label is known by its question and not by its id, for a copied problem has the same answer.
One purpose may ask for a label as often as it likes (epochs); another purpose is refused it
unless --again says that this is meant, and then the line says so too.
"""

import hashlib
import json
import os
from pathlib import Path

from opd import cli, disk, files
from opd.answers import read_answerable
from opd.records import BadInput


def question_hash(prompt):
    """Twelve hex digits of what is asked, whoever gave it which id."""
    asked = prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}]
    asked = [{"role": m["role"], "content": m["content"]} for m in asked]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=True).encode()).hexdigest()[:12]


def spend(ledger, prompts, purpose, again=False):
    """Writes the labels of `prompts` (records with an `answer`) down as spent on `purpose`: all
    of them or, if one may not be, none.

    Returns {"labels": those of this call, "labels_new": of these, not in the ledger before,
    "labels_spent": all in the ledger}. BadInput names the ledger's line, the label, what it was
    spent on and by which flag it could be spent again."""
    path = Path(ledger)
    known = {}  # question: {purpose: line}
    fresh = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        if disk.fcntl:
            # two arms that share a ledger take turns
            disk.fcntl.flock(file, disk.fcntl.LOCK_EX)
        disk.cut_torn_line(path)
        if os.fstat(file.fileno()).st_size:
            for number, line in enumerate(files.read(path, "labels"), 1):
                known.setdefault(line["question"], {})[line["spent_on"]] = number
        before = len(known)
        for prompt in prompts:
            question = question_hash(prompt)
            earlier = known.setdefault(question, {})
            if purpose in earlier:
                continue
            if earlier and not again:
                other, number = next(iter(earlier.items()))
                raise BadInput(
                    f"{ledger}:{number}: spent_on: expected {purpose!r} or no line yet for "
                    f"label {prompt['id']!r}, got {other!r}: it has been spent on "
                    f"that; "
                    "take other problems, or --again if this is meant"
                )
            fresh.append(
                {
                    "id": prompt["id"],
                    "question": question,
                    "spent_on": purpose,
                    "again": bool(earlier),
                }
            )
            earlier[purpose] = None
        disk.append_whole(file, b"".join(json.dumps(line).encode() + b"\n" for line in fresh))
        disk.sync(path)
    return {
        "labels": len({question_hash(p) for p in prompts}),
        "labels_new": len(known) - before,
        "labels_spent": len(known),
    }


def spend_command(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--ledger", required=True, help="JSONL of labels, begun or added to")
    p.add_argument("--prompts", required=True, help="JSONL of prompts with an `answer`")
    p.add_argument(
        "--rollouts", required=True, help="JSONL of rollouts: the prompts whose labels are read"
    )
    p.add_argument(
        "--purpose", required=True, help="what the labels are spent on, like teacher-rl"
    )
    p.add_argument(
        "--again", action="store_true", help="take labels that were spent on something else"
    )
    args = p.parse_args(argv)
    prompts = read_answerable(args.prompts)
    asked = dict.fromkeys((str(r["id"]),) for r in files.read(args.rollouts, "rollouts"))
    if missing := [key for key in asked if key not in prompts]:
        raise BadInput(
            f"{args.prompts}: expected a prompt with id {missing[0][0]!r}, of which "
            f"{args.rollouts} has rollouts, but there is none"
        )
    labelled = [prompts[key] for key in asked]
    summary = spend(args.ledger, labelled, args.purpose, args.again)
    print(
        f"methods.sparse_to_dense spend: {args.ledger}: {summary['labels']} labels, "
        f"{summary['labels_new']} of them new, {summary['labels_spent']} spent in all"
    )
    return summary


def main(argv=None):
    return cli.dispatch(__doc__, {"spend": spend_command}, argv)


if __name__ == "__main__":
    cli.run(main)
