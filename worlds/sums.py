"""Stage 0: a small world of our own, so that every stage runs on a laptop with no download.

    python -m worlds.sums --out runs/toy
    python -m worlds.sums --out runs/long --terms 10:20 --slips 0.3 --styles ledger

Writes prompts, text corpora and untrained models (transformers folders, Llama architecture).
Nothing is trained here: `train.py --method sft` does the pre-training on these corpora.

A problem is a running sum, `7+5-3+8=?`.  A good answer works step by step and ends in `#17`.
The same work can be written in four styles, so that a rubric that rewards a style instead of
the arithmetic can be caught doing so:

    lines   7+5=12 / 12-3=9 / 9+8=17 / #17        (/ is a line break)
    chain   7+5=12-3=9+8=17 / #17
    totals  7,12,9,17 / #17
    ledger  7 / +5:12 / -3:9 / +8:17 / #17

Two corpora make a student that has the skill but not the habit.  `clean` is right work in all
styles.  `mixed` is careless text: guesses, slips that propagate, skipped steps, a little right
work.  A model trained on clean and then briefly on mixed is mostly wrong, but samples the right
answer often enough to learn from it.  `facts` are arbitrary pairs to learn by heart, `37:?` /
`#82`: new knowledge that can cost an old skill.

Other worlds (the prompts of one --seed and --terms are the same in all of them):

    --slips 0.3          mixed is right work, with a slip that propagates in 30 % of the texts
    --right 0.4          40 % of mixed is right work (2605.12483)
    --styles lines       texts in these styles only (2604.13010); solutions stay in lines
    --loops 16000        also `looping`, clean with 7 % endless texts, for a teacher with the
                         copy prior of a real language model, and `planted`, mixed with 40 %
                         (2604.08527); a loop is 7+5=12 / 12-3=9 / 12-3=9 / ... without # or end
    --student-merges 16  one more model, `student_merged`, with 16 tokens of several characters
                         learnt by BPE; 20:40: one token for each of these numbers (2605.07711)
    --hints 0.5          half of clean has the solution behind the question (2601.18734); also
                         prompts of that form, `told_train`, `told_dev`, `told_heldout`, and
                         `wrong_train` with the solution of another problem
    --second-end         the teacher ends an answer with <|eot|>, its student with <|end|>, in
                         one vocabulary (2609.20511)

A problem belongs to train, dev or heldout by the hash of its text; the corpora are made of
train problems.  Every file has its own random stream: asking for more of one changes no other.

Simplifications: 1. answers have 2-60 characters (30 terms: up to 250; a loop: 320); 2. careless
text is written by a script; 3. totals stay in 0..40.
"""

import argparse
import json
import re
from functools import partial

import numpy as np
from tokenizers import Tokenizer, models, trainers

from opd.cli import run
from opd.files import read
from opd.records import BadInput
from worlds.build import (
    END,
    SIZES,
    SYMBOLS,
    add_corpus_flags,
    build_tokenizer,
    distinct,
    new_folder,
    share,
    split_of,
    stream,
    summary,
    user,
    world_parser,
    write_corpus,
    write_model,
    write_rows,
    write_splits,
)

STYLES = ("lines", "chain", "totals", "ledger")
SECOND_END = "<|eot|>"
FACTS = 32
# characters; eval.py searches the last 256 for repetition
LOOP_LENGTH = 320


def two_digits(low, high):
    """The pairs of digits that become one token each, as a foreign vocabulary has them."""
    return [(str(n)[0], str(n)[1]) for n in range(low, high + 1)]


TWO_DIGITS = two_digits(10, 40)

# ---- problems


def running_totals(terms):
    """[7, 5, -3, 8] -> [7, 12, 9, 17]."""
    return np.cumsum(terms).tolist()


def expression_of(terms):
    """[7, 5, -3, 8] -> "7+5-3+8"."""
    return str(terms[0]) + "".join(f"{t:+d}" for t in terms[1:])


def problems(rng, split, terms=(2, 6)):
    """Endless random problems of one split: signed single-digit terms, totals in 0..40."""
    while True:
        count = rng.integers(terms[0], terms[1] + 1)
        numbers = [int(rng.integers(1, 10))]
        for _ in range(count - 1):
            size = int(rng.integers(1, 10))
            numbers.append(-size if sum(numbers) >= size and rng.random() < 0.5 else size)
        if max(running_totals(numbers)) <= 40 and split_of(expression_of(numbers)) == split:
            yield numbers


# ---- answers


def write_work(terms, totals, style, final=None):
    """The work for `terms` with the given running totals (right or not) in one of the STYLES.

    write_work([7, 5, -3], [7, 12, 9], "chain") -> "7+5=12-3=9\\n#9"."""
    steps = list(zip(totals[:-1], terms[1:], totals[1:]))
    if style == "lines":
        work = "".join(f"{before}{term:+d}={after}\n" for before, term, after in steps)
    elif style == "chain":
        work = str(totals[0]) + "".join(f"{term:+d}={after}" for _, term, after in steps) + "\n"
    elif style == "totals":
        work = ",".join(map(str, totals)) + "\n"
    elif style == "ledger":
        work = f"{totals[0]}\n" + "".join(f"{term:+d}:{after}\n" for _, term, after in steps)
    else:
        raise ValueError(f"style: expected one of {STYLES}, got {style!r}")
    return f"{work}#{totals[-1] if final is None else final}"


def solution_of(terms):
    return write_work(terms, running_totals(terms), "lines")


def clean_answer(rng, terms, styles=STYLES):
    return write_work(terms, running_totals(terms), str(rng.choice(styles)))


def with_slip(rng, totals):
    """One step goes wrong by 1-3, and all later ones build on it: [7, 12, 9, 17] -> for one
    [7, 12, 11, 19]."""
    at = int(rng.integers(1, len(totals)))
    slip = int(rng.choice([-3, -2, -1, 1, 2, 3]))
    return totals[:at] + [total + slip for total in totals[at:]]


def mixed_answer(rng, terms, styles=STYLES, right=0.1):
    """Careless text: 45 % guesses, 25 % slips that propagate, 20 % skipped steps, 10 % right
    work.  Another share of right work leaves the other three in the same proportions."""
    totals = running_totals(terms)
    kind = rng.random()
    scale = (1 - right) / 0.9
    if kind < 0.45 * scale:
        return f"#{max(0, totals[-1] + int(rng.integers(-6, 7)))}"
    style = str(rng.choice(styles))
    if kind < 0.70 * scale:
        return write_work(terms, with_slip(rng, totals), style)
    if kind < 0.90 * scale:  # the first steps, then a guessed end
        kept = int(rng.integers(2, len(terms))) if len(terms) > 2 else 1
        guess = max(0, totals[-1] + int(rng.integers(-4, 5)))
        return write_work(terms[:kept], totals[:kept], style, final=guess)
    return write_work(terms, totals, style)


def slipping_answer(rng, terms, share, styles=STYLES):
    """Right work, with a slip that propagates in a share of the texts."""
    totals = running_totals(terms)
    style = str(rng.choice(styles))
    if rng.random() < share:
        totals = with_slip(rng, totals)
    return write_work(terms, totals, style)


def loop_answer(rng, terms, styles=STYLES, length=LOOP_LENGTH):
    """A right beginning whose last step is repeated, `length` characters in all, without #.

    [7, 5, -3, 8] begun as far as -3: "7+5=12\\n12-3=9\\n12-3=9\\n12-3=9\\n..." in lines,
    "7,12,9,9,9,..." in totals."""
    totals = running_totals(terms)
    style = str(rng.choice(styles))

    def work(count):
        text = write_work(terms[:count], totals[:count], style).rpartition("#")[0]
        return text.rstrip("\n") if style in ("chain", "totals") else text

    # a beginning is at most a fifth of the text: its last 256 characters are then all loop
    fitting = [n for n in range(3, len(terms) + 1) if len(work(n)) <= length // 5]
    begun = int(rng.choice([2, *fitting]))
    step = work(begun).removeprefix(work(begun - 1))
    return (work(begun) + step * length)[:length]


def with_loops(rng, terms, make_answer, share, styles):
    """What `make_answer` writes, and in a share of the texts a loop in its place."""
    if rng.random() < share:
        return loop_answer(rng, terms, styles)
    return make_answer(rng, terms)


# ---- files


def question(terms):
    return user(expression_of(terms) + "=?")


def telling(messages, solution):
    """The question with a solution behind it."""
    return user(messages[0]["content"] + "\n" + solution)


def prompts(rng, split, count, terms):
    for i, problem in enumerate(distinct(problems(rng, split, terms), count, split)):
        yield {
            "id": f"{split[0]}{i:05d}",
            "messages": question(problem),
            "answer": str(sum(problem)),
            "solution": solution_of(problem),
        }


def texts(rng, make_answer, count, terms, hints=0.0):
    """(messages, text) pairs for a corpus; hints: share of questions with a solution behind
    them."""
    coin = rng.spawn(1)[0]  # its own stream: --hints changes no text
    source = problems(rng, "train", terms)
    for _ in range(count):
        problem = next(source)
        text = make_answer(rng, problem)
        messages = question(problem)
        if coin.random() < hints:
            messages = telling(messages, solution_of(problem))
        yield messages, text


def write_told(folder, rng):
    """Prompts with a solution behind the question: in `told_*` its own, in `wrong_train` that
    of a problem with another answer."""
    for split in ("train", "dev", "heldout"):
        rows = list(read(folder / f"{split}.jsonl", "prompts"))
        told = (r | {"messages": telling(r["messages"], r["solution"])} for r in rows)
        write_rows(folder / f"told_{split}.jsonl", told)
        if split == "train":
            train = rows
    wrong = []
    for row in train:
        others = [other for other in rng.choice(train, 64) if other["answer"] != row["answer"]]
        if not others:
            raise BadInput(
                f"--hints: expected --train-prompts with different answers, for a wrong "
                f"solution is another's, got {len(train)} of which nearly all have "
                f"{row['answer']}"
            )
        wrong.append(row | {"messages": telling(row["messages"], others[0]["solution"])})
    write_rows(folder / "wrong_train.jsonl", wrong)


def write_facts(folder, rng):
    """Two-digit numbers, each with an arbitrary one: texts that state them, and prompts."""
    names = 10 + rng.permutation(90)[:FACTS]
    values = rng.integers(0, 100, FACTS)
    asked = [{"id": f"f{i:03d}", "messages": user(f"{n}:?")} for i, n in enumerate(names)]
    stated = {"sample": 0, "policy": {"model": "worlds.sums facts"}}
    write_rows(
        folder / "facts_prompts.jsonl",
        (row | {"answer": str(value)} for row, value in zip(asked, values)),
    )
    write_rows(
        folder / "facts.jsonl",
        (
            row | stated | {"text": f"#{value}", "finish_reason": "stop"}
            for row, value in zip(asked, values)
        ),
    )


# ---- models


def learn_merges(texts, count):
    """The `count` most frequent pairs of neighbours, one after another, as byte-pair encoding
    merges them: [("=", "1"), ...].  Line breaks and spaces bound nothing here."""
    core = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SYMBOLS) + count, initial_alphabet=list(SYMBOLS), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]][:count]


def write_models(folder, student_merges, second_end, seed):
    merges = {"student": (), "teacher": (), "teacher_merged_digits": TWO_DIGITS}
    if student_merges:
        low, high = student_merges
        if high:
            merges["student_merged"] = two_digits(low, high)
        else:
            clean = (row["text"] for row in read(folder / "clean.jsonl", "answers"))
            merges["student_merged"] = learn_merges(clean, low)
    special = (SECOND_END,) if second_end else ()
    for name, pairs in merges.items():
        end = SECOND_END if second_end and name == "teacher" else END
        tokenizer = build_tokenizer(SYMBOLS, pairs, special, end)
        write_model(folder / name, tokenizer, SIZES[name.split("_")[0]], seed)


# ---- command line


def styles_type(text):
    styles = tuple(text.split(","))
    if not set(styles) <= set(STYLES) or len(set(styles)) < len(styles):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(STYLES)}, each once, with commas between, got {text}"
        )
    return styles


def merges_type(text):
    """ "16" -> (16, 0), sixteen learnt merges; "20:40" -> (20, 40), these numbers."""
    found = re.fullmatch(r"(\d{1,4})(?::(\d\d))?", text)
    low, high = (int(n or 0) for n in found.groups()) if found else (0, 0)
    if not low or high and not 10 <= low <= high:
        raise argparse.ArgumentTypeError(
            f"expected a number of merges, at least 1, or A:B with 10 <= A <= B <= 99, got "
            f"{text}"
        )
    return low, high


def flags():
    p = world_parser(__doc__, "runs/toy")
    add_corpus_flags(p, clean=100000, mixed=16000, terms=(2, 30, "2:6"))
    p.add_argument(
        "--styles", type=styles_type, default=",".join(STYLES), help="styles of the texts"
    )
    p.add_argument("--slips", type=share, help="mixed is right work with so many slips")
    p.add_argument("--right", type=share, default=0.1, help="right work in mixed")
    p.add_argument("--hints", type=share, default=0.0, help="clean with a solution told")
    p.add_argument("--loops", type=int, default=0, help="texts in looping and in planted")
    p.add_argument("--loop-share", type=share, default=0.07, help="loops in looping")
    p.add_argument("--planted-share", type=share, default=0.4, help="loops in planted")
    p.add_argument("--student-merges", type=merges_type, help="longer tokens of student_merged")
    p.add_argument("--second-end", action="store_true", help="the teacher ends with <|eot|>")
    return p


def main(argv=None):
    args = flags().parse_args(argv)
    clean = partial(clean_answer, styles=args.styles)
    mixed = partial(mixed_answer, styles=args.styles, right=args.right)
    if args.slips is not None:
        mixed = partial(slipping_answer, styles=args.styles, share=args.slips)
    # random stream, name, who writes, how many, hints
    corpora = [
        (3, "clean", clean, args.clean, args.hints),
        (4, "mixed", mixed, args.mixed, 0),
    ]
    if args.loops:
        loops = partial(with_loops, styles=args.styles)
        looping = partial(loops, make_answer=clean, share=args.loop_share)
        planted = partial(loops, make_answer=mixed, share=args.planted_share)
        corpora.append((6, "looping", looping, args.loops, 0))
        corpora.append((7, "planted", planted, args.loops, 0))
    made = {"train": args.train_prompts, "heldout": args.eval_prompts}
    ask = partial(prompts, terms=args.terms)
    with new_folder(args.out, args.overwrite) as folder:
        write_splits(folder, args.train_prompts, args.eval_prompts, args.seed, ask)
        for number, name, make_answer, count, hints in corpora:
            pairs = texts(stream(args.seed, number), make_answer, count, args.terms, hints)
            write_corpus(folder / f"{name}.jsonl", "worlds.sums", pairs)
            made[name] = count
        if args.hints:
            write_told(folder, stream(args.seed, 8))
        write_facts(folder, stream(args.seed, 5))
        write_models(folder, args.student_merges, args.second_end, args.seed)
    return summary("sums", args.out, made | {"facts": FACTS})


if __name__ == "__main__":
    run(main)
