"""A prompt is read once for all its answers, which stand behind it in one row.

    prompt a b, answers c d and e:    row        a b c d e
                                      positions  0 1 2 3 2
                                      e sees     a b and itself

The states are those of one row an answer, up to rounding: attention is masked between answers
("prefix sharing").  Of n answers in a row it saves n - 1 readings of their prompt.  Every layer
must attend to all that the mask shows: models of FAMILIES do, and tests hold each.
"""

import torch

from opd.policy import (
    find_folder,
    hidden_at,
    load_config,
    response_positions,
    token_batches,
)
from opd.records import BadInput

LONGEST = 2048  # tokens of answers that share a row: the mask grows with the row's square
FAMILIES = ("gpt2", "llama", "mistral", "olmo2", "qwen2", "qwen3")


def answer_states(policy, prompts, answers, masks):
    """Hidden states [N, D] that predict the answers' tokens with mask 1, answer by answer.
    prompts, answers: a list of ids each; masks: 0 or 1 for each token of an answer."""
    texts = list(zip(prompts, answers, masks))
    if not policy.row_tokens:
        return states_of_each(policy.model, texts)
    sizes = [(len(prompt), len(answer)) for prompt, answer, _ in texts]
    rows, _, _ = rows_of(map(tuple, prompts), sizes, policy.row_tokens)
    alone = [i for row in rows for i in row if len(row) == 1]  # may be long; need no mask
    behind = [row for row in rows if len(row) > 1]
    found = []
    if alone:
        found.append(states_of_each(policy.model, [texts[i] for i in alone]))
    if behind:
        found.append(states_in_rows(policy.model, texts, behind))
    order = alone + sum(behind, [])
    parts = torch.cat(found).split([sum(masks[i]) for i in order])
    return torch.cat([part for _, part in sorted(zip(order, parts), key=lambda x: x[0])])


def states_of_each(model, texts):
    """The states of (prompt, answer, mask) triples, one row each."""
    sequences = [prompt + answer for prompt, answer, _ in texts]
    positions = [response_positions(prompt, mask) for prompt, _, mask in texts]
    return hidden_at(model, sequences, positions)


def answer_batches(policy, names, sizes, budget):
    """Indices of answers so that (rows x longest row) of a batch is at most `budget` tokens
    (token_batches).  names: of the prompts; sizes: (tokens of the prompt, of the answer)."""
    if not policy.row_tokens:
        return token_batches([sum(size) for size in sizes], budget)
    rows, widths, ordinals = rows_of(names, sizes, policy.row_tokens)
    batches = []
    # a batch has one row a prompt: `answer_states` lays the same rows again
    for ordinal in sorted(set(ordinals)):
        some = [r for r, number in enumerate(ordinals) if number == ordinal]
        for batch in token_batches([widths[r] for r in some], budget):
            batches.append([i for b in batch for i in rows[some[b]]])
    return batches


def rows_of(names, sizes, most):
    """(indices of the answers in each row, its tokens, how many rows its prompt has before it):
    answers to one prompt share a row of at most `most` tokens, with LONGEST tokens of answers;
    one answer may be longer.  names, sizes: see answer_batches."""
    rows = []
    widths = []
    ordinals = []
    last = {}  # name: its last row
    for i, (name, (prompt, answer)) in enumerate(zip(names, sizes)):
        r = last.get(name)
        width = 0 if r is None else widths[r] + answer
        if r is None or width > most or width - prompt > LONGEST:
            ordinals.append(0 if r is None else ordinals[r] + 1)
            r = last[name] = len(rows)
            rows.append([])
            widths.append(prompt)
        rows[r].append(i)
        widths[r] += answer
    return rows, widths, ordinals


def states_in_rows(model, texts, rows):
    """The states of (prompt, answer, mask) triples, row by row.  rows: lists of their indices,
    each of one prompt."""
    width = max(len(texts[row[0]][0]) + sum(len(texts[i][1]) for i in row) for row in rows)
    filled = torch.zeros(3, len(rows), width, dtype=torch.int64)
    ids, positions, owners = filled
    owners[:] = -1  # of padding; 0 of a prompt, 1, 2, ... of its answers
    wanted = []  # where the states stand
    for r, row in enumerate(rows):
        prompt = texts[row[0]][0]
        end = len(prompt)
        ids[r, :end] = torch.tensor(prompt)
        positions[r, :end] = torch.arange(end)
        owners[r, :end] = 0
        for owner, i in enumerate(row, 1):
            _, answer, mask = texts[i]
            start, end = end, end + len(answer)
            ids[r, start:end] = torch.tensor(answer)
            positions[r, start:end] = len(prompt) + torch.arange(len(answer))
            owners[r, start:end] = owner
            # the prompt's last state predicts an answer's first token
            before = [len(prompt) - 1, *range(start, end - 1)]
            wanted += [r * width + p for p, m in zip(before, mask) if m]
    weight = model.get_output_embeddings().weight
    ids, positions, owners = filled.to(weight.device)
    seen = (owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])
    seen = seen.tril()  # [rows, of a token, to a token]
    mask = torch.zeros(seen.shape, dtype=weight.dtype, device=weight.device)
    mask.masked_fill_(~seen, torch.finfo(weight.dtype).min)
    hidden = model.get_decoder()(
        input_ids=ids, position_ids=positions, attention_mask=mask[:, None], use_cache=False
    ).last_hidden_state
    wanted = torch.tensor(wanted, dtype=torch.int64, device=weight.device)
    return hidden.flatten(0, 1)[wanted].to(weight.dtype)


def obstacle(config):
    """Why answers of a model cannot stand behind one prompt, or None."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type not in FAMILIES:
        return f"a model of type {config.model_type}"
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return f"layers of {', '.join(sorted(kinds))} with a sliding window"
    return None


def shares_prompts(name):
    """Whether `share_prompts` takes the model of a folder or Hugging Face id."""
    return obstacle(load_config(name, find_folder(name))) is None


def add_share_flag(p):
    p.add_argument(
        "--share-prompts",
        action="store_true",
        help="read a prompt once for rollouts in one batch (opd/shared.py): equal up to "
        f"rounding; {', '.join(FAMILIES)} without sliding windows",
    )


def share_prompts(policy, batch_tokens):
    """Makes answers share rows of at most so many tokens; BadInput for a model of which the
    states would be others."""
    if found := obstacle(policy.model.config):
        raise BadInput(
            f"shared prompts: expected a model of {', '.join(FAMILIES)}, whose every layer "
            f"attends to all that the mask shows, got {found}: go without"
        )
    policy.row_tokens = batch_tokens
