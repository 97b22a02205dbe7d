"""A world for agents: chains of operations that are worked out with a calculator.

    python -m worlds.agents --out runs/tools
    python -m worlds.agents --out runs/tools --terms 2:4 --outage 0.2

    43,*7,-58,*2=?   ->   [43*7]   301   [301-58]   243   [243*2]   486   #486

A question is a number and what is done to it, in order; an answer is a call for every
operation, what the calculator says between them, and `#` with the last number.  No model of
this size multiplies in its head: it must call, copy what comes back, and go on.

What a student that is worth teaching does wrong is in `mixed`: three calls in ten are
malformed, and after an error it calls as badly again or gives up and guesses.  In `clean` every
call is right; some texts hold a malformed call that has loss mask 0 and what to do then, so
that whoever learns from them knows how to go on after an error and not how to make one.  A
calculator may have outages: then the same call again is right.  A third model, `large`, is a
larger teacher.

Simplification: which calls of the corpora meet an outage is decided by prompt id and number of
the call, so it is the same for every --seed (rollouts draw their own).
"""

import json
from functools import partial
from types import SimpleNamespace

from opd.chat import render
from opd.cli import run
from opd.policy import identity_of
from opd.tools import Episode, Toolbox
from worlds.build import (
    SIZES,
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
    write_model,
    write_rows,
    write_splits,
)

SYMBOLS = "0123456789+-*/^()[]#=?.,:'\n abcdefghijklmnopqrstuvwxyz"
MORE_SPECIAL = ("<|tool|>",)
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == "
    "'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '\n' }}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LARGEST, MOST_STEPS, MOST_TOKENS = 999, 12, 320


def apply(total, operation):
    """apply(37, "*4") -> 148."""
    number = int(operation[1:])
    return {"+": total + number, "-": total - number, "*": total * number}[operation[0]]


def chains(rng, split, terms):
    """Endless random chains of one split, [start, operation, ...], with FEWEST to MOST
    operations whose results stay in 0..999."""
    while True:
        total = int(rng.integers(2, 100))
        chain, count = [str(total)], int(rng.integers(terms[0], terms[1] + 1))
        while len(chain) <= count:
            sign = str(rng.choice(list("+-*")))
            operation = sign + str(
                rng.integers(2, 10) if sign == "*" else rng.integers(10, 100)
            )
            if 0 <= apply(total, operation) <= LARGEST:
                total = apply(total, operation)
                chain.append(operation)
        if split_of(",".join(chain)) == split:
            yield chain


def result(chain):
    total = int(chain[0])
    for operation in chain[1:]:
        total = apply(total, operation)
    return total


def malformed(rng, call):
    """A call that the calculator cannot read: "37*4" -> "37*", "*4", "37 4", "37*4)" or,
    unclosed, "37*4" without its bracket."""
    at = next(i for i, c in enumerate(call) if c in "+-*" and i)
    left, sign, right = call[:at], call[at], call[at + 1 :]
    return [
        f"[{left}{sign}]",
        f"[*{right}]",
        f"[{left} {right}]",
        f"[{left}{sign}{right})]",
        f"[{left}{sign}{right}",
    ][int(rng.integers(5))]


def slip(rng, number):
    """One digit of a number changed: 148 -> 158."""
    digits = list(str(number))
    at = int(rng.integers(number < 0, len(digits)))
    digits[at] = str((int(digits[at]) + int(rng.integers(1, 10))) % 10)
    return int("".join(digits))


def clean_step(rng, chain, done, total, failed, state):
    """(text, whether to learn it) of the next step: the right call or the answer.  In a fifth
    of the texts one call, and in a quarter of these the call after it too, is malformed and not
    to be learnt."""
    if done == len(chain) - 1:
        return f"#{total}", True
    if "at" not in state:
        state["at"] = None
        if rng.random() < 0.2:
            state["at"] = int(rng.integers(len(chain) - 1))
            state["left"] = 1 + (rng.random() < 0.25)
    call = f"{total}{chain[done + 1]}"
    if state["at"] == done and state["left"]:
        state["left"] -= 1
        return malformed(rng, call), False
    return f"[{call}]", True


def mixed_step(rng, chain, done, total, failed, state):
    """The same of a careless writer; see above."""
    if done == len(chain) - 1:
        right = rng.random() < 0.9
        return f"#{total if right else slip(rng, total)}", True
    operation = chain[done + 1]
    kind = rng.random()
    bad_call, guess, wrong_number = (0.5, 0.7, 0.7) if failed else (0.3, 0.34, 0.4)
    if kind < bad_call:
        return malformed(rng, f"{total}{operation}"), True
    if kind < guess:
        return f"#{rng.integers(LARGEST)}", True
    if kind < wrong_number:
        return f"[{slip(rng, total)}{operation}]", True
    return f"[{total}{operation}]", True


STEPS = {"clean": clean_step, "mixed": mixed_step}


def episode(rng, policy, toolbox, prompt, chain, next_step, key):
    """A text with its tools' answers as an `answers` record: the calls are run as rollout.py
    runs them.  policy: tokenizer, identity, stop_ids."""
    tokenizer = policy.tokenizer
    made = Episode()
    state = {}
    total = int(chain[0])
    done = 0
    failed = False
    while True:
        text, learn = next_step(rng, chain, done, total, failed, state)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        made.add_step(ids, [], int(learn))
        call = toolbox.find(text)
        if not call or len(made.steps) == MOST_STEPS or len(made.response_ids) > MOST_TOKENS:
            break
        call = toolbox.run(call, f"{key}|{len(made.calls)}")
        made.add_output(call, toolbox.turn(policy, call))
        failed = not call["ok"]
        if call["ok"]:
            total = int(call["output"])
            done += 1
    return {
        "prompt_ids": render(tokenizer, prompt),
        "response_ids": made.response_ids,
        "loss_mask": made.loss_mask,
        "steps": made.steps,
        "calls": made.calls,
        "final": text,
        "text": tokenizer.decode(made.response_ids, skip_special_tokens=True),
        "finish_reason": "tool_limit" if call else "stop",
    }


def prompt_of(key, chain):
    return {"id": key, "messages": user(",".join(chain) + "=?")}


def prompts(rng, split, count, terms):
    found = distinct(chains(rng, split, terms), count, split)
    for i, chain in enumerate(found, 1):
        yield prompt_of(f"{split[0]}{i:06d}", chain) | {"answer": str(result(chain))}


def episodes(rng, name, count, terms, writer, toolbox):
    """The records of a corpus."""
    source = chains(rng, "train", terms)
    policy = writer.identity | {"model": f"worlds.agents {name}"}
    for left in reversed(range(count)):
        chain = next(source)
        prompt = prompt_of(f"{name[0]}{left:06d}", chain)
        yield (
            prompt
            | {"sample": 0, "policy": policy}
            | episode(rng, writer, toolbox, prompt, chain, STEPS[name], prompt["id"])
        )


def main(argv=None):
    p = world_parser(__doc__, "runs/tools")
    add_corpus_flags(p, clean=40000, mixed=16000, terms=(1, 8, "2:5"))
    p.add_argument("--outage", type=share, default=0.1, help="calls that fail for no fault")
    args = p.parse_args(argv)
    tokenizer = build_tokenizer(SYMBOLS, more_special=MORE_SPECIAL, template=TEMPLATE)
    writer = SimpleNamespace(
        tokenizer=tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        template_options={},
        identity=identity_of("worlds.agents", None, tokenizer, {}),
    )
    tools = json.dumps({"calculator": {"outage": args.outage}})
    toolbox = Toolbox(tools, "brackets", MOST_STEPS)
    made = {"clean": args.clean, "mixed": args.mixed}
    ask = partial(prompts, terms=args.terms)
    with new_folder(args.out, args.overwrite) as folder:
        write_splits(folder, args.train_prompts, args.eval_prompts, args.seed, ask)
        for number, (name, count) in enumerate(made.items(), 3):
            rng = stream(args.seed, number)
            rows = episodes(rng, name, count, args.terms, writer, toolbox)
            write_rows(folder / f"{name}.jsonl", rows)
        for name, size in SIZES.items():
            write_model(folder / name, tokenizer, size, args.seed)
    counts = {"train": args.train_prompts, "heldout": args.eval_prompts}
    return summary("agents", args.out, counts | made)


if __name__ == "__main__":
    run(main)
