"""Stage 0: a small world of our own, so that every stage runs on a laptop with no download.

    python toy.py --out runs/toy

Writes prompts, text corpora and untrained models (transformers folders, Llama architecture).  Nothing is trained
here: `train.py --method sft` does the pre-training on these corpora, like any other training.

The task is a running sum, `7+5-3+8=?`.  A good answer works step by step and ends in `#17`.  The same work can be
written in four styles, so that a rubric which rewards a style instead of the arithmetic can be caught doing so:

    lines   7+5=12 / 12-3=9 / 9+8=17 / #17        (/ is a line break)
    chain   7+5=12-3=9+8=17 / #17
    totals  7,12,9,17 / #17
    ledger  7 / +5:12 / -3:9 / +8:17 / #17

Two corpora make a student that has the skill but not the habit.  `clean` is right work in all styles.  `mixed` is
what the web is like: terse guesses, slips that propagate, skipped steps, a little right work.  A model trained on
clean and then briefly on mixed answers badly most of the time, yet the right answer is always within its reach: that
is a student worth distilling.  One that never learned the arithmetic would only measure how fast a method teaches it.

Every file has random numbers of its own, so asking for more of one changes no other.  Splits: a problem belongs to train, dev or held-out by the hash of its text, so no file can share one with another.
The corpora are made of train problems only.

Simplifications: 1. one task; 2. answers are 5-60 characters; 3. the "web" is a script; 4. totals stay in 0..40.
"""
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

import records

STYLES = ("lines", "chain", "totals", "ledger")
SIZES = {"student": (64, 2, 4), "teacher": (96, 2, 4)}  # hidden width, layers, heads
SYMBOLS = "0123456789+-=?#,:\n "
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


def write_corpus(path, rng, make_answer, count):
    """A corpus is a file of `answers` that bring their question along, ready for `train.py --method sft`."""
    source = problems(rng, "train")

    def rows():
        for i in range(count):
            terms = next(source)
            yield json.dumps({"id": f"c{i:06d}", "sample": 0, "policy": {"model": f"toy.py {path.stem}"},
                              "messages": question(terms), "text": make_answer(rng, terms), "finish_reason": "stop"}) + "\n"
    records.write_atomically(path, rows())


def build_tokenizer(merge_digits=False):
    """One token a character; with `merge_digits` also one token for each of 10..40 (a second, foreign vocabulary)."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    pieces = list(SPECIAL) + list(SYMBOLS)
    merges = []
    if merge_digits:
        merges = [(str(n)[0], str(n)[1]) for n in range(10, 41)]
        pieces += [a + b for a, b in merges]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>",
                                        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(folder, tokenizer, size, seed):
    """An untrained tiny Llama as a folder that transformers, vLLM and lm-eval load as it is."""
    import torch
    import transformers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    transformers.utils.logging.disable_progress_bar()
    width, layers, heads = SIZES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv=None):
    p = records.parser(__doc__)
    p.add_argument("--out", default="runs/toy", help="folder to fill")
    p.add_argument("--train-prompts", type=int, default=1280, help="problems the student practises on")
    p.add_argument("--eval-prompts", type=int, default=200, help="problems in each of dev and heldout")
    p.add_argument("--clean", type=int, default=100000, help="right texts for pre-training")
    p.add_argument("--mixed", type=int, default=16000, help="careless texts that spoil the student's habits")
    p.add_argument("--seed", type=int, default=0, help="seed of problems, texts and initial weights")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    args = p.parse_args(argv)
    out, partial = Path(args.out), Path(f"{args.out}.partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not args.overwrite:
        raise records.BadInput(f"--out {out}: exists already: give another one, or --overwrite to replace it")
    shutil.rmtree(partial, ignore_errors=True)  # a run that was killed
    partial.mkdir(parents=True)

    files = (("train", args.train_prompts, "t"), ("dev", args.eval_prompts, "d"), ("heldout", args.eval_prompts, "h"))
    for number, (split, count, prefix) in enumerate(files):
        write_prompts(partial / f"{split}.jsonl", np.random.default_rng([args.seed, number]), split, count, prefix)
    write_corpus(partial / "clean.jsonl", np.random.default_rng([args.seed, 3]), clean_answer, args.clean)
    write_corpus(partial / "mixed.jsonl", np.random.default_rng([args.seed, 4]), mixed_answer, args.mixed)
    for name, merge_digits in (("student", False), ("teacher", False), ("teacher_merged_digits", True)):
        write_model(partial / name, build_tokenizer(merge_digits), name.split("_")[0], args.seed)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)  # complete, or not there at all
    summary = {"out": str(out), "train": args.train_prompts, "heldout": args.eval_prompts, "clean": args.clean, "mixed": args.mixed}
    print(f"toy.py: {out}: {args.train_prompts} train, {args.eval_prompts} dev and heldout prompts, {args.clean} clean and "
          f"{args.mixed} mixed texts, 3 untrained models")
    return summary


if __name__ == "__main__":
    records.run(main)
