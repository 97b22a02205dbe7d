"""What a training step is made of: rollouts joined with the rewards, scores and texts that
belong to them.

`Data` walks the files once, refuses what does not belong together, and works out what only a
whole file can tell: groups, advantages, weights of sequences.  `Data.sequences` then hands out
a step's rollouts as dicts of lists and arrays.

Provenance is read off the recorded weight hashes: a row of METHODS with prefix "self" (or
"mixed") accepts only rollouts of the very weights it trains, "teacher" and "old" refuse those,
and "teacher" wants the scorer's own answers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opd import loss as losses
from opd import records
from opd.chat import check_text, turn_ids
from opd.files import Table, guess_kind, record_for, without
from opd.policy import check_ids, check_tokens, same_template
from opd.records import BadInput
from opd.stats import REPETITIVE, TAIL, repetition_ratio


@dataclass(frozen=True)
class Inputs:
    """Paths of the files that belong together; None where there is none."""

    rollouts: str
    rewards: str = None
    scores: str = None
    reference: str = None
    token_weights: str = None
    prompts: str = None

    def open(self, name, kind):
        """The file as a Table, or None."""
        path = getattr(self, name)
        return Table(path, kind) if path else None

    def paths(self):
        return [path for path in vars(self).values() if path]


class Solutions(Table):
    """The `solution` of every prompt of a file as an answer to it."""

    def __getitem__(self, key):
        prompt = super().__getitem__(key[:1])
        if "solution" not in prompt:
            raise BadInput(
                f"{self.where(key[:1])}: solution: expected a text, but the field is missing"
            )
        asked = {name: prompt[name] for name in ("messages", "prompt") if name in prompt}
        return {
            "id": prompt["id"],
            "sample": 0,
            "policy": {"model": "solution"},
            "text": prompt["solution"],
            "finish_reason": "stop",
            **asked,
        }

    def where(self, key):
        return super().where(key[:1])


class Data:
    """The rollouts with what belongs to them, read when a step needs them.

    groups        {prompt id: [keys of its rollouts]}
    temperature   that of the rollouts, where it matters, or None
    advantages, given_rewards, omegas   [rollouts of the file], in its order
    signals       metrics of the whole file, where there are rewards
    dropped       groups that left for a failed judgement;  silent: for weights of 0, or with no
                  token to train on in what has weight
    left_out      prompts that left because a file has no record of them
    has_texts     whether an answer has no tokens of this model;  retokenized: keys of those
                  whose text had to be tokenized
    writers, scorers   {weights, "" if unknown: model} of who wrote the answers, who scored
                  them"""

    def __init__(self, inputs, method, policy, teacher=None, allow_stale=False):
        self.method = method
        self.policy = policy
        self.teacher = teacher
        self.allow_stale = allow_stale
        # given answers of "mixed" come as another Data, with prefix "data"
        self.prefix = "self" if method.prefix == "mixed" else method.prefix
        self.rewards = inputs.open("rewards", "rewards")
        self.scores = inputs.open("scores", "scores")
        self.reference = inputs.open("reference", "scores")
        self.token_weights = inputs.open("token_weights", "weights")
        self.prompts = inputs.open("prompts", "prompts")
        self.rollouts = self._open_rollouts(inputs.rollouts)
        self.groups = {}
        self.temperature = None
        self.has_texts = False
        self.retokenized = set()
        self.writers = {}
        self.scorers = {}
        self.left_out = set()
        self._top_k = {}
        self._widths = {}
        tables = [self.rewards, self.scores, self.reference, self.token_weights]
        lacking = {table: set() for table in tables if table is not None}
        trained = set()  # prompts of which an answer has a token to train on
        for key in self.rollouts.keys():  # found out now, not after half of the updates
            rollout = self.rollouts[key]
            self._check_source(rollout, self.rollouts.where(key))
            self.writers[rollout["policy"].get("weights") or ""] = rollout["policy"]["model"]
            self.groups.setdefault(key[0], []).append(key)
            if has_token(rollout):
                trained.add(key[0])
            missing = [table for table in lacking if key not in table]
            for table in missing:
                lacking[table].add(key[0])
            if not missing:
                self._check_partners(rollout, key)
        for table, prompts in lacking.items():
            self.leave_out(prompts, f"{table.path} has not all {table.kind} of them")
        empty = self.groups.keys() - trained
        self.leave_out(empty, f"no answer to them in {inputs.rollouts} has a token to train on")
        self._weigh()

    def _open_rollouts(self, path):
        if self.prefix == "self" or self.scores or self.reference:
            return Table(path, "rollouts")
        if self.prefix == "data" and guess_kind(path) == "prompts":
            return Solutions(path, "prompts")
        return Table(path, "answers")

    # ---- refusals

    def _check_source(self, rollout, where):
        """A rollout of another policy, template, vocabulary or sampler is refused."""
        ours = self.policy.identity
        writer = rollout["policy"].get("weights")
        if self.prefix == "self":
            if writer != ours["weights"] and not self.allow_stale:
                raise BadInput(
                    f"{where}: policy.weights: expected {ours['weights']}, the weights of "
                    f"{ours['model']}, got {writer}: the method is on-policy; run rollout.py "
                    f"with this model (or --allow stale)"
                )
            self._check_config(rollout["policy"], where)
            self._check_sampling(rollout, where)
        if self.prefix == "teacher":
            self._check_teachers_answer(writer, where)
        if self.prefix == "old" and writer == ours["weights"]:
            raise BadInput(
                f"{where}: policy.weights: expected those of an earlier state, got {writer}, "
                f"those of {ours['model']}: samples of the very weights that are trained are "
                f"on-policy: --set prefix=self"
            )
        if self.prefix == "self" or self.scores or self.reference:
            check_tokens(rollout, where, ours, self.policy.vocabulary)
        if self._has_our_tokens(rollout):
            self._check_readable(rollout["prompt_ids"] + rollout["response_ids"], where)
            check_text(self.policy.tokenizer, rollout, where)
        else:
            self.has_texts = True

    def _check_readable(self, ids, where):
        """The policy, and a teacher in memory, have rows and positions for these tokens."""
        for model in filter(None, (self.policy, self.teacher)):
            check_ids(ids, where, model.vocabulary, model.identity)
            model.check_length(len(ids), where)

    def _check_config(self, writer, where):
        """The same weights under another config are another model."""
        ours = self.policy.identity
        known = writer.get("weights") == ours["weights"] and "config" in writer
        if known and writer["config"] != ours.get("config") and not self.allow_stale:
            raise BadInput(
                f"{where}: policy.config: expected {ours.get('config')}, that of "
                f"{ours['model']}, got {writer['config']}: its config or tokenizer files have "
                f"been changed since: run rollout.py again (or --allow stale)"
            )

    def _check_sampling(self, rollout, where):
        """The recorded log-probs are those of the distribution that was sampled from."""
        if self.method.ratio == "none":
            return  # without importance weights any sampling will do
        temperature = rollout["temperature"]
        if rollout["top_p"] != 1 or temperature <= 0:
            raise BadInput(
                f"{where}: top_p: expected 1 and a temperature above 0, got top_p "
                f"{rollout['top_p']}, temperature {temperature}: its log-probs are not those "
                f"of the sampler; sample again for training"
            )
        if self.temperature not in (None, temperature):
            raise BadInput(
                f"{where}: temperature: expected {self.temperature} as in the lines before, "
                f"got {temperature}"
            )
        self.temperature = temperature
        if (self.scores or self.reference or self.teacher) and temperature != 1:
            raise BadInput(
                f"{where}: temperature: expected 1, got {temperature}: scores are log-probs at "
                f"temperature 1"
            )

    def _check_teachers_answer(self, writer, where):
        ours = self.policy.identity
        if writer == ours["weights"]:
            raise BadInput(
                f"{where}: policy.weights: expected another model's, got {writer}, those of "
                f"{ours['model']}: the method is off-policy, on a teacher's answers; for the "
                f"policy's own there are opd-full and dagger"
            )
        teacher = self.teacher.identity if self.teacher else {"weights": writer}
        if writer and writer != teacher["weights"]:
            raise BadInput(
                f"{where}: policy.weights: expected {teacher['weights']}, the weights of "
                f"{teacher['model']}, got {writer}: the method wants the teacher's own "
                f"answers; for those of others --set prefix=data"
            )

    def _check_partners(self, rollout, key):
        """Every record that belongs to the rollout is there and holds what the row reads."""
        if self.token_weights is not None:
            record_for(self.token_weights, rollout, self.rollouts)
        if self.scores is not None:
            score = record_for(self.scores, rollout, self.rollouts)
            self._check_score(score, rollout, self.scores.where(key))
        if self.reference is not None:
            score = record_for(self.reference, rollout, self.rollouts)
            where = self.reference.where(key)
            if "context" in score:
                raise BadInput(
                    f"{where}: context: expected scores after the student's own prompt, got "
                    f"those after another (teacher.py score --prompts): no reference to stay "
                    f"near"
                )
            if self.method.reference_support == "full":
                self._check_support(score, where, "reference")

    def _check_score(self, score, rollout, where):
        scorer = score["policy"].get("weights")
        writer = rollout["policy"].get("weights")
        self.scorers[scorer or ""] = score["policy"]["model"]
        if self.prefix == "teacher" and None not in (scorer, writer) and scorer != writer:
            raise BadInput(
                f"{where}: policy.weights: expected {writer}, the weights that wrote the "
                f"answer, got {scorer}: prefix teacher means the teacher's own answers; for "
                f"those of others --set prefix=data"
            )
        if self.method.own:
            self._check_widths(score, where, rollout["loss_mask"])
        elif self.method.support:
            self._check_support(score, where, "teacher")

    def _check_widths(self, score, where, mask):
        """Refuses a score that a method of its own loss cannot read, or with another number of
        values a token than the lines before."""
        arrays = self.method.own.fields(score, where, mask, self.policy.vocabulary)
        for name, array in arrays.items():
            width = array.shape[1:]
            if self._widths.setdefault(name, width) != width:
                raise BadInput(
                    f"{where}: expected {self._widths[name][0]} log-probs a token as in the "
                    f"lines before, got {width[0]}: score the whole file with one command"
                )

    def _check_support(self, score, where, whose):
        """Refuses a score without a distribution, or with another number of tokens than the
        lines before."""
        if "topk" not in score:
            raise BadInput(
                f"{where}: topk: expected the {whose}'s distribution, but the field is "
                f"missing: run teacher.py score with --top-k"
            )
        largest = int(records.unpack(score["topk"]["ids"]).max(initial=0))
        check_ids([largest], f"{where}: topk", self.policy.vocabulary, self.policy.identity)
        size = score["topk"]["ids"]["shape"][1]
        if self._top_k.setdefault(whose, size) != size:
            raise BadInput(
                f"{where}: topk: expected {self._top_k[whose]} tokens as in the lines before, "
                f"got {size}: score the whole file with one --top-k"
            )

    # ---- groups

    def leave_out(self, prompts, reason):
        """Goes on without these prompts, and names them; BadInput if none is left."""
        kept = without(self.groups, prompts, reason)
        self.left_out |= self.groups.keys() - kept.keys()
        self.groups = kept

    def keep_answered(self, given):
        """Goes on without the prompts to which the Data `given` has no answer."""
        lacking = self.groups.keys() - given.groups.keys()
        self.leave_out(lacking, f"{given.rollouts.path} has no answer to them")

    def _weigh(self):
        """Group advantages and weights of all rollouts.  Groups with a failed judgement are
        dropped and counted, rollouts of weight 0 leave the data, and with them groups of which
        none is left."""
        self.advantages = np.zeros(len(self.rollouts))
        self.given_rewards = np.zeros(len(self.rollouts))
        self.omegas = np.ones(len(self.rollouts))
        self.signals = {}
        self.dropped = 0
        self.silent = 0
        if self.rewards is None:
            return
        count, failed, flat = len(self.groups), 0, 0
        rewarded = sum(map(len, self.groups.values()))
        for prompt, keys in list(self.groups.items()):
            rollouts = [self.rollouts[key] for key in keys]
            rewards = [record_for(self.rewards, r, self.rollouts)["reward"] for r in rollouts]
            failed += rewards.count(None)
            advantages = losses.group_advantages(rewards, self.method.advantage)
            if advantages is None:
                self.dropped += 1
                del self.groups[prompt]
                continue
            flat += max(rewards) == min(rewards)
            rows = [self.rollouts.row(key) for key in keys]
            omegas = losses.sequence_weights(self.method, rewards)
            self.advantages[rows] = advantages
            self.given_rewards[rows] = rewards
            self.omegas[rows] = omegas
            kept = [(key, r) for key, r, omega in zip(keys, rollouts, omegas) if omega]
            self.groups[prompt] = [key for key, _ in kept]
            enough = all if self.method.omega == "preference" else any  # DPO wants both
            if not kept or not enough(has_token(rollout) for _, rollout in kept):
                self.silent += 1
                del self.groups[prompt]
        self.signals = {
            "judge/failure_rate": failed / rewarded,
            "judge/groups_dropped": self.dropped,
            "reward/zero_variance_groups": flat / max(1, count - self.dropped),
            "reward/groups_without_weight": self.silent,
        }
        if not self.groups:
            raise BadInput(
                f"{self.rewards.path}: every group has a failed judgement or weights of 0 "
                f"(omega {self.method.omega}), nothing is left to train on"
            )

    def check_signal(self, steps):
        """Says in how many of the steps (lists of prompts) every advantage is 0.  BadInput for
        groups of one, in which no answer can be better than the others."""
        if "reward" not in self.method.coefficient:
            return
        if max(map(len, self.groups.values())) == 1:
            raise BadInput(
                f"{self.rollouts.path}: expected at least 2 rollouts of a prompt (rollout.py "
                f"--n) for a group advantage, got 1: every advantage would be 0"
            )
        flat = 0
        for step in steps:
            keys = [key for prompt in step for key in self.groups[prompt]]
            flat += not self.advantages[[self.rollouts.row(key) for key in keys]].any()
        if flat:
            print(
                f"WARNING: in {flat} of {len(steps)} steps every advantage is 0, for all "
                f"answers to a prompt have one reward: nothing is learnt from rewards in them"
            )

    def check_texts(self, steps):
        """Tokenizes what the steps will read, so that a text that cannot be is refused before
        the first of them."""
        if not self.has_texts:
            return
        for prompt in dict.fromkeys(prompt for step in steps for prompt in step):
            for key in self.groups[prompt]:
                self._in_our_tokens(self.rollouts[key], key)

    def counts(self):
        """What a run's summary says of the data."""
        return {
            "groups_dropped": self.dropped,
            "prompts_left_out": len(self.left_out),
            "groups_without_weight": self.silent,
            "retokenized": len(self.retokenized),
        }

    # ---- a step's rollouts

    def items(self, prompts):
        """`sequences` of all rollouts of these prompts."""
        return self.sequences([key for prompt in prompts for key in self.groups[prompt]])

    def sequences(self, keys):
        """A dict a rollout: prompt_ids, response_ids, mask, length (its trained tokens), what
        the metrics read, and an array [length, ...] for everything known of each trained
        token."""
        return [
            self._sequence(key, self._in_our_tokens(self.rollouts[key], key)) for key in keys
        ]

    def _in_our_tokens(self, rollout, key):
        """The rollout, with tokens of this model where it is a text."""
        if self._has_our_tokens(rollout):
            return rollout
        return rollout | self._tokenize(rollout, key)

    def _has_our_tokens(self, rollout):
        got, ours = rollout["policy"], self.policy.identity
        same = got.get("vocabulary") == ours["vocabulary"]
        same = same and same_template(got, ours, "calls" in rollout)
        return same and "response_ids" in rollout

    def _sequence(self, key, rollout):
        mask = rollout["loss_mask"]
        row = self.rollouts.row(key)
        item = {
            "key": key,
            "prompt_ids": rollout["prompt_ids"],
            "response_ids": rollout["response_ids"],
            "mask": mask,
            "length": sum(mask),
            "truncated": rollout["finish_reason"] == "length",
            "omega": float(self.omegas[row]),
            "own": rollout["policy"].get("weights") == self.policy.identity["weights"],
        }
        if "calls" in rollout:
            item["calls"] = [call["ok"] for call in rollout["calls"]]
            item["limited"] = rollout["finish_reason"] == "tool_limit"
        if "end_mass" in rollout:
            item["student_end_mass"] = rollout["end_mass"]
        if self.rewards is not None:
            item["advantage"] = float(self.advantages[row])
            item["reward"] = float(self.given_rewards[row])
        if self.prefix == "self":
            text = records.searched_for_loops(rollout)
            ratio = repetition_ratio(text, TAIL)
            item["repetitive"] = len(text) >= TAIL and ratio > REPETITIVE
        trained = np.flatnonzero(mask)
        arrays = self._token_arrays(key, rollout, item)
        return item | {name: array[trained] for name, array in arrays.items()}

    def _token_arrays(self, key, rollout, item):
        """{name: [T, ...]}: everything known of each response token.  A teacher's end_mass goes
        into the item."""
        arrays = {}
        if self.prefix == "self":
            arrays["behaviour_logp"] = as_float32(rollout["logprobs"])
        if self.scores is not None:
            score = record_for(self.scores, rollout, self.rollouts)
            where = self.scores.where(key)
            arrays["teacher_logp"] = as_float32(score["logprobs"])
            if "end_mass" in score:
                item["teacher_end_mass"] = score["end_mass"]
            if self.method.own:
                vocabulary = self.policy.vocabulary
                arrays |= self.method.own.fields(score, where, item["mask"], vocabulary)
            elif self.method.support:
                arrays |= self._support(score, "support")
        if self.reference is not None:
            score = record_for(self.reference, rollout, self.rollouts)
            arrays["reference_logp"] = as_float32(score["logprobs"])
            if self.method.reference_support == "full":
                arrays |= self._support(score, "reference_support")
        if self.token_weights is not None:
            record = record_for(self.token_weights, rollout, self.rollouts)
            arrays["token_weight"] = as_float32(record["weights"])
        return arrays

    def _support(self, score, name):
        """{NAME_ids: [T, K], NAME_logp: [T, K]} of a score's distribution."""
        ids = records.unpack(score["topk"]["ids"])
        return {f"{name}_ids": ids, f"{name}_logp": records.unpack(score["topk"]["logprobs"])}

    def _tokenize(self, answer, key):
        """{"prompt_ids", "response_ids", "loss_mask"} of a text-only answer."""
        prompt_ids, ids = turn_ids(self.policy, self._prompt_of(answer, key), answer)
        where = self.rollouts.where(key)
        self._check_readable(prompt_ids + ids, where)
        self.retokenized.add(key)
        return {"prompt_ids": prompt_ids, "response_ids": ids, "loss_mask": [1] * len(ids)}

    def _prompt_of(self, answer, key):
        if "steps" in answer:  # its text holds tool output as well as the model's words
            raise BadInput(
                f"{self.rollouts.where(key)}: policy: expected the vocabulary and template of "
                f"this model, got others: an episode with tools cannot be told in other tokens"
            )
        if "messages" in answer or "prompt" in answer:
            return answer
        if self.prompts is not None and (key[0],) in self.prompts:
            return self.prompts[(key[0],)]
        raise BadInput(
            f"{self.rollouts.where(key)}: expected tokens of this model's vocabulary and "
            f"template, or `messages`, or its prompt through --prompts, but it has none of them"
        )


def has_token(rollout):
    """Whether an answer has a token to train on; a cut empty text has none."""
    if "loss_mask" in rollout:
        return any(rollout["loss_mask"])
    return bool(rollout["text"]) or rollout["finish_reason"] == "stop"


def as_float32(numbers):
    return np.asarray(numbers, np.float32)


def answer_ids(policy, answer):
    """An answer's tokens in this model's vocabulary: its own ids where they are of that
    vocabulary, else those of its text after a short question."""
    vocabulary = answer["policy"].get("vocabulary")
    if "response_ids" in answer and vocabulary == policy.identity["vocabulary"]:
        where = f"answer to {answer['id']!r}"
        check_ids(answer["response_ids"], where, policy.vocabulary, policy.identity)
        return answer["response_ids"]
    asked = {"prompt": "?"}
    if policy.tokenizer.chat_template:
        asked = {"messages": [{"role": "user", "content": "?"}]}
    return turn_ids(policy, {"id": answer["id"]} | asked, answer)[1]


# ---- whose answers a model was fine-tuned on


def taught_by(source, method, data):
    """The teachers whose answers a model was fine-tuned on, {weights, "" if unknown: name}:
    those of this data, or what the model's folder says."""
    if method.prefix == "teacher":
        return data.writers
    kept = Path(source) / "sft_teacher.json"
    return json.loads(kept.read_text()) if kept.exists() else {}


def check_teacher(source, method, data):
    """A row with consistency "sft" refuses another teacher than that of the fine-tuning."""
    if method.consistency != "sft":
        return
    if data.teacher:
        where = data.teacher.identity["model"]
        scorers = {data.teacher.identity["weights"]: where}
    else:
        where = data.scores.path
        scorers = data.scorers
    before = taught_by(source, method, data)
    if set(before) != set(scorers) or "" in before:
        raise BadInput(
            f"{where}: policy.weights: expected the teacher that {source} was fine-tuned on, "
            f"{described(before)}, got {described(scorers)}: the method wants one teacher for "
            f"both; pass --allow teacher if another is meant"
        )


def described(teachers):
    """{weights: name} in words."""
    names = (f"{weights or 'unknown weights'} ({name})" for weights, name in teachers.items())
    return ", ".join(names) or "none on record"


def plan(groups, batch_size, epochs, max_steps, seed):
    """The prompts of every optimiser step: seeded order, an epoch at a time, a short last batch
    when they do not divide.

    plan(["a", "b", "c"], 2, 1, None, 0) -> [["c", "a"], ["b"]]"""
    rng = np.random.default_rng(seed)
    names = sorted(groups)
    steps = []
    while epochs > 0 if max_steps is None else len(steps) < max_steps:
        order = [names[i] for i in rng.permutation(len(names))]
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        epochs -= 1
    return steps[:max_steps]
