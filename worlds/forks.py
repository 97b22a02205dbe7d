"""A world so small that every answer of a model can be listed with its probability.

    python -m worlds.forks --out runs/forks
    python -m worlds.forks --out runs/forks --texts 8000

It asks which answers a policy can write at all before and after a training run, and which of
them the run brought in, lost or only reweighted (2604.07941, sections on effective support).
There are 8 problems, a digit x each, `3=?`.  An answer is a route of two letters, a line break
with the mark, and a digit, `bb / #4`: five tokens with the end token, for the break and its #
are one.  It is right when the digit is x + 1 (7 is followed by 0), whatever the route: a right
answer exists after every prefix.  A model pre-trained on a corpus can reach what is in it:

    base        for the student.  30 % route aa, of which a third right: the branch that it has
                and uses badly.  60 % route cc, the digit at random: its habit.  10 % ac and
                ca, at random.  No text has a b: the branch it lacks.
    teacher     45 % aa right, 45 % bb right, 10 % any route over abc, right: it can go on from
                any prefix.
    demos_both  aa and bb, half and half, all right;  demos_a  aa only;  demos_b  bb only: the
                narrow demonstrations
    corrupt     prompts, not texts: each problem with the first letters of the answer given, c,
                ab, cb or b

The rarest pair of base, a digit after ac, has an occupancy of 0.05 / (8 digits x 8 problems x 5
tokens) = 1.6e-4: at eps 1e-4 the support of a student is what base contains.  A student taught
base from nothing has the routes after 500 steps of 64 texts, and the right third of aa after
about 2000; 150 steps of demos_a before 1000 of base are enough.

All three splits hold the same 8 problems, for there are no others: this world asks what a
policy can write, not whether it generalises.
"""

from opd.cli import run
from worlds.build import (
    build_tokenizer,
    new_folder,
    stream,
    summary,
    user,
    world_parser,
    write_corpus,
    write_model,
    write_rows,
    write_splits,
)

DIGITS = 8
LETTERS = "abc"
SIZE = (32, 2, 4)
SYMBOLS = "01234567abc#=?\n"
# the line break before a final answer and its mark are one token: one level of the tree
MERGES = [("\n", "#")]
PREFIXES = ("c", "ab", "cb", "b")


def successor(x):
    """The right digit: 3 -> 4, 7 -> 0."""
    return (x + 1) % DIGITS


def answer(route, digit):
    """answer("bb", 4) -> "bb\\n#4": tokens b, b, line break with #, 4, and the end token."""
    return f"{route}\n#{digit}"


def base_answer(rng, x):
    """30 % route aa, a third of it right; 60 % route cc and 10 % ac or ca, the digit at random
    (so an eighth right)."""
    kind = rng.random()
    if kind < 0.30:
        slip = 0 if rng.random() < 1 / 3 else int(rng.integers(1, DIGITS))
        return answer("aa", (successor(x) + slip) % DIGITS)
    route = "cc" if kind < 0.90 else str(rng.choice(["ac", "ca"]))
    return answer(route, int(rng.integers(DIGITS)))


def teacher_answer(rng, x):
    """Always right: 45 % route aa, 45 % bb, 10 % any of the nine routes."""
    kind = rng.random()
    if kind < 0.90:
        return answer("aa" if kind < 0.45 else "bb", successor(x))
    return answer("".join(rng.choice(list(LETTERS), 2)), successor(x))


def demonstration(*routes):
    """A maker of right answers by one of these routes, each as often as another."""
    return lambda rng, x: answer(str(rng.choice(routes)), successor(x))


CORPORA = {
    "base": base_answer,
    "teacher": teacher_answer,
    "demos_both": demonstration("aa", "bb"),
    "demos_a": demonstration("aa"),
    "demos_b": demonstration("bb"),
}


def prompt(key, x, begun=()):
    made = {
        "id": key,
        "messages": user(f"{x}=?") + [{"role": "assistant", "content": b} for b in begun],
        "answer": str(successor(x)),
    }
    return made | {"continue_final_message": True} if begun else made


def prompts(rng, split, count):
    """In turn: any 8 in a row hold each problem once."""
    return (prompt(f"{split[0]}{i:05d}", i % DIGITS) for i in range(count))


def texts(rng, make_answer, count):
    for _ in range(count):
        x = int(rng.integers(DIGITS))
        yield user(f"{x}=?"), make_answer(rng, x)


def main(argv=None):
    p = world_parser(__doc__, "runs/forks")
    p.add_argument("--texts", type=int, default=32000, help="texts in each corpus")
    args = p.parse_args(argv)
    # the last message is the assistant's, for rollout.py to go on from
    corrupt = [prompt(f"{b}-{x}", x, [b]) for b in PREFIXES for x in range(DIGITS)]
    with new_folder(args.out, args.overwrite) as folder:
        write_splits(folder, args.train_prompts, DIGITS, args.seed, prompts)
        write_rows(folder / "corrupt.jsonl", corrupt)
        for number, (name, make_answer) in enumerate(CORPORA.items()):
            pairs = texts(stream(args.seed, number), make_answer, args.texts)
            write_corpus(folder / f"{name}.jsonl", "worlds.forks", pairs)
        tokenizer = build_tokenizer(SYMBOLS, MERGES)
        # of one size: with the same seed they would be the same model
        write_model(folder / "student", tokenizer, SIZE, 2 * args.seed)
        write_model(folder / "teacher", tokenizer, SIZE, 2 * args.seed + 1)
    made = {"train": args.train_prompts, "heldout": DIGITS}
    made |= {"corrupt": len(corrupt), "texts": args.texts}
    return summary("forks", args.out, made)


if __name__ == "__main__":
    run(main)
