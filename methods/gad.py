"""GAD (arXiv 2511.10643): distillation from a teacher that shows only texts.  A discriminator,
a language model with one number in the place of its vocabulary, D(question, answer), learns
beside the student; its score is the student's reward.

    python -m methods.gad train --model STUDENT --rollouts R --data ANSWERS --out D
    python -m methods.gad train --model D --rollouts R2 --data ANSWERS --out D2
    python -m methods.gad grade --discriminator D --rollouts R --answers ANSWERS --out W
    python train.py --method gad --model STUDENT --rollouts R --rewards W --reference S --out M

The first line makes a first discriminator: the student's weights, a new head.  It learns to
score given answers (--data, a teacher's texts) above a policy's own to the same questions.
Folders are transformers' sequence classifiers with one label.  The score is read at the last
token that an answer really has, which the record's own ids say; a padding id is never
searched.  Both sides end alike: with the end token where the answer ended by itself, without
one where it was cut.

Every answer y of a step has a number omega, minus the derivative of the loss by its score, and
the gradient is that of - sum omega D(y).  With pairs (t, s), every own answer s and a given
one t:

    bradley-terry    mean over pairs of -log sigmoid(D(t) - D(s))          omega_t =
                     sigmoid(D(s) - D(t)) = -omega_s      (eq. 3)
    cross-entropy    mean over pairs of -log sigmoid(D(t)) - log sigmoid(-D(s))  (its ablation)

--view length (a control) replaces every token of an answer but its end by one and the same, so
that its length is all that is left to judge."""

import math

import numpy as np
import torch
import transformers

from opd import cli, files, rewards
from opd.batches import Data, Inputs, answer_ids, plan
from opd.chat import check_text
from opd.loss import PPO, Method
from opd.metrics import sequence_metrics
from opd.policy import (
    Policy,
    add_place_flags,
    check_tokens,
    checkpoint_layers,
    find_folder,
    hash_weights,
    hidden_at,
    identity_of,
    load_config,
    load_tokenizer,
    load_weights,
    token_batches,
    vocabulary_size,
)
from opd.records import BadInput
from opd.tensors import StepSettings
from opd.trainer import Run, Trainer, add_trainer_flags, run_identity, trainer_settings

# the released scripts' token mean and clip; their gradient clip, 0.2, is a flag of train.py
ROWS = {
    "gad": Method(
        "self",
        **PPO,
        advantage="std",
        reference_kl=0.001,
        about="a co-trained discriminator's score as the reward: distillation from a teacher "
        "that shows only texts (arXiv 2511.10643)",
    )
}
LOSSES = ("bradley-terry", "cross-entropy")
VIEWS = ("text", "length")
# the answers of a step are read as texts, whoever wrote them
TEXTS = Method("data", "token")


class Scorer(Policy):
    """A transformers sequence classifier with one label, its tokenizer and its identity; `head`
    is [1, D]."""

    def __init__(self, model, tokenizer, name, weights, template_options=None):
        self.model = model
        self.tokenizer = tokenizer
        self.template_options = template_options or {}
        self.identity = identity_of(name, weights, tokenizer, self.template_options)
        self.vocabulary = vocabulary_size(tokenizer)
        # it does not stop itself: a turn ends as its template ends it
        self.stop_ids = tokenizer.all_special_ids

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
        same = [self.tokenizer.pad_token_id or 0]
        return prompt_ids + same * (len(response_ids) - len(end)) + end

    def values(self, sequences):
        """D of a batch of sequences, [N], differentiable."""
        hidden = hidden_at(self.model, sequences, [[len(s) - 1] for s in sequences])
        return (hidden @ self.head.T)[:, 0].float()

    @torch.no_grad()
    def scores(self, sequences, batch_tokens=16384):
        """D of every sequence (as `sees` returns them), a list of floats."""
        out = [0.0] * len(sequences)
        for batch in token_batches([len(s) for s in sequences], batch_tokens):
            values = self.values([sequences[i] for i in batch]).tolist()
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
    config = load_config(name, folder)
    trained = any("SequenceClassification" in a for a in config.architectures or ())
    if not trained and seed is None:
        raise BadInput(
            f"--discriminator {name}: expected a sequence classifier, got "
            f"{', '.join(config.architectures or ['?'])}: train one with methods.gad train"
        )
    labels = {} if trained else {"num_labels": 1}
    model = quiet_classifier(name, folder, dtype, device, seed or 0, labels)
    head = getattr(model, "score", None)
    if type(head) is not torch.nn.Linear or head.out_features != 1 or head.bias is not None:
        raise BadInput(
            f"{name}: expected a classifier with one label and a plain linear `score`, "
            f"got {type(model).__name__} with {model.config.num_labels}"
        )
    if not trained:
        model.config.discriminator_view = view or "text"
    weights = weights or hash_weights(folder)
    scorer = Scorer(model, load_tokenizer(folder), name, weights, template_options)
    if view and scorer.view != view:
        raise BadInput(
            f"{name}: has learnt from the {scorer.view} of answers: expected {view}: "
            f"one discriminator has one view"
        )
    return scorer


def quiet_classifier(name, folder, dtype, device, seed, labels):
    """transformers' classifier without its warning of a new head, which is drawn with
    `seed`."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kind = "AutoModelForSequenceClassification"
            return load_weights(name, folder, kind, dtype, device, **labels)
    finally:
        transformers.utils.logging.set_verbosity(level)


# ---- the loss


def pair_weights(kind, given, own):
    """Minus the derivatives of the loss by the scores of one question's given and own answers:
    (omegas of given, omegas of own, the loss of every pair).

    Own answer i is paired with given answer i mod their number; omegas are those of the SUM
    over pairs: divide by the step's pairs.

    pair_weights("bradley-terry", [0.0], [0.0, 0.0]) -> ([1.0], [-0.5, -0.5], [0.693, 0.693])
    pair_weights("cross-entropy", [0.0], [0.0, 0.0]) -> ([1.0], [-0.5, -0.5], [1.386, 1.386])"""
    wanted = [0.0] * len(given)
    unwanted = []
    losses = []
    for i, s in enumerate(own):
        t = given[i % len(given)]
        if kind == "bradley-terry":
            up = down = sigmoid(s - t)
            losses.append(softplus(s - t))
        else:
            up = sigmoid(-t)
            down = sigmoid(s)
            losses.append(softplus(-t) + softplus(s))
        wanted[i % len(given)] += up
        unwanted.append(-down)
    return wanted, unwanted, losses


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def verdicts(groups):
    """How well scores tell given from own answers: {accuracy, margin, length_correlation,
    score_std}.

    groups: [(scores of given answers, scores of own ones, lengths of own ones)], one a
    question. accuracy counts pairs, a tie as half: 0.5 is a discriminator that knows nothing;
    length_correlation is Pearson's, of score and length within questions; score_std the mean
    over questions of the spread within one.  Without given answers the first two are left
    out."""
    out = {}
    pairs = [t - s for given, own, _ in groups for t in given for s in own]
    if pairs:
        out["accuracy"] = float(np.mean([(m > 0) + 0.5 * (m == 0) for m in pairs]))
        out["margin"] = float(np.mean(pairs))
    x = centred([own for _, own, _ in groups])
    y = centred([lengths for _, _, lengths in groups])
    spread = math.sqrt((x @ x) * (y @ y))
    out["length_correlation"] = float(x @ y) / spread if spread > 1e-12 else 0.0
    out["score_std"] = float(np.mean([np.std(own) for _, own, _ in groups]))
    return out


def centred(groups):
    """All numbers in one array, each minus its group's mean."""
    return np.concatenate([np.asarray(values, float) - np.mean(values) for values in groups])


# ---- training


def optimise(trainer, own, given, loss, batch_tokens):
    """One optimiser step on own and given answers (Data.items); returns its metrics."""
    scorer = trainer.policy
    items = [*own, *given]
    for item in items:
        item["judged"] = scorer.sees(item["prompt_ids"], item["response_ids"])
    metrics = weigh_scores(scorer, loss, own, given, batch_tokens)
    items = [item for item in items if item["omega"]]
    for batch in token_batches([len(item["judged"]) for item in items], batch_tokens):
        some = [items[i] for i in batch]
        values = scorer.values([item["judged"] for item in some])
        omegas = np.asarray([item["omega"] for item in some]).astype(np.float32)
        (-(values @ torch.from_numpy(omegas).to(values.device))).backward()
    metrics["train/grad_norm"] = trainer.update()
    texts = sequence_metrics(own)
    texts.pop("rollout/student_end_mass", None)  # the policy's, which is not trained here
    return texts | metrics


def weigh_scores(scorer, loss, own, given, batch_tokens):
    """Gives every answer of a step its omega, from the scores of this moment.  Returns metrics:
    the loss, a mean over pairs, and the `verdicts` before the step."""
    items = [*given, *own]
    scores = scorer.scores([item["judged"] for item in items], batch_tokens)
    questions = {}
    for i, (item, score) in enumerate(zip(items, scores)):
        sides = questions.setdefault(item["key"][0], ([], []))
        sides[i >= len(given)].append((item, score))
    pairs = []
    groups = []
    for wanted, unwanted in questions.values():
        t = [score for _, score in wanted]
        s = [score for _, score in unwanted]
        up, down, losses = pair_weights(loss, t, s)
        for (item, _), omega in zip([*wanted, *unwanted], [*up, *down]):
            item["omega"] = omega / len(own)
        pairs += losses
        groups.append((t, s, [item["length"] for item, _ in unwanted]))
    return {
        "train/loss": float(np.mean(pairs)),
        "given/length_mean": float(np.mean([item["length"] for item in given])),
        "train/sequences": len(items),
        "train/tokens": sum(item["length"] for item in items),
    } | {f"discriminator/{name}": value for name, value in verdicts(groups).items()}


def train_parser():
    p = cli.parser(__doc__)
    p.add_argument("--model", required=True, help="a discriminator, or a model to make one of")
    p.add_argument("--rollouts", required=True, help="JSONL of a policy's answers")
    p.add_argument(
        "--data",
        required=True,
        help="JSONL of given answers to the same prompts, to score higher",
    )
    p.add_argument(
        "--prompts", help="JSONL of prompts, for answers that bring neither tokens nor messages"
    )
    p.add_argument("--out", required=True, help="folder for the new weights")
    p.add_argument("--loss", default="bradley-terry", choices=LOSSES, help="of a pair")
    p.add_argument(
        "--view", default="text", choices=VIEWS, help="length: it sees that alone, a control"
    )
    p.add_argument("--batch-size", type=int, default=32, help="prompts an optimiser step")
    p.add_argument("--epochs", type=int, default=1, help="walks over the rollouts")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    add_place_flags(p)
    p.add_argument(
        "--compute",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="gradient_checkpointing (0; 1: activations are computed again in the backward "
        "pass): memory and time, not result",
    )
    p.add_argument("--seed", type=int, default=0, help="order of the prompts, and a new head")
    add_trainer_flags(p)
    return p


def train(argv=None):
    args = train_parser().parse_args(argv)
    cli.check_at_least(
        1,
        batch_size=args.batch_size,
        epochs=args.epochs,
        micro_batch_tokens=args.micro_batch_tokens,
    )
    settings = StepSettings(args.micro_batch_tokens).changed(
        args.compute, "kernel", "shared_prompts"
    )
    source = find_folder(args.model)
    weights = hash_weights(source)
    inputs = [path for path in (args.rollouts, args.data, args.prompts) if path]
    # the name under which older folders know it
    flags = vars(args) | {"method": "discriminator"}
    identity = run_identity(flags, source, weights, inputs)
    with Run(args.out, identity, source, [*inputs, source], args.overwrite) as run:
        if run.finished:
            print(f"methods.gad train: {args.out}: complete already")
            return run.finished

        scorer = load_scorer(
            args.model,
            args.dtype,
            args.device,
            args.template_options,
            weights,
            args.seed,
            args.view,
        )
        if settings.gradient_checkpointing:
            checkpoint_layers(scorer.model)
        own = Data(Inputs(args.rollouts, prompts=args.prompts), TEXTS, scorer)
        given = Data(Inputs(args.data, prompts=args.prompts), TEXTS, scorer)
        own.keep_answered(given)
        steps = plan(own.groups, args.batch_size, args.epochs, None, args.seed)
        for texts in (own, given):
            texts.check_texts(steps)
        trainer = Trainer(scorer, trainer_settings(args))
        run.begin(trainer, args.fresh_optimizer)
        for index, _ in run.steps(len(steps)):
            answers = own.items(steps[index]), given.items(steps[index])
            run.log(optimise(trainer, *answers, args.loss, args.micro_batch_tokens))
        summary = run.finish({})
        print(
            f"methods.gad train: {args.out}: {len(steps)} steps, {summary['trained_tokens']} "
            f"tokens, loss {summary['loss']:.4f}"
        )
        return summary


# ---- grading


def group_sequences(scorer, rollouts, answers):
    """What the discriminator judges of one prompt: the rollouts' tokens, then those of the
    given answers."""
    prompt_ids = rollouts[0]["prompt_ids"]
    own = [scorer.sees(r["prompt_ids"], r["response_ids"]) for r in rollouts]
    return own + [scorer.sees(prompt_ids, answer_ids(scorer, a)) for a in answers]


def grade_parser():
    p = cli.parser(__doc__)
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
        check_text(scorer.tokenizer, table[key], table.where(key))
        groups.setdefault(key[0], []).append(key)
    for answer in files.read(args.answers, "answers") if args.answers else ():
        given.setdefault(str(answer["id"]), []).append(answer)
    weights = scorer.identity["weights"]

    def work(missing):
        wanted = set(missing)
        for prompt_id in dict.fromkeys(key[0] for key in missing):
            own = [table[key] for key in groups[prompt_id]]
            judged = group_sequences(scorer, own, given.get(prompt_id, []))
            scorer.check_length(max(map(len, judged)), f"{args.rollouts}: id {prompt_id!r}")
            scores = scorer.scores(judged)
            lengths = [len(r["response_ids"]) for r in own]
            seen.append((scores[len(own) :], scores[: len(own)], lengths))
            yield [
                rewards.reward_record(r, rewards.Reward(score), f"discriminator {weights}")
                | {"discriminator": weights}
                for key, r, score in zip(groups[prompt_id], own, scores)
                if key in wanted
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
    return cli.dispatch(__doc__, {"train": train, "grade": grade}, argv)


if __name__ == "__main__":
    cli.run(main)
