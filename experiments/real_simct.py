"""A real student under a teacher of another vocabulary: what shared tokens cover, and where one
step of each loss leads.

    python -m experiments.real_simct --student SMALL --teacher BIG --prompts P --out runs/units

Trains one step an arm from the same student on the same rollouts, and writes OUT/units.json:

    units      what methods.simct score says of the rollouts
    coverage   share of the text in units of one token on either side, by kind of character
    seen       share of the teacher's probability that lies on the candidates, mean over units:
               of all rollouts, and of those of `few` and `full`
    bits       bits of the teacher's answers to other prompts, ends included, a byte of their
               text: before, how the step changes them, and by how much more than another
               arm's; means over prompts, in which a short answer weighs as a long one
    cosine     of gradients: AdamW's first moments are proportional to them after one step

and `bits by prompt`, `settings` and `versions`.

Arms: `simple` (one-token units alone, the baseline of arXiv 2605.07711), `simct`, `dropped`
(without candidates that only begin a unit's text), `sft` (one of the teacher's own answers to
each prompt, in the student's tokens); `odd` and `even`, as `simct` on every other prompt: how
far below 1 other prompts and answers pull the cosine of half batches; on the first --few
prompts, for it is dear: `full` (all shared tokens are candidates), and `few`, as `simct`, to
hold it against.

Simplifications: 1. a first step of AdamW moves a weight by about the rate, whatever the size of
its gradient, and leaves alone what has none: rows of tokens that are neither read nor
candidates; 2. intervals are over the prompts that are measured, after one step on one batch;
3. answers of tools are left out.
"""

import dataclasses
import json
import math
import shutil
import unicodedata

import numpy as np
from safetensors import safe_open

from experiments.by_prompt import minus, over_prompts
from experiments.study import Run, add_settings, say, setting, settings_of, versions
from methods.rows import METHODS
from methods.simct.align import one_to_one, pieces_of
from opd import cli, disk, files, records
from opd.batches import Data, Inputs
from opd.policy import load_policy, load_tokenizer
from opd.records import BadInput
from opd.tensors import StepSettings, current_logps
from opd.trainer import MOMENTS


@dataclasses.dataclass(frozen=True)
class Settings:
    student: str = setting("", "folder or Hugging Face id", smoke="-")
    teacher: str = setting("", "of another vocabulary", smoke="-")
    prompts: str = setting("", "JSONL of prompts (real_tasks make)", smoke="-")
    train_prompts: int = setting(32, "prompts of the step", smoke=3)
    test_prompts: int = setting(32, "prompts whose answers are measured", smoke=3)
    n: int = setting(4, "rollouts per prompt", smoke=2)
    few: int = setting(2, "prompts of the arms `few` and `full`", smoke=1)
    candidates: int = setting(16, "of the student's likeliest tokens", smoke=4)
    max_tokens: int = setting(200, "longest answer", smoke=12)
    learning_rate: float = setting(1e-6, "of the step")
    micro_batch_tokens: int = setting(1024, "tokens in one forward pass")
    dtype: str = setting("float32", "of both models", choices=("float32", "bfloat16"))
    seed: int = setting(0, "of sampling")

    def __post_init__(self):
        if not (self.student and self.teacher and self.prompts):
            raise BadInput("expected --student, --teacher and --prompts (or --smoke)")


# arm: its method, settings, rollouts and scores
ARMS = {
    "simple": ("simple-opd", {}, "rollouts", "units"),
    "simct": ("simct", {}, "rollouts", "units"),
    "dropped": ("simct", {"prefixes": "drop"}, "rollouts", "units"),
    "odd": ("simct", {}, "odd", "units_odd"),
    "even": ("simct", {}, "even", "units_even"),
    "few": ("simct", {}, "few", "units_few"),
    "full": ("simct", {}, "few", "units_full"),
    "sft": ("sft", {}, "taught", None),
}
# arms whose gradients are compared
COMPARED = [("simple", "simct"), ("dropped", "simct"), ("sft", "simct"), ("sft", "simple")]
COMPARED += [("odd", "even"), ("few", "full")]
# arm: the one, trained on the same prompts, whose bits its own are held against
AGAINST = {"simct": "simple", "dropped": "simple", "sft": "simple", "full": "few"}
KINDS = {"L": "letters", "N": "digits", "P": "punctuation", "S": "symbols", "Z": "spaces"}

# ---- coverage


def kind_of(character):
    """The kind of text that a character is part of."""
    if character.isspace():
        return "spaces"
    return KINDS.get(unicodedata.category(character)[0], "other")


def coverage(tokenizer, rollouts, scores):
    """{kind: {"bytes", "strict"}}: bytes of that kind of character, and their share in units of
    one token on either side."""
    bytes_of = {}
    strict = {}
    for key, rollout in rollouts.items():
        pieces = pieces_of(tokenizer, rollout["response_ids"])
        strict_units = filter(one_to_one, scores[key]["units"])
        in_units = {i for unit in strict_units for i in range(unit[0], unit[1])}
        inside = []  # of every byte
        for i, piece in enumerate(pieces):
            inside += [i in in_units] * len(piece)
        at = 0
        # a byte of no character is one of its own
        for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
            size = len(character.encode("utf-8", "surrogateescape"))
            kind = kind_of(character)
            bytes_of[kind] = bytes_of.get(kind, 0) + size
            strict[kind] = strict.get(kind, 0) + sum(inside[at : at + size])
            at += size
    return {k: {"bytes": n, "strict": strict[k] / n} for k, n in sorted(bytes_of.items())}


def seen(scores):
    """Mean over all units of these records of the teacher's probability of the candidates."""
    logps = [records.unpack(record["unit_topk"]["logprobs"]) for record in scores]
    return float(np.concatenate([np.exp(x.astype(float)).sum(-1) for x in logps]).mean())


# ---- bits and gradients


def bits_a_byte(model, texts, prompts, settings):
    """{prompt: bits a byte of the texts that answer it}, in tokens of `model`."""
    policy = load_policy(model, settings.dtype)
    data = Data(Inputs(texts, prompts=prompts), METHODS["sft"], policy)
    step = StepSettings(settings.micro_batch_tokens)
    found = {}
    for prompt, keys in data.groups.items():
        items = data.sequences(keys)
        nats = -sum(float(logp.sum()) for logp in current_logps(policy, data, items, step))
        size = sum(len(data.rollouts[key]["text"].encode("utf-8")) for key in keys)
        found[prompt] = nats / math.log(2) / max(1, size)
    return found


def cosine(one, other):
    """Cosine of all first moments of two trained folders, one tensor read at a time."""
    dot = squares = others = 0.0
    with safe_open(one / MOMENTS, "pt") as a, safe_open(other / MOMENTS, "pt") as b:
        for name in a.keys():
            if name.startswith("exp_avg/"):
                x, y = (f.get_tensor(name).double().flatten() for f in (a, b))
                dot += float(x @ y)
                squares += float(x @ x)
                others += float(y @ y)
    return dot / math.sqrt(squares * others) if squares and others else None


# ---- the command


class Comparison:
    """The files of one student and teacher: `taught`, the teacher's answers to `train_prompts`,
    and `tested`, those to `test_prompts`; `rollouts`, the student's, and its `own` scores;
    `units`, the teacher's scores; parts of both files."""

    def __init__(self, run, student, teacher, prompts):
        s = run.settings
        self.run = run
        self.student = student
        self.teacher = teacher
        trained = s.train_prompts
        wanted = trained + s.test_prompts
        found = sum(1 for _ in files.read(prompts, "prompts"))
        if found < wanted:
            raise BadInput(
                f"{prompts}: expected {wanted} prompts, {trained} for the step and "
                f"{s.test_prompts} to measure on, got {found}"
            )
        self.train_prompts = run.part_of(prompts, f"0:{trained}")
        self.test_prompts = run.part_of(prompts, f"{trained}:{wanted}")
        self.few_prompts = run.part_of(prompts, f"0:{s.few}")

    def path(self, name):
        return self.run.out / f"{name}.jsonl"

    def stage(self, command, name, **options):
        options |= dict(dtype=self.run.settings.dtype, out=self.path(name))
        return self.run.stage(command, **options)

    def prepare(self):
        """Rollouts, the teacher's scores of them, and its own answers."""
        s = self.run.settings
        how = dict(max_tokens=s.max_tokens, seed=s.seed)
        for name, prompts in (("taught", self.train_prompts), ("tested", self.test_prompts)):
            asked = dict(model=self.teacher, prompts=prompts, n=1)
            self.stage("teacher.py answer", name, **asked, **how)
        asked = dict(model=self.student, prompts=self.train_prompts, n=s.n)
        self.stage("rollout.py", "rollouts", **asked, **how)
        on = {"rollouts": self.path("rollouts")}
        self.stage("teacher.py score", "own", model=self.student, **on, top_k=s.candidates)
        self.score_summary = self.score(
            "units", **on, prompts=self.train_prompts, top_k_of=self.path("own")
        )
        asked = [str(p["id"]) for p in files.read(self.train_prompts, "prompts")]
        parts = {"few": asked[: s.few], "odd": asked[::2], "even": asked[1::2]}
        for name, some in parts.items():
            self.part(name, "rollouts", set(some))
            self.part(f"units_{name}", "units", set(some))
        self.score("units_full", rollouts=self.path("few"), prompts=self.few_prompts)

    def part(self, name, whole, prompts):
        """A file of the records of some prompts."""
        rows = files.read(self.path(whole), "rollouts" if whole == "rollouts" else "scores")
        some = [row for row in rows if str(row["id"]) in prompts]
        self.run.write(f"{name}.jsonl", f"{len(prompts)} prompts of {whole}.jsonl", some)

    def score(self, name, **options):
        options |= dict(model=self.teacher, student=self.student)
        found = self.stage("methods.simct score", name, **options)
        return {key: x for key, x in found.items() if key != "out"}

    def train(self, arm):
        """One step of an arm; returns its folder."""
        s = self.run.settings
        method, changed, rollouts, scores = ARMS[arm]
        out = self.run.out / arm
        reads = {"rollouts": self.path(rollouts)}
        reads |= {"scores": self.path(scores)} if scores else {"prompts": self.train_prompts}
        how = dict(steps=1, batch_size=s.train_prompts, learning_rate=s.learning_rate)
        how["fresh_optimizer"] = True  # a student from train.py has moments
        how |= dict(micro_batch_tokens=s.micro_batch_tokens, dtype=s.dtype, seed=s.seed)
        how |= dict(method=method, model=self.student, set=changed)
        self.run.stage("train.py", **how, **reads, out=out)
        return out

    def measure_arms(self, tested):
        """{"bits": {"before" or an arm: bits a byte of the texts, by prompt, after its step},
        "cosine": {pair: cosine}}, kept in OUT/arms.json; a folder goes when nothing is to be
        held against it any more.  tested: arguments of `bits_a_byte`."""
        path = self.run.out / "arms.json"
        kept = {"bits": {}, "cosine": {}}
        if path.exists():
            kept = json.loads(path.read_text())
        if "before" not in kept["bits"]:
            kept["bits"]["before"] = bits_a_byte(self.student, *tested)
            disk.write_atomically(path, json.dumps(kept, indent=1) + "\n")
        for arm in ARMS:
            if arm not in kept["bits"]:
                kept["bits"][arm] = bits_a_byte(self.train(arm), *tested)
                for pair in COMPARED:
                    if arm in pair and kept["bits"].keys() >= set(pair):
                        folders = (self.run.out / each for each in pair)
                        kept["cosine"][", ".join(pair)] = cosine(*folders)
                disk.write_atomically(path, json.dumps(kept, indent=1) + "\n")
            for done in kept["bits"].keys() & ARMS:
                if all(", ".join(p) in kept["cosine"] for p in COMPARED if done in p):
                    shutil.rmtree(self.run.out / done, ignore_errors=True)
        return kept


def measure(comparison):
    """The numbers of OUT/units.json."""
    rows = {}
    for name, kind in (("rollouts", "rollouts"), ("units", "scores")):
        found = files.read(comparison.path(name), kind)
        rows[name] = {records.key_of(r, kind): r for r in found}
    tokenizer = load_tokenizer(comparison.student)
    result = {"units": comparison.score_summary}
    result["coverage"] = coverage(tokenizer, rows["rollouts"], rows["units"])
    result["seen"] = {"units": seen(rows["units"].values())}
    for name in ("units_few", "units_full"):
        result["seen"][name] = seen(files.read(comparison.path(name), "scores"))
    tested = comparison.path("tested"), comparison.test_prompts, comparison.run.settings
    kept = comparison.measure_arms(tested)
    result["bits"] = changes(kept["bits"])
    return result | {"cosine": kept["cosine"], "bits by prompt": kept["bits"]}


def changes(bits):
    """Means over prompts with half of the 95 % t-interval: of the bits before, of what every
    arm changes them by, and of how much more than another does.  bits: {"before" or an arm:
    {prompt: bits}}."""
    before = bits["before"]
    found = {"before": over_prompts({(prompt,): x for prompt, x in before.items()})}
    change = {
        arm: {(prompt,): x - before[prompt] for prompt, x in after.items()}
        for arm, after in bits.items()
        if arm != "before"
    }
    for arm, values in change.items():
        found[arm] = over_prompts(values)
        if other := AGAINST.get(arm):
            found[arm][f"minus {other}"] = over_prompts(minus(values, change[other]))
        say(f"{arm}: {found[arm]['mean']:+.5f} bits a byte")
    return found


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--smoke", action="store_true", help="a tiny run on untrained models")
    add_settings(p, Settings)
    args = p.parse_args(argv)
    run = Run(args.out, settings_of(args, Settings), list(ARMS), None, None, args.smoke)
    s = run.settings
    given = s.student, s.teacher, s.prompts
    if args.smoke:
        sizes = dict(train_prompts=6, eval_prompts=2, clean=8, mixed=8, student_merges="16")
        run.once("worlds.sums", "world/toy", **sizes)
        names = "student_merged", "teacher", "train.jsonl"
        given = (str(run.world / "toy" / name) for name in names)
    with run.alone():
        comparison = Comparison(run, *given)
        comparison.prepare()
        result = measure(comparison)
    result |= {"settings": dataclasses.asdict(run.settings), "versions": versions()}
    out = run.out / "units.json"
    disk.write_atomically(out, json.dumps(result, indent=1) + "\n")
    return {"out": str(out)}


if __name__ == "__main__":
    cli.run(main)
