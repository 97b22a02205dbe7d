"""A prompt is read once for all its answers, which stand behind it in one row.

    prompt a b, answers c d and e:    row        a b c d e
                                      positions  0 1 2 3 2
                                      e sees     a b and itself

The states are those of one row an answer, up to rounding: attention is masked between answers
("prefix sharing").  Of n answers to a prompt it saves n - 1 readings; every layer must attend
to all that the mask shows, which `share_prompts` tries out.
"""

import torch

from opd.policy import hidden_at, response_positions, token_batches
from opd.records import BadInput

LONGEST = 2048  # tokens of a row with more than one answer: attention grows with their square


def answer_states(policy, prompts, answers, masks):
    """Hidden states [N, D] that predict the answers' tokens with mask 1, answer by answer.
    prompts, answers: a list of ids each; masks: 0 or 1 for each token of an answer."""
    texts = list(zip(prompts, answers, masks))
    if not policy.shares_prompts:
        return states_of_each(policy.model, texts)
    sizes = [(len(prompt), len(answer)) for prompt, answer, _ in texts]
    rows, _ = rows_of(map(tuple, prompts), sizes)
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
    if not policy.shares_prompts:
        return token_batches([sum(size) for size in sizes], budget)
    rows, widths = rows_of(names, sizes)
    return [[i for r in batch for i in rows[r]] for batch in token_batches(widths, budget)]


def rows_of(names, sizes):
    """(indices of the answers in each row, its tokens): the answers to one prompt, as far as
    they have LONGEST tokens.  Arguments as of answer_batches."""
    rows = []
    widths = []
    last = {}  # name: its last row
    for i, (name, (prompt, answer)) in enumerate(zip(names, sizes)):
        r = last.get(name)
        if r is None or widths[r] + answer > LONGEST:
            r = last[name] = len(rows)
            rows.append([])
            widths.append(prompt)
        rows[r].append(i)
        widths[r] += answer
    return rows, widths


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


@torch.no_grad()
def share_prompts(policy):
    """Makes `answer_states` of a policy read a prompt once; BadInput for a model of which the
    states are others then."""
    config = policy.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = getattr(config, "sliding_window", None)
    tolerance = 1e-3 if policy.head.dtype == torch.float32 else 0.1  # of the largest state
    few = [[(7 * i + j) % policy.vocabulary for j in range(3)] for i in range(5)]
    asked = [few[0], few[0], few[1]], few[2:], [[1] * 3] * 3
    plain = answer_states(policy, *asked)
    policy.shares_prompts = True
    try:
        gap = float((answer_states(policy, *asked) - plain).abs().max() / plain.abs().max())
    except Exception as error:  # a model's own code raises what it likes
        gap = f"{type(error).__name__}: {error}"
    got = gap if isinstance(gap, str) else f"states off by {gap:.2g} of the largest"
    if kinds != {"full_attention"} or windows:
        got = f"layers of {', '.join(sorted(kinds))}" + ", a sliding window" * bool(windows)
    elif not isinstance(gap, str) and gap <= tolerance:
        return
    raise BadInput(
        f"shared prompts: expected a model whose every layer attends to all that its mask "
        f"shows, got {got}: go without"
    )
