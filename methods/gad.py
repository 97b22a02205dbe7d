"""A discriminator: a language model with one number in the place of its vocabulary, D(question,
answer).

    train.py  --method discriminator --model STUDENT --rollouts R --data ANSWERS --out D
              # a first one: the student's weights, a new head
    train.py  --method discriminator --model D --rollouts R2 --data ANSWERS --out D2
              # and so on, with every round of rollouts
    python -m methods.gad grade --discriminator D --rollouts R --answers ANSWERS --out W

It learns to score given answers (--data, a teacher's texts) above a policy's own to the same
questions; its score is then the reward of that policy, which is all that distillation from a
black box has (GAD, arXiv 2511.10643).  Folders are transformers' sequence classifiers with one
label.  The score is read at the last token that an answer really has, which the record's own
ids say; a padding id is never searched. Both sides end alike: with the end token where the
answer ended by itself, without one where it was cut.

Every answer y of a step has a number omega, what the loss wants of its score at this moment,
and the gradient is that of - sum omega D(y), in the form of all our rows.  With pairs (t, s),
every own answer s and a given one t:

    bradley-terry    mean over pairs of -log sigmoid(D(t) - D(s))          omega_t =
                     sigmoid(D(s) - D(t)) = -omega_s      (eq. 3)
    cross-entropy    mean over pairs of -log sigmoid(D(t)) - log sigmoid(-D(s))
                     (its ablation)

`view` length (a control) replaces every token of an answer but its end by one and the same, so
that its length is all that is left to judge.
"""

import math

import numpy as np
import torch
import transformers

from opd import files, rewards
from opd.batches import answer_ids
from opd.policy import (
    Policy,
    check_tokens,
    find_folder,
    hash_weights,
    hidden_at,
    identity_of,
    load_tokenizer,
    load_weights,
    token_batches,
    vocabulary_size,
)
from opd.records import BadInput

VIEWS = ("text", "length")


class Scorer(Policy):
    """A transformers sequence classifier with one label, its tokenizer and its identity; `head`
    is [1, D]."""

    def __init__(self, model, tokenizer, name, weights, template_options=None):
        self.model, self.tokenizer, self.template_options = (
            model,
            tokenizer,
            template_options or {},
        )
        self.identity = identity_of(name, weights, tokenizer, self.template_options)
        self.vocabulary = vocabulary_size(tokenizer)

    @property
    def head(self):
        return self.model.score.weight

    @property
    def view(self):
        return getattr(self.model.config, "discriminator_view", "text")

    def sees(self, prompt_ids, response_ids):
        """The sequence that is judged, at whose last token the score stands."""
        if self.view == "text":
            return prompt_ids + response_ids
        end = response_ids[-1:] if response_ids[-1:] == [self.tokenizer.eos_token_id] else []
        return (
            prompt_ids
            + [self.tokenizer.pad_token_id or 0] * (len(response_ids) - len(end))
            + end
        )

    def states(self, sequences):
        """Hidden states of the last tokens, [N, D]."""
        return hidden_at(self.model, sequences, [[len(s) - 1] for s in sequences])

    @torch.no_grad()
    def scores(self, sequences, batch_tokens=16384):
        """D of every sequence (as `sees` returns them), a list of floats."""
        out = [0.0] * len(sequences)
        for batch in token_batches([len(s) for s in sequences], batch_tokens):
            values = (
                (self.states([sequences[i] for i in batch]) @ self.head.T)[:, 0]
                .float()
                .tolist()
            )
            for i, value in zip(batch, values):
                out[i] = value
        return out


def load_scorer(
    name, dtype="auto", device=None, template_options=None, weights=None, seed=None, view=None
):
    """Loads a discriminator's folder.  With a `seed` a language model's folder will do as well:
    its head is replaced by a new one, drawn with that seed (transformers' own initialisation,
    standard deviation 0.02 in most families).

    view: what it is to see; a folder that was trained with another view is refused."""

    folder = find_folder(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    trained = any("SequenceClassification" in a for a in config.architectures or ())
    if not trained and seed is None:
        raise BadInput(
            f"--discriminator {name}: expected a sequence classifier, got "
            f"{', '.join(config.architectures or ['?'])}: train one with --method "
            f"discriminator"
        )
    level = transformers.utils.logging.get_verbosity()
    # it would warn of the new head, which is what was asked for
    transformers.utils.logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            model = load_weights(
                name,
                folder,
                "AutoModelForSequenceClassification",
                dtype,
                device,
                **({} if trained else {"num_labels": 1}),
            )
    finally:
        transformers.utils.logging.set_verbosity(level)
    if (
        type(getattr(model, "score", None)) is not torch.nn.Linear
        or model.score.out_features != 1
        or model.score.bias is not None
    ):
        raise BadInput(
            f"--model {name}: expected a classifier with one label and a plain linear "
            f"`score`, got {type(model).__name__} with {model.config.num_labels}"
        )
    if not trained:
        model.config.discriminator_view = view or "text"
    scorer = Scorer(
        model, load_tokenizer(folder), name, weights or hash_weights(folder), template_options
    )
    if view and scorer.view != view:
        raise BadInput(
            f"--model {name}: has learnt from the {scorer.view} of answers: expected {view}: "
            f"one discriminator has one view"
        )
    return scorer


def pair_weights(kind, given, own):
    """What the loss wants of the scores of one question's given and own answers: (omegas of
    given, omegas of own, the loss of every pair).

    Own answer i is paired with given answer i mod their number; omegas are those of the SUM
    over pairs: divide by the step's pairs.

    pair_weights("bradley-terry", [0.0], [0.0, 0.0]) -> ([1.0], [-0.5, -0.5], [0.693, 0.693])
    pair_weights("cross-entropy", [0.0], [0.0, 0.0]) -> ([1.0], [-0.5, -0.5], [1.386, 1.386])"""
    wanted, unwanted, losses = [0.0] * len(given), [], []
    for i, s in enumerate(own):
        t = given[i % len(given)]
        if kind == "bradley-terry":
            up = down = sigmoid(s - t)
            losses.append(softplus(s - t))
        else:
            up, down = sigmoid(-t), sigmoid(s)
            losses.append(softplus(-t) + softplus(s))
        wanted[i % len(given)] += up
        unwanted.append(-down)
    return wanted, unwanted, losses


def weigh_scores(scorer, kind, own, given, batch_tokens):
    """Gives every own and given answer of a step (data.Data.sequences) the omega that the loss
    has for it at this moment.  Returns metrics: the loss, a mean over pairs, and what
    `verdicts` says of the own answers before they are learnt from."""
    items, questions, pairs, groups = [*given, *own], {}, [], []
    for item, score in zip(
        items, scorer.scores([item["judged"] for item in items], batch_tokens)
    ):
        item["score"] = score
    for side, some in enumerate((given, own)):
        for item in some:
            questions.setdefault(item["key"][0], ([], []))[side].append(item)
    for wanted, unwanted in questions.values():
        t, s = [item["score"] for item in wanted], [item["score"] for item in unwanted]
        up, down, losses = pair_weights(kind, t, s)
        for item, omega in zip([*wanted, *unwanted], [*up, *down]):
            item["omega"] = omega / len(own)
        pairs += losses
        groups.append((t, s, [item["tokens"] for item in unwanted]))
    return {
        "train/loss": float(np.mean(pairs)),
        "given/length_mean": float(np.mean([item["tokens"] for item in given])),
        "train/sequences": len(items),
        "train/tokens": sum(item["tokens"] for item in items),
    } | {f"discriminator/{name}": value for name, value in verdicts(groups).items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def verdicts(groups):
    """How well scores tell given from own answers: {accuracy, margin, length_correlation,
    score_std}.

    groups: [(scores of given answers, scores of own ones, lengths of own ones)], one a
    question.  accuracy counts pairs, a tie as half: 0.5 is a discriminator that knows nothing;
    length_correlation is Pearson's, of score and length within questions; score_std the mean
    over questions of the spread within one.  Without given answers the first two are left
    out."""
    pairs = [t - s for given, own, _ in groups for t in given for s in own]
    out = (
        {
            "accuracy": float(np.mean([(m > 0) + 0.5 * (m == 0) for m in pairs])),
            "margin": float(np.mean(pairs)),
        }
        if pairs
        else {}
    )
    x, y = (
        np.concatenate([np.asarray(values, float) - np.mean(values) for values in column])
        for column in zip(*((own, lengths) for _, own, lengths in groups))
    )
    spread = math.sqrt((x @ x) * (y @ y))
    return out | {
        "length_correlation": float(x @ y) / spread if spread > 1e-12 else 0.0,
        "score_std": float(np.mean([np.std(own) for _, own, _ in groups])),
    }


# ---- grading


def group_sequences(scorer, rollouts, answers):
    """What the discriminator judges of one prompt: the rollouts' tokens, then those of the
    given answers."""
    prompt_ids = rollouts[0]["prompt_ids"]
    own = [scorer.sees(r["prompt_ids"], r["response_ids"]) for r in rollouts]
    return own + [scorer.sees(prompt_ids, answer_ids(scorer, a)) for a in answers]


def grade_parser():
    p = files.parser(__doc__)
    p.add_argument("--discriminator", required=True, help="folder whose score is the reward")
    p.add_argument("--rollouts", required=True, help="JSONL of rollouts to grade")
    p.add_argument(
        "--answers",
        help="JSONL of given answers to the same prompts: how often they score above a "
        "rollout is told, never paid",
    )
    p.add_argument("--out", required=True, help="JSONL of rewards to write, any number each")
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    return p


def grade(argv=None):
    args = grade_parser().parse_args(argv)
    scorer = load_scorer(args.discriminator)
    table = files.Table(args.rollouts, "rollouts")
    groups, given, seen = {}, {}, []
    for key in table.keys():
        check_tokens(table[key], table.where(key), scorer.identity, scorer.vocabulary)
        groups.setdefault(key[0], []).append(key)
    for answer in files.read(args.answers, "answers") if args.answers else ():
        given.setdefault(str(answer["id"]), []).append(answer)
    weights = scorer.identity["weights"]

    def work(missing):
        for prompt_id in dict.fromkeys(key[0] for key in missing):
            own = [table[key] for key in groups[prompt_id]]
            scores = scorer.scores(group_sequences(scorer, own, given.get(prompt_id, [])))
            lengths = [len(r["response_ids"]) for r in own]
            seen.append((scores[len(own) :], scores[: len(own)], lengths))
            yield [
                rewards.reward_record(r, rewards.Reward(score), f"discriminator {weights}")
                | {"discriminator": weights}
                for key, r, score in zip(groups[prompt_id], own, scores)
                if key in missing
            ]

    files.fill(
        args.out,
        "rewards",
        table.keys(),
        work,
        {"discriminator": weights},
        [path for path in (args.rollouts, args.answers) if path],
        args.overwrite,
    )
    summary = rewards.summarise(args.out) | (verdicts(seen) if seen else {})
    text = rewards.describe(summary)
    if "accuracy" in summary:
        text += f", {summary['accuracy']:.0%} of given answers above a rollout"
    print(f"methods.gad grade: {args.out}: {text}")
    return summary


def main(argv=None):
    return files.dispatch(__doc__, {"grade": grade}, argv)


if __name__ == "__main__":
    files.run(main)
