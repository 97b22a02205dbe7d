"""Stage 0: a small world of our own, so that every stage runs on a laptop with no download.

    python -m worlds.sums --out runs/toy
    python -m worlds.sums --task forks --out runs/forks
    python -m worlds.sums --task tools --out runs/tools

Writes prompts, text corpora and untrained models (transformers folders, Llama architecture).
Nothing is trained here: `train.py --method sft` does the pre-training on these corpora, like
any other training.

--task sums is a running sum, `7+5-3+8=?`.  A good answer works step by step and ends in `#17`.
The same work can be written in four styles, so that a rubric which rewards a style instead of
the arithmetic can be caught doing so:

    lines   7+5=12 / 12-3=9 / 9+8=17 / #17        (/ is a line break)
    chain   7+5=12-3=9+8=17 / #17
    totals  7,12,9,17 / #17
    ledger  7 / +5:12 / -3:9 / +8:17 / #17

Two corpora make a student that has the skill but not the habit.  `clean` is right work in all
styles.  `mixed` is what the web is like: terse guesses, slips that propagate, skipped steps, a
little right work.  A model trained on clean and then briefly on mixed answers badly most of the
time, yet the right answer is always within its reach: that is a student worth distilling.  One
that never learned the arithmetic would only measure how fast a method teaches it.

Flags make other worlds of it; the prompts of one --seed and --terms are the same in all of
them:

    --terms 10:20 --slips 0.3   long derivations, in which an early slip spoils all that
                                follows.  `mixed` is then right work, with a
                                slip that propagates in 30 % of the texts, and nothing else
    --right 0.4                 40 % of `mixed` is right work: text that is worth reading, whose
                                reader gives a right answer that often (2605.12483)
    --styles lines              texts in these styles only: a teacher's format is not its
                                student's (2604.13010)
    --loops 16000               text can run on without an end (2604.08527).  `looping` is clean
                                with 7 % loops, for a teacher with the
                                copy prior of a real language model; `planted` is mixed with 40
                                %, for a student that has the disease already.  A loop is 7+5=12
                                / 12-3=9 / 12-3=9 / 12-3=9 / ... for 320 characters: no #, no
                                end token
    --student-merges 16         one more untrained student, `student_merged`, whose vocabulary
                                has 16 tokens of several characters, learnt by BPE from
                                `clean`; 20:40 in place of 16: the numbers from 20 to 40 as one
                                token each.  The teacher spells them out (2605.07711)
    --hints 0.5                 half of `clean` answers a question with its solution behind it:
                                a model that can use a solution which it is told (2601.18734).
                                `told_train`, `told_dev` and `told_heldout` are prompts like
                                that, `wrong_train` those with the solution of another problem
    --second-end                the teacher ends an answer with <|eot|>, its student with
                                <|end|>, in one vocabulary (2609.20511)

Splits: a problem belongs to train, dev or held-out by the hash of its text, so no file can
share one with another. The corpora are made of train problems only.  `facts` is new knowledge
that costs an old skill: arbitrary pairs to learn by heart, `37:?` / `#82`, as a corpus and, in
`facts_prompts`, as questions.

--task forks is a world so small that every answer of a model can be listed with its
probability, to ask which answers a policy can write at all before and after a training run
(worlds/forks.py, `methods.unified`).

Every file has random numbers of its own, so asking for more of one changes no other.

--task tools is for agents: chains of operations to be worked out with a calculator, as token
records with the calculator's answers in them (worlds/agents.py). Its `clean` teaches to call,
to go on after an error and to try again in an --outage; `mixed` to call badly.  A third model,
`large`, is a larger teacher.

Simplifications: 1. three tasks; 2. answers are 2-60 characters (30 terms: up to 250; a loop:
320); 3. the "web" is a script; 4. totals stay in 0..40.
"""

import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from opd import records
from opd.files import parser, run, write_atomically
from opd.policy import identity_of
from opd.tools import Toolbox
from worlds import agents, forks

STYLES = ("lines", "chain", "totals", "ledger")
# hidden width, layers, heads
SIZES = {"student": (64, 2, 4), "teacher": (96, 2, 4), "large": (160, 2, 4)}
SYMBOLS = "0123456789+-=?#,:\n "
# merged into one token each: a second, foreign vocabulary
TWO_DIGITS = [(str(n)[0], str(n)[1]) for n in range(10, 41)]
# pad, user, assistant and end are one token each; roles open with their mark and an answer
# closes with <|end|>
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SECOND_END = "<|eot|>"
# what --loops brings along
LOOP_FLAGS = {"loop_share": 0.07, "planted_share": 0.4, "loop_tokens": 320}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ---- problems


def split_of(expression):
    """`train`, `dev` (1 in 10) or `heldout` (1 in 10): a function of the problem's text
    alone."""
    bucket = hashlib.sha256(expression.encode()).digest()[0] % 10
    return {0: "heldout", 1: "dev"}.get(bucket, "train")


def running_totals(terms):
    """[7, 5, -3, 8] -> [7, 12, 9, 17]."""
    return np.cumsum(terms).tolist()


def expression_of(terms):
    """[7, 5, -3, 8] -> "7+5-3+8"."""
    return str(terms[0]) + "".join(f"{t:+d}" for t in terms[1:])


def problems(rng, split, terms=(2, 6)):
    """Endless random problems of one split as lists of signed single-digit terms whose totals
    stay in 0..40."""
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
    """The work for `terms` with the given running totals (right or not) in one of the four
    STYLES.

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


def clean_answer(rng, terms, styles=STYLES):
    return write_work(terms, running_totals(terms), str(rng.choice(styles)))


def with_slip(rng, totals):
    """One step goes wrong by 1-3, everything after it builds on the wrong total: [7, 12, 9, 17]
    -> [7, 12, 11, 19], for one."""
    at, slip = int(rng.integers(1, len(totals))), int(rng.choice([-3, -2, -1, 1, 2, 3]))
    return [t + (slip if i >= at else 0) for i, t in enumerate(totals)]


def mixed_answer(rng, terms, styles=STYLES, right=0.1):
    """What a careless page would say: 45 % a guess, 25 % a slip that propagates, 20 % skipped
    steps, and `right`, 10 %, right work; with another share of right work the other three have
    what is left in the same proportions."""
    totals, kind, scale = running_totals(terms), rng.random(), (1 - right) / 0.9
    if kind < 0.45 * scale:
        return f"#{max(0, totals[-1] + int(rng.integers(-6, 7)))}"
    style = str(rng.choice(styles))
    if kind < 0.70 * scale:
        return write_work(terms, with_slip(rng, totals), style)
    if kind < 0.90 * scale:  # the first steps, then a jump to a guessed end
        kept = int(rng.integers(2, len(terms))) if len(terms) > 2 else 1
        return write_work(
            terms[:kept],
            totals[:kept],
            style,
            final=max(0, totals[-1] + int(rng.integers(-4, 5))),
        )
    return write_work(terms, totals, style)


def slipping_answer(rng, terms, share, styles=STYLES):
    """Right work, with a slip that propagates in a share of the texts."""
    totals, style = running_totals(terms), str(rng.choice(styles))
    return write_work(terms, with_slip(rng, totals) if rng.random() < share else totals, style)


def loop_answer(rng, terms, styles=STYLES, length=LOOP_FLAGS["loop_tokens"]):
    """A right beginning whose last step is written again and again, `length` characters in all:
    it never comes to its #.

    [7, 5, -3, 8] begun as far as -3: "7+5=12\\n12-3=9\\n12-3=9\\n12-3=9\\n..." in lines,
    "7,12,9,9,9,..." in totals."""
    totals, style = running_totals(terms), str(rng.choice(styles))

    # of the first `count` terms; chain and totals go on in the line that they have begun
    def work(count):
        text = write_work(terms[:count], totals[:count], style).rpartition("#")[0]
        return text.rstrip("\n") if style in ("chain", "totals") else text

    # at most a fifth is beginning: the last 256 of 320 characters, which eval.py searches for
    # repetition, are then all loop
    begun = int(
        rng.choice(
            [n for n in range(2, len(terms) + 1) if n == 2 or len(work(n)) <= length // 5]
        )
    )
    step = work(begun).removeprefix(work(begun - 1))
    return (work(begun) + step * length)[:length]


def with_loops(rng, terms, make_answer, share, styles, length):
    """What `make_answer` writes, and in a share of the texts a loop in its place."""
    return (
        loop_answer(rng, terms, styles, length)
        if rng.random() < share
        else make_answer(rng, terms)
    )


# ---- the world of forks

# ---- files


def question(terms):
    return [{"role": "user", "content": expression_of(terms) + "=?"}]


def telling(messages, solution):
    """The question with a solution behind it."""
    return [messages[0] | {"content": messages[0]["content"] + "\n" + solution}]


def write_prompts(path, rng, split, count, prefix, lengths):
    seen, rows, repeats = set(), [], 0
    source = problems(rng, split, lengths)
    while len(rows) < count:
        terms = next(source)
        if expression_of(terms) in seen:
            repeats += 1
            # of two terms there are about 100 problems to train on: a search for more would not
            # end
            if repeats == 10000:
                flag = "--train-prompts" if split == "train" else "--eval-prompts"
                raise records.BadInput(
                    f"{flag} {count}: problems of --terms {lengths[0]}:{lengths[1]} that "
                    f"belong to {split} are hardly more than "
                    f"{len(rows)}: expected no more than that, or longer --terms"
                )
            continue
        repeats = 0
        seen.add(expression_of(terms))
        rows.append(
            {
                "id": f"{prefix}{len(rows):05d}",
                "messages": question(terms),
                "answer": str(sum(terms)),
                "solution": write_work(terms, running_totals(terms), "lines"),
            }
        )
    write_atomically(path, (json.dumps(r) + "\n" for r in rows))


def write_corpus(path, rng, make_answer, count, source, hints=0.0):
    """A corpus is a file of `answers` that bring their question along, ready for `train.py
    --method sft`.  source: an iterator of problems; hints: share of questions with a solution
    behind them."""
    coin = rng.spawn(1)[0]  # numbers of its own: the texts are those of a corpus without hints

    def rows():
        for i in range(count):
            terms = next(source)
            text = make_answer(rng, terms)
            asked = (
                question(terms)
                if coin.random() >= hints
                else telling(question(terms), write_work(terms, running_totals(terms), "lines"))
            )
            # a loop did not end, and training adds an end token only to what did
            finish = "stop" if "#" in text else "length"
            yield (
                json.dumps(
                    {
                        "id": f"c{i:06d}",
                        "sample": 0,
                        "policy": {"model": f"worlds.sums {path.stem}"},
                        "messages": asked,
                        "text": text,
                        "finish_reason": finish,
                    }
                )
                + "\n"
            )

    write_atomically(path, rows())


def write_told(folder, rng):
    """Prompts with a solution behind the question: in `told_*` its own, in `wrong_train` that
    of another problem with another answer."""
    splits = {
        split: [json.loads(line) for line in open(folder / f"{split}.jsonl", encoding="utf-8")]
        for split in ("train", "dev", "heldout")
    }
    train = splits["train"]
    wrong = []
    for row in train:
        others = [other for other in rng.choice(train, 64) if other["answer"] != row["answer"]]
        if not others:
            raise records.BadInput(
                f"--hints: expected --train-prompts with different answers, for a wrong "
                f"solution is another's, got {len(train)} of which nearly all "
                f"have {row['answer']}"
            )
        wrong.append(row | {"messages": telling(row["messages"], others[0]["solution"])})
    told = {
        f"told_{split}": [
            row | {"messages": telling(row["messages"], row["solution"])} for row in rows
        ]
        for split, rows in splits.items()
    }
    for name, rows in (told | {"wrong_train": wrong}).items():
        write_atomically(folder / f"{name}.jsonl", (json.dumps(row) + "\n" for row in rows))


def write_facts(folder, rng, count):
    """`count` two-digit numbers, each with an arbitrary one: texts that state them, and prompts
    that ask for them."""
    names, values = 10 + rng.permutation(90)[:count], rng.integers(0, 100, count)
    asked = [
        {"id": f"f{i:03d}", "messages": [{"role": "user", "content": f"{name}:?"}]}
        for i, name in enumerate(names)
    ]
    write_atomically(
        folder / "facts_prompts.jsonl",
        (json.dumps(row | {"answer": str(value)}) + "\n" for row, value in zip(asked, values)),
    )
    write_atomically(
        folder / "facts.jsonl",
        (
            json.dumps(
                row
                | {
                    "sample": 0,
                    "policy": {"model": "worlds.sums facts"},
                    "text": f"#{value}",
                    "finish_reason": "stop",
                }
            )
            + "\n"
            for row, value in zip(asked, values)
        ),
    )


def learn_merges(texts, count):
    """The `count` most frequent pairs of neighbours, one after another, as byte-pair encoding
    merges them: [("=", "1"), ...].  Line breaks and spaces bound nothing here."""

    core = Tokenizer(models.BPE())
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=len(SYMBOLS) + count, initial_alphabet=list(SYMBOLS), show_progress=False
        ),
    )
    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]][:count]


def build_tokenizer(
    symbols=SYMBOLS, merges=(), more_special=(), end="<|end|>", template=CHAT_TEMPLATE
):
    """One token a character; with `merges`, pairs of characters, also one token for each of
    these pairs.  `end` closes an answer: with two ends among the special tokens, two tokenizers
    can share every id and still not end alike."""

    pieces = [*SPECIAL, *symbols, *(a + b for a, b in merges), *more_special]
    core = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(merges))
    )
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token=end,
        additional_special_tokens=[t for t in (*SPECIAL[1:], *more_special) if t != end],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def write_model(folder, tokenizer, size, seed):
    """An untrained tiny Llama of `size` (width, layers, heads) as a folder that transformers,
    vLLM and lm-eval load as it is."""

    transformers.utils.logging.disable_progress_bar()
    width, layers, heads = size
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_sums(args):
    """Refuses flags of --task sums that cannot be; --terms "2:6" becomes (2, 6), --styles
    "lines,ledger" ("lines", "ledger")."""
    if not 1 <= args.facts <= 90:
        raise records.BadInput(f"--facts: expected 1 to 90, got {args.facts}")
    bounds = re.fullmatch(r"(\d+):(\d+)", args.terms)
    lengths = tuple(map(int, bounds.groups())) if bounds else (0, 0)
    if not 2 <= lengths[0] <= lengths[1] <= 30:
        raise records.BadInput(
            f"--terms: expected FEWEST:MOST with 2 <= FEWEST <= MOST <= 30, got {args.terms}"
        )
    styles = tuple(args.styles.split(","))
    if not set(styles) <= set(STYLES) or len(set(styles)) < len(styles):
        raise records.BadInput(
            f"--styles: expected some of {','.join(STYLES)}, each once, with commas between, "
            f"got {args.styles!r}"
        )
    args.terms, args.styles = lengths, styles
    if args.loops < 0:
        raise records.BadInput(f"--loops: expected 0 or a number of texts, got {args.loops}")
    for name, default in LOOP_FLAGS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.loops:
            raise records.BadInput(
                f"--{name.replace('_', '-')} {getattr(args, name)}: belongs to the corpora "
                f"of --loops, expected --loops N with it"
            )
    if args.slips is not None and args.right is not None:
        raise records.BadInput(
            f"--right {args.right}: belongs to mixed text of several kinds, expected no "
            f"--slips with it"
        )
    args.right = 0.1 if args.right is None else args.right
    for name in ("slips", "right", "hints", "loop_share", "planted_share"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            raise records.BadInput(
                f"--{name.replace('_', '-')}: expected a share from 0 to 1, got "
                f"{getattr(args, name)}"
            )
    if args.student_merges is not None:
        found = re.fullmatch(r"(\d{1,4})(?::(\d\d))?", args.student_merges)
        low, high = (int(x or 0) for x in found.groups()) if found else (0, 0)
        if not low or high and not 10 <= low <= high:
            raise records.BadInput(
                f"--student-merges: expected a number of merges, at least 1, or A:B with 10 "
                f"<= A <= B <= 99, got {args.student_merges!r}"
            )
        args.student_merges = low, high
    # a question of 30 terms is 63 tokens, and the models have 512 positions
    if not 32 <= args.loop_tokens <= 448:
        raise records.BadInput(f"--loop-tokens: expected 32 to 448, got {args.loop_tokens}")


def fill_sums(folder, args):
    """Everything of --task sums; returns (how much of what, the same as a sentence)."""
    files = (
        ("train", args.train_prompts, "t"),
        ("dev", args.eval_prompts, "d"),
        ("heldout", args.eval_prompts, "h"),
    )
    for number, (split, count, prefix) in enumerate(files):
        write_prompts(
            folder / f"{split}.jsonl",
            np.random.default_rng([args.seed, number]),
            split,
            count,
            prefix,
            args.terms,
        )
    clean = partial(clean_answer, styles=args.styles)
    mixed = (
        partial(mixed_answer, styles=args.styles, right=args.right)
        if args.slips is None
        else partial(slipping_answer, share=args.slips, styles=args.styles)
    )
    corpora = {"clean": (3, clean, args.clean), "mixed": (4, mixed, args.mixed)}
    if args.loops:
        loops = partial(with_loops, styles=args.styles, length=args.loop_tokens)
        corpora |= {
            "looping": (
                6,
                partial(loops, make_answer=clean, share=args.loop_share),
                args.loops,
            ),
            "planted": (
                7,
                partial(loops, make_answer=mixed, share=args.planted_share),
                args.loops,
            ),
        }
    for name, (number, make_answer, count) in corpora.items():
        rng = np.random.default_rng([args.seed, number])
        write_corpus(
            folder / f"{name}.jsonl",
            rng,
            make_answer,
            count,
            problems(rng, "train", args.terms),
            args.hints if name == "clean" else 0,
        )
    if args.hints:
        write_told(folder, np.random.default_rng([args.seed, 8]))
    write_facts(folder, np.random.default_rng([args.seed, 5]), args.facts)
    models = {"student": (), "teacher": (), "teacher_merged_digits": TWO_DIGITS}
    if args.student_merges:
        low, high = args.student_merges
        models["student_merged"] = (
            [(str(n)[0], str(n)[1]) for n in range(low, high + 1)]
            if high
            else learn_merges(
                [
                    json.loads(line)["text"]
                    for line in open(folder / "clean.jsonl", encoding="utf-8")
                ],
                low,
            )
        )
    for name, merges in models.items():
        tokenizer = (
            build_tokenizer(merges=merges)
            if not args.second_end
            else build_tokenizer(
                merges=merges,
                more_special=(SECOND_END,),
                end=SECOND_END if name == "teacher" else "<|end|>",
            )
        )
        write_model(folder / name, tokenizer, SIZES[name.split("_")[0]], args.seed)
    texts = {name: count for name, (_, _, count) in corpora.items()}
    counts = (
        {"train": args.train_prompts, "heldout": args.eval_prompts}
        | texts
        | {"facts": args.facts}
    )
    return counts, (
        f"{args.train_prompts} train, {args.eval_prompts} dev and heldout prompts, "
        f"{args.clean} clean and {args.mixed} mixed texts, "
        + (f"{args.loops} looping and {args.loops} planted texts, " if args.loops else "")
        + f"{args.facts} facts, {len(models)} untrained models"
        + (f", teacher ends with {SECOND_END}" if args.second_end else "")
    )


def fill_forks(folder, args):
    """Everything of --task forks; returns the same."""
    digits = forks.DIGITS
    # in turn: any run of 8 lines holds each problem once
    for split, count, prefix in (
        ("train", args.train_prompts, "t"),
        ("dev", digits, "d"),
        ("heldout", digits, "h"),
    ):
        rows = (
            {
                "id": f"{prefix}{i:05d}",
                "messages": question([i % digits]),
                "answer": str(forks.successor([i % digits])),
            }
            for i in range(count)
        )
        write_atomically(folder / f"{split}.jsonl", (json.dumps(row) + "\n" for row in rows))
    corrupt = [
        {
            "id": f"{letters}-{x}",
            "messages": question([x]) + [{"role": "assistant", "content": letters}],
            "answer": str(forks.successor([x])),
        }
        # the last message is the assistant's, for rollout.py to go on from
        for letters in forks.PREFIXES
        for x in range(digits)
    ]
    write_atomically(folder / "corrupt.jsonl", (json.dumps(row) + "\n" for row in corrupt))
    for number, (name, make_answer) in enumerate(forks.CORPORA.items()):
        rng = np.random.default_rng([args.seed, number])
        write_corpus(
            folder / f"{name}.jsonl", rng, make_answer, args.texts, forks.problems(rng)
        )
    # of one size: the same seed would make them the same model
    for number, name in enumerate(("student", "teacher")):
        write_model(
            folder / name,
            build_tokenizer(forks.SYMBOLS, forks.MERGES),
            forks.SIZE,
            2 * args.seed + number,
        )
    counts = {
        "train": args.train_prompts,
        "heldout": digits,
        "corrupt": len(corrupt),
        "texts": args.texts,
    }
    return counts, (
        f"{args.train_prompts} train, {digits} dev and heldout, {len(corrupt)} corrupt "
        f"prompts, {args.texts} texts in each of "
        f"{', '.join(forks.CORPORA)}, 2 untrained models"
    )


def check_tools(args):
    """Refuses flags of --task tools that cannot be."""
    bounds = re.fullmatch(r"(\d+):(\d+)", args.terms)
    lengths = tuple(map(int, bounds.groups())) if bounds else (0, 0)
    if not 1 <= lengths[0] <= lengths[1] <= 8:
        raise records.BadInput(
            f"--terms: expected FEWEST:MOST operations with 1 <= FEWEST <= MOST <= 8, got "
            f"{args.terms}"
        )
    args.terms = lengths
    if not 0 <= args.outage < 1:
        raise records.BadInput(
            f"--outage: expected a share from 0 to below 1, got {args.outage}"
        )


def fill_tools(folder, args):
    """Everything of --task tools; returns the same."""

    tokenizer = build_tokenizer(
        agents.SYMBOLS, more_special=agents.MORE_SPECIAL, template=agents.TEMPLATE
    )
    writer = SimpleNamespace(
        tokenizer=tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        template_options={},
        identity=identity_of("worlds.sums", None, tokenizer, {}),
    )
    toolbox = Toolbox("calculator", {"outage": args.outage}, "brackets", agents.MOST_STEPS)

    def asked(name, number, split, count, unique=True):
        rng, seen, repeats = np.random.default_rng([args.seed, number]), set(), 0
        source = agents.chains(rng, split, args.terms, split_of)
        while count:
            chain = next(source)
            if unique and ",".join(chain) in seen:
                repeats += 1
                if repeats == 10000:
                    flag = "--train-prompts" if split == "train" else "--eval-prompts"
                    raise records.BadInput(
                        f"{flag}: problems of --terms {args.terms[0]}:{args.terms[1]} that "
                        f"belong to {split} are hardly more than {len(seen)}: "
                        f"expected no more, or longer --terms"
                    )
                continue
            repeats, count = 0, count - 1
            seen.add(",".join(chain) if unique else "")
            yield (
                rng,
                chain,
                {
                    "id": f"{name}{len(seen) if unique else count:06d}",
                    "messages": [{"role": "user", "content": ",".join(chain) + "=?"}],
                },
            )

    files = (
        ("train", args.train_prompts, "t"),
        ("dev", args.eval_prompts, "d"),
        ("heldout", args.eval_prompts, "h"),
    )
    for number, (split, count, prefix) in enumerate(files):
        write_atomically(
            folder / f"{split}.jsonl",
            (
                json.dumps(prompt | {"answer": str(agents.result(chain))}) + "\n"
                for _, chain, prompt in asked(prefix, number, split, count)
            ),
        )
    for number, name in enumerate(agents.STEPS, 3):
        rows = (
            prompt
            | {"sample": 0, "policy": writer.identity | {"model": f"worlds.sums {name}"}}
            | agents.episode(
                rng, writer, toolbox, prompt, chain, agents.STEPS[name], prompt["id"]
            )
            for rng, chain, prompt in asked(
                name[0], number, "train", getattr(args, name), unique=False
            )
        )
        write_atomically(folder / f"{name}.jsonl", (json.dumps(row) + "\n" for row in rows))
    for name, size in SIZES.items():
        write_model(folder / name, tokenizer, size, args.seed)
    counts = {"train": args.train_prompts, "heldout": args.eval_prompts} | {
        name: getattr(args, name) for name in agents.STEPS
    }
    return (
        counts,
        f"{args.train_prompts} train, {args.eval_prompts} dev and heldout prompts, "
        f"{args.clean} clean and {args.mixed} mixed episodes, {len(SIZES)} "
        f"untrained models",
    )


TASKS = {
    "sums": (
        fill_sums,
        {
            "eval_prompts": 200,
            "clean": 100000,
            "mixed": 16000,
            "facts": 32,
            "terms": "2:6",
            "styles": ",".join(STYLES),
            # check_sums fills in LOOP_FLAGS
            "slips": None,
            "right": None,
            "hints": 0.0,
            "loops": 0,
            **dict.fromkeys(LOOP_FLAGS),
            "student_merges": None,
            "second_end": False,
        },
    ),
    "forks": (fill_forks, {"texts": 32000}),
    "tools": (
        fill_tools,
        {"eval_prompts": 200, "clean": 40000, "mixed": 16000, "terms": "2:5", "outage": 0.1},
    ),
}


def main(argv=None):
    p = parser(__doc__)
    p.add_argument(
        "--task", default="sums", choices=TASKS, help="the world to write, see above"
    )
    p.add_argument("--out", default="runs/toy", help="folder to fill")
    p.add_argument(
        "--train-prompts",
        type=int,
        default=1280,
        help="problems the student practises on; of forks: ids, for its 8 problems in turn",
    )
    p.add_argument(
        "--eval-prompts",
        type=int,
        help="problems in each of dev and heldout (default: 200); forks has 8",
    )
    p.add_argument(
        "--clean",
        type=int,
        help="right texts for pre-training (default: sums 100000, tools 40000)",
    )
    p.add_argument(
        "--mixed",
        type=int,
        help="careless texts that spoil the student's habits (default: 16000)",
    )
    p.add_argument(
        "--facts", type=int, help="sums: facts to learn by heart (default: 32), at most 90"
    )
    p.add_argument(
        "--terms",
        metavar="A:B",
        help="fewest and most terms of a problem, in all files (default: sums 2:6, at most "
        "30; tools: operations, 2:5, at most 8)",
    )
    p.add_argument(
        "--styles",
        metavar="STYLE,STYLE",
        help="sums: styles of the texts (default: all four); solutions of prompts stay in "
        "lines",
    )
    p.add_argument(
        "--slips",
        type=float,
        metavar="SHARE",
        help="sums: mixed is right work, with a slip in this share (default: mixed as above)",
    )
    p.add_argument(
        "--right",
        type=float,
        metavar="SHARE",
        help="sums: share of right work in mixed (default: 0.1)",
    )
    p.add_argument(
        "--hints",
        type=float,
        metavar="SHARE",
        help="sums: share of clean whose question has a solution behind it (default: 0)",
    )
    p.add_argument(
        "--loops",
        type=int,
        metavar="N",
        help="sums: also write looping.jsonl and planted.jsonl, N texts each (default: 0, "
        "neither)",
    )
    p.add_argument(
        "--loop-share",
        type=float,
        metavar="SHARE",
        help="sums: loops in looping.jsonl (default: 0.07): a teacher's copy prior",
    )
    p.add_argument(
        "--planted-share",
        type=float,
        metavar="SHARE",
        help="sums: loops in planted.jsonl (default: 0.4): a student's disease",
    )
    p.add_argument(
        "--loop-tokens",
        type=int,
        metavar="L",
        help="sums: characters of a loop (default: 320); eval.py searches the last 256",
    )
    p.add_argument(
        "--student-merges",
        metavar="N|A:B",
        help="sums: also write student_merged, with N tokens learnt by BPE, or one token for "
        "each number A..B (10 to 99)",
    )
    p.add_argument(
        "--second-end",
        action="store_true",
        default=None,
        help="sums: a second end token, <|eot|>, for the teacher's answers",
    )
    p.add_argument(
        "--outage",
        type=float,
        metavar="SHARE",
        help="tools: calls in the corpora that fail without being wrong (default: 0.1)",
    )
    p.add_argument(
        "--texts",
        type=int,
        help="forks: texts in each corpus (default: 32000); fewer of them, rougher shares",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="seed of problems, texts and initial weights"
    )
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    own = TASKS[args.task][1]
    for name in dict.fromkeys(name for _, flags in TASKS.values() for name in flags):
        got = getattr(args, name)
        if name in own:
            setattr(args, name, own[name] if got is None else got)
        elif got is not None:
            given, tasks = (
                f"--{name.replace('_', '-')}" + ("" if got is True else f" {got}"),
                " or ".join(task for task, (_, flags) in TASKS.items() if name in flags),
            )
            raise records.BadInput(
                f"{given}: belongs to --task {tasks}, expected no such flag with --task "
                f"{args.task}"
            )
    if args.task != "forks":
        {"sums": check_sums, "tools": check_tools}[args.task](args)
    out, unfinished = Path(args.out), Path(f"{args.out}.partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.overwrite:
        raise records.BadInput(
            f"--out {out}: exists already: give another one, or --overwrite to replace it"
        )
    shutil.rmtree(unfinished, ignore_errors=True)  # a run that was killed
    unfinished.mkdir(parents=True)
    counts, sentence = TASKS[args.task][0](unfinished, args)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)  # complete, or not there at all
    print(f"worlds.sums: {out}: {sentence}")
    return {"out": str(out)} | counts


if __name__ == "__main__":
    run(main)
