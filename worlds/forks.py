"""The world of `worlds.sums --task forks`: so small that every answer of a model can be listed
with its probability (`methods.unified`).

It asks which answers a policy can write at all before and after a training run, and which of
them the run brought in, lost or only reweighted (2604.07941, sections on effective support).
There are 8 problems, a digit x each, `3=?`.  An answer is a route of two letters, a line break
with the mark, and a digit, `bb / #4`: five tokens with the end token, for the break and its #
are one.  It is right when the digit is x + 1 (7 is followed by 0), whatever the route, so no
beginning is beyond recovery.  What the corpora contain decides what a model pre-trained on them
can reach:

    base        for the student.  30 % route aa, of which a third right: the branch that it has
                and uses badly.  60 % route
                cc, the digit at random: its habit.  10 % ac and ca, at random.  No text has a
                b: the branch it lacks.
    teacher     45 % aa right, 45 % bb right, and 10 % any route over abc, right: it knows the
                way on from any prefix.
    demos_both  aa and bb, half and half, all right;  demos_a  aa only;  demos_b  bb only: the
                narrow demonstrations
    corrupt     prompts, not texts: each problem with the first letters of the answer given, c,
                ab, cb or b

The rarest pair of base, a digit after ac, has an occupancy of 0.05 / (8 digits x 8 problems x 5
tokens) = 1.6e-4: at eps 1e-4 the support of a student is what base contains.  The right third
of aa is faint among so much chance: taught base from nothing, a student has the routes after
500 steps of 64 texts and the third after about 2000; 150 steps of demos_a before 1000 of base
do it.

All three splits hold the same 8 problems, for there are no others: this world asks what a
policy can write, not whether it generalises.
"""

DIGITS, LETTERS = 8, "abc"
SIZE = (32, 2, 4)
SYMBOLS = "01234567abc#=?\n"
# rubric.py finds a final answer where a line begins with #; as one token it adds no level to
# the tree
MERGES = [("\n", "#")]
PREFIXES = ("c", "ab", "cb", "b")


def problems(rng):
    """Endless problems [x], x a random digit in 0..7."""
    while True:
        yield [int(rng.integers(DIGITS))]


def successor(terms):
    """The right digit: [3] -> 4, [7] -> 0."""
    return (terms[0] + 1) % DIGITS


def answer(route, digit):
    """answer("bb", 4) -> "bb\\n#4": tokens b, b, line break with #, 4, and the end token."""
    return f"{route}\n#{digit}"


def base_answer(rng, terms):
    """30 % route aa, a third of it right; 60 % route cc and 10 % ac or ca, the digit at random
    (so an eighth right)."""
    kind = rng.random()
    if kind < 0.30:
        slip = 0 if rng.random() < 1 / 3 else int(rng.integers(1, DIGITS))
        return answer("aa", (successor(terms) + slip) % DIGITS)
    return answer(
        "cc" if kind < 0.90 else str(rng.choice(["ac", "ca"])), int(rng.integers(DIGITS))
    )


def teacher_answer(rng, terms):
    """Always right: 45 % route aa, 45 % bb, 10 % any of the nine routes."""
    kind = rng.random()
    if kind < 0.90:
        return answer("aa" if kind < 0.45 else "bb", successor(terms))
    return answer("".join(rng.choice(list(LETTERS), 2)), successor(terms))


def demonstration(*routes):
    """A maker of right answers by one of these routes, each as often as another."""
    return lambda rng, terms: answer(str(rng.choice(routes)), successor(terms))


CORPORA = {
    "base": base_answer,
    "teacher": teacher_answer,
    "demos_both": demonstration("aa", "bb"),
    "demos_a": demonstration("aa"),
    "demos_b": demonstration("bb"),
}
