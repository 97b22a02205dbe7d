"""The ledger of labels: which problems' answers have been paid out as reward, and for what.

    rubric.py grade --grader answer --prompts P --rollouts R --out W --ledger labels.jsonl
    --spend teacher-rl
    python -m opd.files check labels.jsonl

A label that a teacher was trained with is in its student too, so a second stage that is to
learn from new labels must not meet the old ones (2605.12483, the contrast of new and replayed
labels).  With --ledger, `grade` writes down every label before it reads one:

    {"id": "t00017", "question": "1f0c9be2a4d7", "spent_on": "teacher-rl", "again": false}

A label is known by its question and not by its id, for a copied problem has the same answer.
One purpose may ask for a label as often as it likes (epochs); another purpose is refused it
unless `--spend-again` says that this is meant, and then the line says so too.
"""

import hashlib
import json
import os
from pathlib import Path

from opd import files
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
    path, known, fresh = Path(ledger), {}, []
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        if files.fcntl:
            # two arms that share a ledger take turns
            files.fcntl.flock(file, files.fcntl.LOCK_EX)
        files.cut_torn_line(path)
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
                    "take other problems, or --spend-again if this is meant"
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
        files.append_whole(file, b"".join(json.dumps(line).encode() + b"\n" for line in fresh))
    return {
        "labels": len({question_hash(p) for p in prompts}),
        "labels_new": len(known) - before,
        "labels_spent": len(known),
    }
