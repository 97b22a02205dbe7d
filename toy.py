"""Stage 0: a small world of our own, so that every stage runs on a laptop with no download.

    python toy.py --out runs/toy
    python toy.py --task forks --out runs/forks

Writes prompts, text corpora and untrained models (transformers folders, Llama architecture).  Nothing is trained
here: `train.py --method sft` does the pre-training on these corpora, like any other training.

--task sums is a running sum, `7+5-3+8=?`.  A good answer works step by step and ends in `#17`.  The same work can be
written in four styles, so that a rubric which rewards a style instead of the arithmetic can be caught doing so:

    lines   7+5=12 / 12-3=9 / 9+8=17 / #17        (/ is a line break)
    chain   7+5=12-3=9+8=17 / #17
    totals  7,12,9,17 / #17
    ledger  7 / +5:12 / -3:9 / +8:17 / #17

Two corpora make a student that has the skill but not the habit.  `clean` is right work in all styles.  `mixed` is
what the web is like: terse guesses, slips that propagate, skipped steps, a little right work.  A model trained on
clean and then briefly on mixed answers badly most of the time, yet the right answer is always within its reach: that
is a student worth distilling.  One that never learned the arithmetic would only measure how fast a method teaches it.

Splits: a problem belongs to train, dev or held-out by the hash of its text, so no file can share one with another.
The corpora are made of train problems only.  `facts` is new knowledge that costs an old skill: arbitrary pairs to learn by heart,
`37:?` / `#82`, as a corpus and, in `facts_prompts`, as questions.

--task forks is a world so small that every answer of a model can be listed with its probability (`eval.py support`), to
ask which answers a policy can write at all before and after a training run, and which of them the run brought in, lost or
only reweighted (2604.07941, sections on effective support).  There are 8 problems, a digit x each, `3=?`.  An answer is a
route of two letters, a line break with the mark, and a digit, `bb / #4`: five tokens with the end token, for the break and
its # are one.  It is right when the digit is x + 1 (7 is followed by 0), whatever the route, so no beginning is beyond
recovery.  What the corpora contain decides what a model pre-trained on them can reach:

    base        for the student.  30 % route aa, of which a third right: the branch that it has and uses badly.  60 % route
                cc, the digit at random: its habit.  10 % ac and ca, at random.  No text has a b: the branch it lacks.
    teacher     45 % aa right, 45 % bb right, and 10 % any route over abc, right: it knows the way on from any prefix.
    demos_both  aa and bb, half and half, all right;  demos_a  aa only;  demos_b  bb only: the narrow demonstrations
    corrupt     prompts, not texts: each problem with the first letters of the answer given, c, ab, cb or b

The rarest pair of base, a digit after ac, has an occupancy of 0.05 / (8 digits x 8 problems x 5 tokens) = 1.6e-4: at eps 1e-4
the support of a student is what base contains.  The right third of aa is faint among so much chance: taught base from nothing, a
student has the routes after 500 steps of 64 texts and the third after about 2000; 150 steps of demos_a before 1000 of base do it.

All three splits hold the same 8 problems, for there are no others: this world asks what a policy can write, not whether
it generalises.

Every file has random numbers of its own, so asking for more of one changes no other.

Simplifications: 1. two tasks; 2. answers are 5-60 characters; 3. the "web" is a script; 4. totals stay in 0..40.
"""
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np

import records

STYLES = ("lines", "chain", "totals", "ledger")
SIZES = {"student": (64, 2, 4), "teacher": (96, 2, 4)}  # hidden width, layers, heads
SYMBOLS = "0123456789+-=?#,:\n "
TWO_DIGITS = [(str(n)[0], str(n)[1]) for n in range(10, 41)]  # merged into one token each: a second, foreign vocabulary
# pad, user, assistant and end are one token each; roles open with their mark and an answer closes with <|end|>
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
                 "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


# ---------------------------------------------------------------------------------------------- problems

def split_of(expression):
    """`train`, `dev` (1 in 10) or `heldout` (1 in 10): a function of the problem's text alone."""
    bucket = hashlib.sha256(expression.encode()).digest()[0] % 10
    return {0: "heldout", 1: "dev"}.get(bucket, "train")


def running_totals(terms):
    """[7, 5, -3, 8] -> [7, 12, 9, 17]."""
    return np.cumsum(terms).tolist()


def expression_of(terms):
    """[7, 5, -3, 8] -> "7+5-3+8"."""
    return str(terms[0]) + "".join(f"{t:+d}" for t in terms[1:])


def problems(rng, split, terms=(2, 6)):
    """Endless random problems of one split as lists of signed single-digit terms whose totals stay in 0..40."""
    while True:
        count = rng.integers(terms[0], terms[1] + 1)
        numbers = [int(rng.integers(1, 10))]
        for _ in range(count - 1):
            size = int(rng.integers(1, 10))
            numbers.append(-size if sum(numbers) >= size and rng.random() < 0.5 else size)
        if max(running_totals(numbers)) <= 40 and split_of(expression_of(numbers)) == split:
            yield numbers


# ---------------------------------------------------------------------------------------------- answers

def write_work(terms, totals, style, final=None):
    """The work for `terms` with the given running totals (right or not) in one of the four STYLES.

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
        raise ValueError(f"style: expected one of {STYLES}, came {style!r}")
    return f"{work}#{totals[-1] if final is None else final}"


def clean_answer(rng, terms, styles=STYLES):
    return write_work(terms, running_totals(terms), str(rng.choice(styles)))


def mixed_answer(rng, terms):
    """What a careless page would say: 45 % a guess, 25 % a slip that propagates, 20 % skipped steps, 10 % right work."""
    totals, kind = running_totals(terms), rng.random()
    if kind < 0.45:
        return f"#{max(0, totals[-1] + int(rng.integers(-6, 7)))}"
    style = str(rng.choice(STYLES))
    if kind < 0.70:  # one step goes wrong by 1-3, everything after it builds on the wrong total
        at, slip = int(rng.integers(1, len(terms))), int(rng.choice([-3, -2, -1, 1, 2, 3]))
        return write_work(terms, [t + (slip if i >= at else 0) for i, t in enumerate(totals)], style)
    if kind < 0.90:  # the first steps, then a jump to a guessed end
        kept = int(rng.integers(2, len(terms))) if len(terms) > 2 else 1
        return write_work(terms[:kept], totals[:kept], style, final=max(0, totals[-1] + int(rng.integers(-4, 5))))
    return write_work(terms, totals, style)


# ---------------------------------------------------------------------------------------------- the world of forks

DIGITS, LETTERS = 8, "abc"
FORK_SIZE = (32, 2, 4)
FORK_SYMBOLS = "01234567abc#=?\n"
FORK_MERGES = [("\n", "#")]  # rubric.py finds a final answer where a line begins with #; as one token it adds no level to the tree
FORK_PREFIXES = ("c", "ab", "cb", "b")


def fork_problems(rng, split):
    """Endless problems [x], x a random digit in 0..7; there are no others, so `split` makes no difference."""
    while True:
        yield [int(rng.integers(DIGITS))]


def successor(terms):
    """The right digit: [3] -> 4, [7] -> 0."""
    return (terms[0] + 1) % DIGITS


def fork_answer(route, digit):
    """fork_answer("bb", 4) -> "bb\\n#4": tokens b, b, line break with #, 4, and the end token."""
    return f"{route}\n#{digit}"


def base_answer(rng, terms):
    """30 % route aa, a third of it right; 60 % route cc and 10 % ac or ca, the digit at random (so an eighth right)."""
    kind = rng.random()
    if kind < 0.30:
        slip = 0 if rng.random() < 1 / 3 else int(rng.integers(1, DIGITS))
        return fork_answer("aa", (successor(terms) + slip) % DIGITS)
    return fork_answer("cc" if kind < 0.90 else str(rng.choice(["ac", "ca"])), int(rng.integers(DIGITS)))


def teacher_answer(rng, terms):
    """Always right: 45 % route aa, 45 % bb, 10 % any of the nine routes."""
    kind = rng.random()
    if kind < 0.90:
        return fork_answer("aa" if kind < 0.45 else "bb", successor(terms))
    return fork_answer("".join(rng.choice(list(LETTERS), 2)), successor(terms))


def demonstration(*routes):
    """A maker of right answers by one of these routes, each as often as another."""
    return lambda rng, terms: fork_answer(str(rng.choice(routes)), successor(terms))


FORK_CORPORA = {"base": base_answer, "teacher": teacher_answer, "demos_both": demonstration("aa", "bb"), "demos_a": demonstration("aa"),
                "demos_b": demonstration("bb")}


# ---------------------------------------------------------------------------------------------- files

def question(terms):
    return [{"role": "user", "content": expression_of(terms) + "=?"}]


def write_prompts(path, rng, split, count, prefix):
    seen, rows = set(), []
    source = problems(rng, split)
    while len(rows) < count:
        terms = next(source)
        if expression_of(terms) in seen:
            continue
        seen.add(expression_of(terms))
        rows.append({"id": f"{prefix}{len(rows):05d}", "messages": question(terms), "answer": str(sum(terms)),
                     "solution": write_work(terms, running_totals(terms), "lines")})
    records.write_atomically(path, (json.dumps(r) + "\n" for r in rows))


def write_fork_prompts(path, count, prefix):
    """The 8 problems in turn, `count` ids: any run of 8 lines holds each problem once."""
    records.write_atomically(path, (json.dumps({"id": f"{prefix}{i:05d}", "messages": question([i % DIGITS]),
                                                "answer": str(successor([i % DIGITS]))}) + "\n" for i in range(count)))


def write_corrupt_prompts(path):
    """Problems whose answer has begun already: the last message is the assistant's, for rollout.py to go on from."""
    rows = ({"id": f"{letters}-{x}", "messages": question([x]) + [{"role": "assistant", "content": letters}], "answer": str(successor([x]))}
            for letters, x in itertools.product(FORK_PREFIXES, range(DIGITS)))
    records.write_atomically(path, (json.dumps(row) + "\n" for row in rows))


def write_corpus(path, rng, make_answer, count, make_problems=problems):
    """A corpus is a file of `answers` that bring their question along, ready for `train.py --method sft`."""
    source = make_problems(rng, "train")

    def rows():
        for i in range(count):
            terms = next(source)
            yield json.dumps({"id": f"c{i:06d}", "sample": 0, "policy": {"model": f"toy.py {path.stem}"},
                              "messages": question(terms), "text": make_answer(rng, terms), "finish_reason": "stop"}) + "\n"
    records.write_atomically(path, rows())


def write_facts(folder, rng, count):
    """`count` two-digit numbers, each with an arbitrary one: texts that state them, and prompts that ask for them."""
    names, values = 10 + rng.permutation(90)[:count], rng.integers(0, 100, count)
    asked = [{"id": f"f{i:03d}", "messages": [{"role": "user", "content": f"{name}:?"}]} for i, name in enumerate(names)]
    records.write_atomically(folder / "facts_prompts.jsonl", (json.dumps(row | {"answer": str(value)}) + "\n" for row, value in zip(asked, values)))
    records.write_atomically(folder / "facts.jsonl", (json.dumps(row | {"sample": 0, "policy": {"model": "toy.py facts"}, "text": f"#{value}", "finish_reason": "stop"}) + "\n"
                                                      for row, value in zip(asked, values)))


def build_tokenizer(symbols=SYMBOLS, merges=()):
    """One token a character; with `merges`, pairs of characters, also one token for each of these pairs."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    pieces = [*SPECIAL, *symbols, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(merges)))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>",
                                        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(folder, tokenizer, size, seed):
    """An untrained tiny Llama of `size` (width, layers, heads) as a folder that transformers, vLLM and lm-eval load as it is."""
    import torch
    import transformers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    transformers.utils.logging.disable_progress_bar()
    width, layers, heads = size
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fill_sums(folder, args):
    """Everything of --task sums; returns (how much of what, the same as a sentence)."""
    files = (("train", args.train_prompts, "t"), ("dev", args.eval_prompts, "d"), ("heldout", args.eval_prompts, "h"))
    for number, (split, count, prefix) in enumerate(files):
        write_prompts(folder / f"{split}.jsonl", np.random.default_rng([args.seed, number]), split, count, prefix)
    write_corpus(folder / "clean.jsonl", np.random.default_rng([args.seed, 3]), clean_answer, args.clean)
    write_corpus(folder / "mixed.jsonl", np.random.default_rng([args.seed, 4]), mixed_answer, args.mixed)
    write_facts(folder, np.random.default_rng([args.seed, 5]), args.facts)
    for name, merges in (("student", ()), ("teacher", ()), ("teacher_merged_digits", TWO_DIGITS)):
        write_model(folder / name, build_tokenizer(merges=merges), SIZES[name.split("_")[0]], args.seed)
    counts = {"train": args.train_prompts, "heldout": args.eval_prompts, "clean": args.clean, "mixed": args.mixed, "facts": args.facts}
    return counts, (f"{args.train_prompts} train, {args.eval_prompts} dev and heldout prompts, {args.clean} clean and "
                    f"{args.mixed} mixed texts, {args.facts} facts, 3 untrained models")


def fill_forks(folder, args):
    """Everything of --task forks; returns the same."""
    for split, count, prefix in (("train", args.train_prompts, "t"), ("dev", DIGITS, "d"), ("heldout", DIGITS, "h")):
        write_fork_prompts(folder / f"{split}.jsonl", count, prefix)
    write_corrupt_prompts(folder / "corrupt.jsonl")
    for number, (name, make_answer) in enumerate(FORK_CORPORA.items()):
        write_corpus(folder / f"{name}.jsonl", np.random.default_rng([args.seed, number]), make_answer, args.texts, fork_problems)
    for number, name in enumerate(("student", "teacher")):  # of one size: the same seed would make them the same model
        write_model(folder / name, build_tokenizer(FORK_SYMBOLS, FORK_MERGES), FORK_SIZE, 2 * args.seed + number)
    corrupt = len(FORK_PREFIXES) * DIGITS
    counts = {"train": args.train_prompts, "heldout": DIGITS, "corrupt": corrupt, "texts": args.texts}
    return counts, (f"{args.train_prompts} train, {DIGITS} dev and heldout, {corrupt} corrupt prompts, {args.texts} texts in each of "
                    f"{', '.join(FORK_CORPORA)}, 2 untrained models")


TASKS = {"sums": (fill_sums, {"eval_prompts": 200, "clean": 100000, "mixed": 16000, "facts": 32}), "forks": (fill_forks, {"texts": 32000})}


def main(argv=None):
    p = records.parser(__doc__)
    p.add_argument("--task", default="sums", choices=TASKS, help="the world to write, see above")
    p.add_argument("--out", default="runs/toy", help="folder to fill")
    p.add_argument("--train-prompts", type=int, default=1280, help="problems the student practises on; of forks: ids, for its 8 problems in turn")
    p.add_argument("--eval-prompts", type=int, help="sums: problems in each of dev and heldout (default: 200); forks has 8")
    p.add_argument("--clean", type=int, help="sums: right texts for pre-training (default: 100000)")
    p.add_argument("--mixed", type=int, help="sums: careless texts that spoil the student's habits (default: 16000)")
    p.add_argument("--facts", type=int, help="sums: facts to learn by heart (default: 32), at most 90")
    p.add_argument("--texts", type=int, help="forks: texts in each corpus (default: 32000); fewer of them, rougher shares")
    p.add_argument("--seed", type=int, default=0, help="seed of problems, texts and initial weights")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    for task, (_, own_flags) in TASKS.items():
        for name, default in own_flags.items():
            came = getattr(args, name)
            if task == args.task:
                setattr(args, name, default if came is None else came)
            elif came is not None:
                raise records.BadInput(f"--{name.replace('_', '-')} {came}: belongs to --task {task}, expected no such flag with --task {args.task}")
    if args.facts is not None and not 1 <= args.facts <= 90:
        raise records.BadInput(f"--facts: expected 1 to 90, came {args.facts}")
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.overwrite:
        raise records.BadInput(f"--out {out}: exists already: give another one, or --overwrite to replace it")
    shutil.rmtree(partial, ignore_errors=True)  # a run that was killed
    partial.mkdir(parents=True)
    counts, sentence = TASKS[args.task][0](partial, args)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)  # complete, or not there at all
    print(f"toy.py: {out}: {sentence}")
    return {"out": str(out)} | counts


if __name__ == "__main__":
    records.run(main)
