"""What the worlds share: tokenizers and untrained models, prompts and corpora as files, and a
folder that is complete or not there at all."""

import argparse
import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from opd.cli import parser
from opd.disk import rename_durably, sync_tree, write_atomically
from opd.records import BadInput

# width, layers, heads
SIZES = {"student": (64, 2, 4), "teacher": (96, 2, 4), "large": (160, 2, 4)}
SYMBOLS = "0123456789+-=?#,:\n "
END = "<|end|>"
# one token each: a role opens with its mark, and an answer closes with the end token
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", END)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# ---- command lines


def world_parser(doc, out):
    """A parser with the flags that every world has."""
    p = parser(doc)
    p.add_argument("--out", default=out, help="folder to fill")
    p.add_argument("--train-prompts", type=int, default=1280, help="problems to train on")
    p.add_argument("--seed", type=int, default=0, help="of problems, texts and weights")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    return p


def add_corpus_flags(p, clean, mixed, terms):
    """How much of what, for worlds with held-out problems; terms: (fewest, most, default)."""
    fewest, most, usual = terms
    p.add_argument("--eval-prompts", type=int, default=200, help="problems in dev and heldout")
    p.add_argument("--clean", type=int, default=clean, help="right texts")
    p.add_argument("--mixed", type=int, default=mixed, help="careless texts")
    p.add_argument(
        "--terms",
        type=bounds(fewest, most),
        default=usual,
        metavar="FEWEST:MOST",
        help="length of a problem",
    )


def share(text):
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return value


def bounds(low, high):
    """argparse type: bounds(2, 30)("2:6") -> (2, 6), both from `low` to `high`."""

    def parse(text):
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found and low <= int(found[1]) <= int(found[2]) <= high:
            return int(found[1]), int(found[2])
        raise argparse.ArgumentTypeError(
            f"expected FEWEST:MOST with {low} <= FEWEST <= MOST <= {high}, got {text}"
        )

    return parse


# ---- files


@contextlib.contextmanager
def new_folder(out, overwrite):
    """A folder to fill; it becomes `out` at the end, so a killed run leaves no half world."""
    out = Path(out)
    unfinished = Path(f"{out}.partial")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise BadInput(
            f"--out {out}: exists already: give another one, or --overwrite to replace it"
        )
    if out.is_symlink() or out.is_file():
        raise BadInput(f"--out {out}: expected a folder, got a file or a link")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    yield unfinished
    sync_tree(unfinished)
    shutil.rmtree(out, ignore_errors=True)
    rename_durably(unfinished, out)


def write_rows(path, rows):
    write_atomically(path, (json.dumps(row) + "\n" for row in rows))


def stream(seed, number):
    """The random numbers of one file: asking for more of another changes none of them."""
    return np.random.default_rng([seed, number])


def write_splits(folder, train, evaluation, seed, prompts):
    """The three prompt files, of prompts(rng, split, count)."""
    counts = {"train": train, "dev": evaluation, "heldout": evaluation}
    for number, (split, count) in enumerate(counts.items()):
        write_rows(folder / f"{split}.jsonl", prompts(stream(seed, number), split, count))


def summary(world, out, made):
    """Prints and returns how much of what is in a world's folder."""
    print(f"worlds.{world}: {out}: " + ", ".join(f"{n} {name}" for name, n in made.items()))
    return {"out": out} | made


def split_of(problem):
    """`train`, `dev` (1 in 10) or `heldout` (1 in 10), by the hash of the problem's text."""
    bucket = hashlib.sha256(problem.encode()).digest()[0] % 10
    return {0: "heldout", 1: "dev"}.get(bucket, "train")


def distinct(source, count, split):
    """The first `count` different problems of an endless source.  Of short problems there are
    few: a search that finds no new one is stopped."""
    found = {}
    repeats = 0
    while len(found) < count:
        problem = next(source)
        repeats = repeats + 1 if str(problem) in found else 0
        found[str(problem)] = problem
        if repeats == 10000:
            flag = "--train-prompts" if split == "train" else "--eval-prompts"
            raise BadInput(
                f"{flag} {count}: expected at most about {len(found)}, the number of different "
                f"{split} problems of these --terms, or longer --terms"
            )
    return list(found.values())


def user(content):
    return [{"role": "user", "content": content}]


def write_corpus(path, writer, pairs):
    """(messages, text) pairs as `answers` with their question, for train.py --method sft."""
    write_rows(
        path,
        (
            {
                "id": f"c{i:06d}",
                "sample": 0,
                "policy": {"model": f"{writer} {path.stem}"},
                "messages": messages,
                "text": text,
                # training adds an end token only to a text that ended
                "finish_reason": "stop" if "#" in text else "length",
            }
            for i, (messages, text) in enumerate(pairs)
        ),
    )


# ---- models


def build_tokenizer(
    symbols=SYMBOLS, merges=(), more_special=(), end=END, template=CHAT_TEMPLATE
):
    """One token a character, and one for each pair in `merges`.  `end` closes an answer: with
    two ends among the special tokens, two tokenizers share every id and end differently."""
    pieces = [*SPECIAL, *symbols, *(a + b for a, b in merges), *more_special]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
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
    """An untrained tiny Llama of `size` (width, layers, heads) as a transformers folder."""
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
