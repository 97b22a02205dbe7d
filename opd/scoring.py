"""Scores: a model's log-probs of rollouts that another model wrote, at temperature 1."""

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from opd import files, records, served
from opd.kernel import linear_logp
from opd.policy import (
    Policy,
    check_ids,
    likeliest,
)
from opd.records import BadInput
from opd.shared import answer_batches, answer_states

# ---- log-probs


@torch.no_grad()
def score_batch(policy, rollouts, top_k=0, given=None, same=()):
    """[(logprobs [T], top ids [T, K] or None, top log-probs [T, K] or None, end mass)] for a
    batch of rollouts, at temperature 1.

    given: ids [T, K] a rollout whose log-probs are wanted in place of the teacher's likeliest
    ones.  same: pairs (a, b) of ids that mean the same: the teacher's mass on a counts as b's.
    Every response token is scored, also those a loss mask hides: masks may change, scores are
    dear."""
    lengths = [len(r["response_ids"]) for r in rollouts]
    prompts, answers = ([r[f"{name}_ids"] for r in rollouts] for name in ("prompt", "response"))
    hidden = answer_states(policy, prompts, answers, [[1] * n for n in lengths])
    flat = [token for r in rollouts for token in r["response_ids"]]
    own = torch.tensor(flat, dtype=torch.int64, device=hidden.device)
    if top_k:
        top_ids = likeliest(policy, hidden, top_k)
    elif given:
        top_ids = torch.from_numpy(np.concatenate(given).astype(np.int64)).to(hidden.device)
    else:
        top_ids = own[:, None][:, :0]
    width = top_ids.shape[1]
    synonyms = own.new_tensor([[a for a, _ in same]]).expand(len(own), -1)
    wanted = torch.cat([own[:, None], top_ids, synonyms], 1)
    logps, _ = linear_logp(hidden, policy.head, wanted, **policy.head_options)
    own_logps = logps[:, 0]
    for column, (_, b) in enumerate(same, start=1 + width):
        together = torch.logaddexp(own_logps, logps[:, column])
        own_logps = torch.where(own == b, together, own_logps)
    parts = zip(
        own_logps.cpu().split(lengths),
        top_ids.cpu().split(lengths),
        logps[:, 1 : 1 + width].cpu().split(lengths),
        end_masses(policy, hidden, lengths),
    )
    if not width:
        return [(own.numpy(), None, None, end) for own, _, _, end in parts]
    return [(own.numpy(), ids.numpy(), top.numpy(), end) for own, ids, top, end in parts]


def end_masses(policy, hidden, lengths):
    """Probability of any stop token where the last token of each response stands; None for an
    empty response."""
    ends = [end - 1 for end, n in zip(np.cumsum(lengths), lengths) if n]
    last = hidden[torch.tensor(ends, dtype=torch.int64, device=hidden.device)]
    stops = torch.tensor([policy.stop_ids], dtype=torch.int64, device=hidden.device)
    logps, _ = linear_logp(
        last, policy.head, stops.expand(len(last), -1), **policy.head_options
    )
    masses = iter(logps.logsumexp(-1).exp().tolist())
    return [next(masses) if n else None for n in lengths]


def proposal_of(rollout, proposals, rollouts, vocabulary, identity):
    """The record of `proposals`, scores with --top-k, whose ids are to be scored in a rollout;
    BadInput where it has none, or ids that a model has no row for."""
    proposal = files.record_for(proposals, rollout, rollouts)
    where = proposals.where(records.key_of(rollout, "rollouts"))
    if "topk" not in proposal:
        raise BadInput(
            f"{where}: topk: expected ids to score, but the field is missing: run teacher.py "
            f"score with --top-k"
        )
    ids = records.unpack(proposal["topk"]["ids"])
    check_ids([int(ids.max(initial=0))], f"{where}: topk", vocabulary, identity)
    return proposal


def noise_floor(policy, rollouts):
    """Largest difference in nats between scoring the first rollout alone and inside a padded
    batch with the others; None without others."""
    if len(rollouts) < 2:
        return None
    alone = score_batch(policy, [rollouts[0]])[0][0]
    together = score_batch(policy, rollouts)[0][0]
    return float(np.abs(alone - together).max(initial=0.0))


def served_noise_floor(server, rollouts):
    """Largest difference in nats between two requests for the same scores: a server's replicas
    and batches differ."""
    for rollout in rollouts:
        prompt_ids = rollout["prompt_ids"]
        ids = prompt_ids + rollout["response_ids"]
        try:
            first, _, _ = server.score(ids, len(prompt_ids))
            second, _, _ = server.score(ids, len(prompt_ids))
            return float(np.abs(np.subtract(first, second)).max(initial=0.0))
        except served.ServedFailure as failure:
            last = failure
    raise BadInput(f"the self-test failed on {len(rollouts)} rollouts (last: {last})")


@dataclass
class Scorer:
    """Scores rollouts by weights that are loaded here (policy) or by a server."""

    rollouts: files.Table
    identity: dict
    policy: Policy | None = None
    server: served.Server | None = None
    prompts: dict = field(default_factory=dict)  # {prompt id: token ids}, see --prompts
    top_k: int = 0
    proposals: files.Table | None = None
    proposer: str | None = None
    same: list = field(default_factory=list)
    batch_tokens: int = 16384

    def as_read(self, key):
        """The rollout with the prompt that the teacher reads."""
        rollout = self.rollouts[key]
        if self.prompts:
            return rollout | {"prompt_ids": self.prompts[key[0]]}
        return rollout

    def sizes(self, key):
        """Tokens of the prompt and of the answer."""
        rollout = self.as_read(key)
        return len(rollout["prompt_ids"]), len(rollout["response_ids"])

    def length(self, key):
        return sum(self.sizes(key))

    def check_lengths(self):
        """Refuses rollouts beyond the positions of a model that is loaded here."""
        for key in self.rollouts.keys() if self.policy else ():
            self.policy.check_length(self.length(key), self.rollouts.where(key))

    def self_test(self):
        """The noise floor: on the shortest of the first eight rollouts, with those that fit
        into a batch beside it; None where there is nothing to compare."""
        lengths = {key: self.length(key) for key in islice(self.rollouts.keys(), 8)}
        few = []
        for key in sorted(lengths, key=lengths.get):
            if not self.rollouts[key]["response_ids"]:
                continue
            if not few or (len(few) + 1) * lengths[key] <= self.batch_tokens:
                few.append(key)
        few = [self.as_read(key) for key in few]
        if not few:
            return None
        if self.server:
            return served_noise_floor(self.server, few)
        return noise_floor(self.policy, few)

    def __call__(self, keys):
        """Yields lists of records, or the failure of a request."""
        if self.server:
            return (result for _, result in self.server.map(self.score_served, keys))
        names = [key[0] for key in keys]
        sizes = [self.sizes(key) for key in keys]
        batches = answer_batches(self.policy, names, sizes, self.batch_tokens)
        return (self.score_local([keys[i] for i in batch]) for batch in batches)

    def score_served(self, key):
        rollout = self.as_read(key)
        if not rollout["response_ids"]:
            nothing = np.zeros((0, self.top_k)) if self.top_k else None
            return self.record(key, rollout, [], nothing, nothing)
        ids = rollout["prompt_ids"] + rollout["response_ids"]
        scores = self.server.score(ids, len(rollout["prompt_ids"]), self.top_k)
        return self.record(key, rollout, *scores)

    def score_local(self, keys):
        batch = [self.as_read(key) for key in keys]
        given = None
        if self.proposals:
            given = [records.unpack(self.proposals[key]["topk"]["ids"]) for key in keys]
        scores = score_batch(self.policy, batch, self.top_k, given, self.same)
        return [self.record(key, r, *values) for key, r, values in zip(keys, batch, scores)]

    def record(self, key, read, logprobs, top_ids, top_logprobs, end_mass=None):
        rollout = self.rollouts[key]
        record = {
            "id": rollout["id"],
            "sample": rollout["sample"],
            "policy": self.identity,
            "rollout": records.fingerprint(rollout),
            "logprobs": records.floats(np.minimum(logprobs, 0)),
        }
        if end_mass is not None:
            record["end_mass"] = float(f"{end_mass:.6g}")
        if top_ids is not None:
            top_ids = np.asarray(top_ids)  # a server gives lists
            small = np.uint16 if top_ids.max(initial=0) < 65536 else np.int32
            record["topk"] = {
                "ids": records.pack(top_ids.astype(small)),
                "logprobs": records.pack(np.asarray(top_logprobs, np.float32)),
            }
        if self.proposals:
            record["topk_of"] = self.proposer
        if self.prompts:
            record["context"] = records.fingerprint(read)
        return record
