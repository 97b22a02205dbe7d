"""What a training step is made of: rollouts joined with the rewards, scores and texts that
belong to them.

train.py's reading half.  `Data` walks the files once, refuses what does not belong together,
and works out what only a whole file can tell: groups, advantages, weights of sequences, and
whose rollouts they are.  `Data.sequences` then hands a step's rollouts out as plain lists.

Provenance is read off the recorded weight hashes, not believed: a row of METHODS with prefix
"self" (or "mixed") accepts only rollouts of the very weights it trains, "teacher" and "old"
refuse those, and "teacher" wants the scorer's own answers.
"""

import json
from pathlib import Path

import numpy as np

from opd import loss as losses
from opd import records
from opd.files import Table, guess_kind, record_for
from opd.policy import check_tokens, render
from opd.records import BadInput
from opd.stats import repetition_ratio


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

    `groups` = {prompt id: [keys of its rollouts]}; `sequences(keys)` are dicts of plain lists,
    one a rollout."""

    def __init__(self, args, method, policy, teacher=None, given=False):
        """given: these are the texts of --data, which a row with prefix "mixed" takes for some
        steps, and not its rollouts."""
        self.method, self.policy, self.teacher, self.tail, self.threshold = (
            method,
            policy,
            teacher,
            args.tail,
            args.threshold,
        )
        self.prefix = "data" if given else "self" if method.prefix == "mixed" else method.prefix
        files = (
            {"scores": args.data_scores}
            if given
            else {
                "scores": args.scores,
                "rewards": args.rewards,
                "reference": args.reference,
                "weights": args.token_weights,
            }
        )
        self.scores, self.rewards, self.reference, self.weights = (
            Table(files[name], kind) if files.get(name) else None
            for name, kind in (
                ("scores", "scores"),
                ("rewards", "rewards"),
                ("reference", "scores"),
                ("weights", "weights"),
            )
        )
        self.prompts = Table(args.prompts, "prompts") if args.prompts else None
        needs_tokens, path = (
            self.prefix == "self" or self.scores or self.reference,
            args.data if given else args.rollouts,
        )
        solutions = self.prefix == "data" and not needs_tokens and guess_kind(path) == "prompts"
        self.rollouts = (
            Solutions(path, "prompts")
            if solutions
            else Table(path, "rollouts" if needs_tokens else "answers")
        )
        self.writers, self.scorers = {}, {}
        self.groups, self.retokenized, self.temperature, self.top_k = {}, set(), None, {}
        for rollout in self.rollouts:
            key = records.key_of(rollout, "rollouts")
            self._check(rollout, self.rollouts.where(key), args)
            self.writers[rollout["policy"].get("weights")] = rollout["policy"]["model"]
            # found out now, not after half of the updates
            for table in (self.scores, self.reference, self.weights):
                if table is not None:
                    score = record_for(table, rollout, self.rollouts)
                    if table is self.scores:
                        self._check_score(score, rollout, self.scores.where(key))
                        self.scorers[score["policy"].get("weights")] = score["policy"]["model"]
                    if table is self.reference and "context" in score:
                        raise BadInput(
                            f"{self.reference.where(key)}: context: expected scores after "
                            f"the student's own prompt, got those after another "
                            f"(teacher.py score --prompts): no reference to stay "
                            f"near"
                        )
                    if table is self.reference and method.reference_support == "full":
                        self._check_support(score, self.reference.where(key), "reference")
            self.groups.setdefault(key[0], []).append(key)
        self._weigh()

    def _check(self, rollout, where, args):
        """A rollout of another policy, template, vocabulary or sampler is refused."""
        got, ours, row = rollout["policy"], self.policy.identity, f"--method {args.method}"
        if self.prefix == "self":
            # without importance weights it is no matter how the samples were drawn
            weighed = self.method.ratio != "none"
            if weighed and (rollout["top_p"] != 1 or rollout["temperature"] <= 0):
                raise BadInput(
                    f"{where}: top_p: expected 1 and a temperature above 0, got top_p "
                    f"{rollout['top_p']}, temperature "
                    f"{rollout['temperature']}: its log-probs are not those of the sampler; "
                    f"sample again for training"
                )
            if got.get("weights") != ours["weights"] and not args.allow_stale:
                raise BadInput(
                    f"{where}: policy.weights: expected {ours['weights']}, the weights of "
                    f"{args.model}, got {got.get('weights')}: "
                    f"{row} is on-policy; run rollout.py with this model (or --allow-stale)"
                )
            if weighed and self.temperature not in (None, rollout["temperature"]):
                raise BadInput(
                    f"{where}: temperature: expected {self.temperature} as in the lines "
                    f"before, got {rollout['temperature']}"
                )
            self.temperature = rollout["temperature"] if weighed else None
            if (
                weighed
                and (self.scores or self.reference or self.teacher)
                and self.temperature != 1
            ):
                raise BadInput(
                    f"{where}: temperature: expected 1, got {self.temperature}: scores are "
                    f"log-probs at temperature 1"
                )
        if self.prefix == "teacher":
            if got.get("weights") == ours["weights"]:
                raise BadInput(
                    f"{where}: policy.weights: expected another model's, got "
                    f"{ours['weights']}, those of {args.model}: {row} is "
                    f"off-policy, on a "
                    "teacher's answers; for the policy's own there are opd-full and dagger"
                )
            if (
                self.teacher
                and (got.get("weights") or self.teacher.identity["weights"])
                != self.teacher.identity["weights"]
            ):
                raise BadInput(
                    f"{where}: policy.weights: expected {self.teacher.identity['weights']}, "
                    f"the weights of {args.teacher}, got {got['weights']}: {row} "
                    f"wants "
                    "the teacher's own answers; for those of others there is kd"
                )
        if self.prefix == "old" and got.get("weights") == ours["weights"]:
            raise BadInput(
                f"{where}: policy.weights: expected those of an earlier state, got "
                f"{ours['weights']}, those of {args.model}: samples of the very "
                f"weights that are "
                f"trained are on-policy: --set prefix=self"
            )
        if self.prefix == "self" or self.scores or self.reference:
            check_tokens(rollout, where, ours, self.policy.vocabulary)

    def _check_score(self, score, rollout, where):
        """A teacher's score by another model than wrote a teacher's answer, or without the
        distribution a row reads, is refused."""
        scorer, sampler = score["policy"].get("weights"), rollout["policy"].get("weights")
        if self.prefix == "teacher" and None not in (scorer, sampler) and scorer != sampler:
            raise BadInput(
                f"{where}: policy.weights: expected {sampler}, the weights that wrote the "
                f"answer, got {scorer}: prefix teacher means the "
                "teacher's own answers; for those of others there is kd"
            )
        if self.method.coefficient == "unit":
            self._check_units(score, rollout, where)
        elif self.method.coefficient == "sorted":
            if "sorted" not in score:
                raise BadInput(
                    f"{where}: sorted: expected the largest log-probs of every place, but "
                    f"the field is missing: run methods.simct score with --sorted K"
                )
        elif self.method.support:
            self._check_support(score, where, "teacher")

    def _check_units(self, score, rollout, where):
        """Units of a score that do not fit the rollout's tokens, or are no units at all, are
        refused."""
        if any(
            field not in score
            for field in (
                "units",
                "unit_logprobs",
                "unit_logits",
                "unit_logz",
                "unit_topk",
                "prefixes",
            )
        ):
            raise BadInput(
                f"{where}: units: expected text units of a teacher with another vocabulary, "
                f"but the field is missing: run methods.simct score"
            )
        edges = [edge for s0, s1, _, _ in score["units"] for edge in (s0, s1)]
        if (
            edges != sorted(edges)
            or any(s0 == s1 for s0, s1, _, _ in score["units"])
            or edges
            and edges[-1] > len(rollout["response_ids"])
        ):
            raise BadInput(
                f"{where}: units: expected one after another within "
                f"{len(rollout['response_ids'])} tokens, got {score['units']}"
            )

    def _check_support(self, score, where, whose):
        """A score without a distribution, or with another number of tokens than the lines
        before, is refused."""
        if "topk" not in score:
            raise BadInput(
                f"{where}: topk: expected the {whose}'s distribution, but the field is "
                f"missing: run teacher.py score with --top-k"
            )
        got = score["topk"]["ids"]["shape"][1]
        if self.top_k.setdefault(whose, got) != got:
            raise BadInput(
                f"{where}: topk: expected {self.top_k[whose]} tokens as in the lines before, "
                f"got {got}: score the whole file with one --top-k"
            )

    def _weigh(self):
        """Group advantages and weights of all rollouts.  Groups with a failed judgement are
        dropped and counted, rollouts of weight 0 leave the data, and with them groups of which
        none is left."""
        self.advantages, self.omegas, self.dropped, self.flat, self.silent, failed, count = (
            {},
            {},
            0,
            0,
            0,
            0,
            len(self.groups),
        )
        if self.rewards is None:
            return
        for prompt, keys in list(self.groups.items()):
            rewards = [
                record_for(self.rewards, self.rollouts[key], self.rollouts)["reward"]
                for key in keys
            ]
            failed += rewards.count(None)
            advantages = losses.group_advantages(rewards, self.method.advantage)
            if advantages is None:
                self.dropped += 1
                del self.groups[prompt]
                continue
            self.flat += max(rewards) == min(rewards)
            self.advantages.update(zip(keys, zip(advantages, rewards)))
            self.omegas.update(zip(keys, losses.sequence_weights(self.method, rewards)))
            self.groups[prompt] = [key for key in keys if self.omegas[key]]
            if not self.groups[prompt]:
                self.silent += 1
                del self.groups[prompt]
        self.signals = {
            "judge/failure_rate": failed / len(self.rollouts),
            "judge/groups_dropped": self.dropped,
            "reward/zero_variance_groups": self.flat / max(1, count - self.dropped),
            "reward/groups_without_weight": self.silent,
        }
        if not self.groups:
            why = (
                "a failed judgement"
                if not self.silent
                else f"a failed judgement or weights of 0 (omega {self.method.omega})"
            )
            raise BadInput(
                f"{self.rewards.path}: every group has {why}, nothing is left to train on"
            )

    def sequences(self, keys):
        """One dict of plain lists a rollout: prompt_ids, response_ids, mask and the per-token
        numbers of the trained tokens."""
        rollouts = [self.rollouts[key] for key in keys]
        ours = self.policy.identity
        foreign = [
            i
            for i, r in enumerate(rollouts)
            if "response_ids" not in r
            or any(r["policy"].get(f) != ours[f] for f in ("vocabulary", "template"))
        ]
        for i, tokens in zip(
            foreign, self._tokenize([rollouts[i] for i in foreign], [keys[i] for i in foreign])
        ):
            rollouts[i] = rollouts[i] | tokens
        return [self._sequence(key, rollout) for key, rollout in zip(keys, rollouts)]

    def _sequence(self, key, rollout):  # noqa: C901
        mask = rollout["loss_mask"]
        item = {
            "key": key,
            "prompt_ids": rollout["prompt_ids"],
            "response_ids": rollout["response_ids"],
            "mask": mask,
            "length": sum(mask),
            "truncated": rollout["finish_reason"] == "length",
            "omega": self.omegas.get(key, 1.0),
            "own": rollout["policy"].get("weights") == self.policy.identity["weights"],
        }
        item["tokens"] = item["length"]
        if "calls" in rollout:
            item["calls"], item["limited"] = (
                [call["ok"] for call in rollout["calls"]],
                rollout["finish_reason"] == "tool_limit",
            )
        if self.method.scalar:  # one number for the whole text
            return item | {
                "length": 1,
                "judged": self.policy.sees(rollout["prompt_ids"], rollout["response_ids"]),
            }
        trained = np.flatnonzero(mask)
        if "end_mass" in rollout:
            item["student_end_mass"] = rollout["end_mass"]
        if self.prefix == "self":
            text = records.final_text(rollout)
            item["repetitive"] = (
                len(text) >= self.tail and repetition_ratio(text, self.tail) > self.threshold
            )
            item["behaviour_logp"] = np.asarray(rollout["logprobs"], np.float32)[trained]
        if self.scores is not None:
            score = record_for(self.scores, rollout, self.rollouts)
            item["teacher_logp"] = np.asarray(score["logprobs"], np.float32)[trained]
            if self.method.coefficient == "unit":
                item |= self._units(score, self.scores.where(key), mask)
            elif self.method.coefficient == "sorted":
                here, best = np.zeros(len(mask), np.float32), records.unpack(score["sorted"])
                here[: len(best)], padded = 1, np.zeros((len(mask), best.shape[1]), np.float32)
                padded[: len(best)] = best
                item["sorted_here"], item["sorted_logp"] = here[trained], padded[trained]
            elif self.method.support:
                item["support_ids"], item["support_logp"] = self._support(
                    score, self.scores.where(key), trained
                )
            if "end_mass" in score:
                item["teacher_end_mass"] = score["end_mass"]
        if self.reference is not None:
            score = record_for(self.reference, rollout, self.rollouts)
            item["reference_logp"] = np.asarray(score["logprobs"], np.float32)[trained]
            if self.method.reference_support == "full":
                item["reference_support_ids"], item["reference_support_logp"] = self._support(
                    score, self.reference.where(key), trained
                )
        if self.weights is not None:
            item["token_weight"] = np.asarray(
                record_for(self.weights, rollout, self.rollouts)["weights"], np.float32
            )[trained]
        if key in self.advantages:
            item["advantage"], item["reward"] = self.advantages[key]
        return item

    def _units(self, score, where, mask):
        """What loss.unit_divergence reads of the trained tokens; a unit with a masked token is
        left out whole."""
        ids, logps = (records.unpack(score["unit_topk"][name]) for name in ("ids", "logprobs"))
        if ids.max(initial=0) >= self.policy.vocabulary:
            raise BadInput(
                f"{where}: unit_topk: expected ids in [0, {self.policy.vocabulary}), got "
                f"{ids.max()}"
            )
        n, width = len(mask), ids.shape[1] if ids.ndim == 2 else 0
        unit, support = (
            np.zeros((n, 6), np.float32),
            {
                "support_ids": np.zeros((n, width), np.int64),
                "support_logp": np.zeros((n, width), np.float32),
                "prefix": np.zeros((n, width), np.float32),
            },
        )
        logit = self.method.span == "logit"
        for row, (s0, s1, t0, t1) in enumerate(score["units"]):
            if all(mask[s0:s1]):
                unit[s0:s1, 1] = 1
                unit[s0] = (
                    1,
                    1,
                    s1 - s0,
                    t1 - t0,
                    score["unit_logits" if logit else "unit_logprobs"][row],
                    score["unit_logz"][row] if logit else 0,
                )
                for name, values in zip(
                    support, (ids, logps, records.unpack(score["prefixes"]))
                ):
                    support[name][s0] = values[row]
        trained = np.flatnonzero(mask)
        return {"unit": unit[trained]} | {
            name: values[trained] for name, values in support.items()
        }

    def _support(self, score, where, trained):
        """(ids [T, K], log-probs [T, K]) of the trained tokens' support."""
        ids, logps = (records.unpack(score["topk"][name]) for name in ("ids", "logprobs"))
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= self.policy.vocabulary:
            raise BadInput(
                f"{where}: topk: expected ids in [0, {self.policy.vocabulary}), got "
                f"{ids.min()} to {ids.max()}"
            )
        return ids[trained], logps[trained]

    def _tokenize(self, answers, keys):
        """Text-only answers in the student's tokens; the end token is added iff the answer
        ended by itself."""
        tokenizer, out = self.policy.tokenizer, []
        responses = (
            tokenizer([a["text"] for a in answers], add_special_tokens=False)["input_ids"]
            if answers
            else []
        )
        for answer, key, response in zip(answers, keys, responses):
            if "steps" in answer:  # its text is the tools' words as well as the model's
                raise BadInput(
                    f"{self.rollouts.where(key)}: policy: expected the vocabulary and "
                    f"template of this model, got others: an episode with tools "
                    f"cannot be told in other tokens"
                )
            if "messages" in answer:
                prompt = answer
            elif self.prompts is not None and (key[0],) in self.prompts:
                prompt = self.prompts[(key[0],)]
            else:
                raise BadInput(
                    f"{self.rollouts.where(key)}: expected tokens of this model's vocabulary "
                    f"and template, or `messages`, or its "
                    "prompt through --prompts, but it has none of them"
                )
            response = response + end_of(self.policy, answer)
            out.append(
                {
                    "prompt_ids": render(tokenizer, prompt, self.policy.template_options),
                    "response_ids": response,
                    "loss_mask": [1] * len(response),
                }
            )
        self.retokenized.update(keys)
        return out


def end_of(policy, answer):
    """[the end token] for a text that ended by itself, [] for one that was cut."""
    if policy.tokenizer.eos_token_id is None:
        raise BadInput(
            f"{policy.identity['model']}: its tokenizer has no end token, so an answer that "
            f"ended cannot say so"
        )
    return [policy.tokenizer.eos_token_id] * (answer["finish_reason"] == "stop")


def answer_ids(policy, answer):
    """An answer's tokens in this model's vocabulary: its own ids where they are of that
    vocabulary, else those of its text, with an end token iff it ended by itself."""
    if (
        "response_ids" in answer
        and answer["policy"].get("vocabulary") == policy.identity["vocabulary"]
    ):
        return answer["response_ids"]
    return policy.tokenizer(answer["text"], add_special_tokens=False)["input_ids"] + end_of(
        policy, answer
    )


def taught_by(source, method, data):
    """The teachers whose answers a model was fine-tuned on, {weights: name}: those of this
    data, or what the model's folder says."""
    if method.prefix == "teacher":
        return data.writers
    kept = Path(source) / "sft_teacher.json"
    return json.loads(kept.read_text()) if kept.exists() else {}


def check_teacher(args, source, method, data):
    """A row with consistency "sft" refuses another teacher than that of the fine-tuning
    (2604.13010 section 3.4: their difference enters the bound of the gradient's error)."""
    scorers = {data.teacher.identity["weights"]: args.teacher} if data.teacher else data.scorers
    before = taught_by(source, method, data)
    if (
        method.consistency == "sft"
        and not args.allow_teacher_mismatch
        and set(before) != set(scorers)
    ):

        def named(teachers):
            return (
                ", ".join(f"{weights} ({name})" for weights, name in teachers.items())
                or "none on record"
            )

        raise BadInput(
            f"{args.scores or args.teacher}: policy.weights: expected the teacher that "
            f"{args.model} was fine-tuned on, {named(before)}, got "
            f"{named(scorers)}: "
            f"--method {args.method} wants one teacher for both; pass "
            f"--allow-teacher-mismatch if another is meant"
        )


def plan(groups, batch_size, epochs, max_steps, seed):
    """The prompts of every optimiser step: seeded order, an epoch at a time, a short last batch
    when they do not divide.

    plan(["a", "b", "c"], 2, 1, None, 0) -> [["c", "a"], ["b"]]"""
    rng, steps = np.random.default_rng(seed), []
    names = sorted(groups)
    while (max_steps is None and epochs > 0) or (
        max_steps is not None and len(steps) < max_steps
    ):
        order = [names[i] for i in rng.permutation(len(names))]
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        epochs -= 1
    return steps if max_steps is None else steps[:max_steps]
