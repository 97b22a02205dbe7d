"""Chat templates, thoughts and prompt files as users have them."""

import gzip
import re
import types

import pytest
from conftest import argv, dump, load, refusal, variant

import rollout
import rubric
import teacher
from opd import chat, files, records, sampling
from opd.batches import Solutions
from opd.policy import identity_of, load_policy, same_template
from opd.records import BadInput
from opd.rewards import Reward, paid
from worlds.build import SYMBOLS, build_tokenizer

LETTERS = "".join(sorted({*"abcdefghijklmnopqrstuvwxyz<>/|_[]THINKT .?!{}\\"} - set(SYMBOLS)))
MARKS = ("[THINK]", "[/THINK]", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPEN = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# as Qwen 3: an assistant's turn without a thought shows an empty one
EMPTY = CHATML.replace(
    "'\n' + m['content']",
    "'\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']",
)
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
SPACED = CHATML.replace("'\n' + m['content']", "'\n ' + m['content']")


def tokenizer_of(template=CHATML, end="<|im_end|>"):
    """One token a character, and one a mark; <think> is spelled in characters."""
    return build_tokenizer(SYMBOLS + LETTERS, (), MARKS, end, template)


def policy_of(template=CHATML, end="<|im_end|>", stops=("<|im_end|>",), **options):
    tokenizer = tokenizer_of(template, end)
    stop_ids = [tokenizer.get_vocab()[name] for name in stops]
    return types.SimpleNamespace(
        tokenizer=tokenizer,
        template_options=options,
        stop_ids=stop_ids,
        identity={"model": "m"},
    )


def asked(*said, **fields):
    messages = [{"role": "user", "content": "2+2?"}]
    messages += [{"role": "assistant", "content": text} for text in said]
    return {"id": "a", "messages": messages} | fields


SHOWN = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
THINKS = "<think>hm</think>4"


# ---- given answers


@pytest.mark.parametrize(
    "template, said, text, prompt, response",
    [
        (CHATML, (), "4", SHOWN, "4<|im_end|>"),
        (CHATML, (), THINKS, SHOWN, THINKS + "<|im_end|>"),
        (TRIMS, (), " 4 ", SHOWN, " 4 <|im_end|>"),
        (SPACED, (), "4", SHOWN.replace("2+", " 2+"), " 4<|im_end|>"),
        (EMPTY, (), "4", SHOWN, "<think>\n\n</think>\n\n4<|im_end|>"),
        (EMPTY, (), THINKS, SHOWN, THINKS + "<|im_end|>"),
        (OPEN, (), "4", SHOWN + "<think>\n", "\n</think>\n\n4<|im_end|>"),
        (OPEN, (), THINKS, SHOWN + "<think>\n", "hm</think>4<|im_end|>"),
        (OPEN, (), "hm</think>4", SHOWN + "<think>\n", "hm</think>4<|im_end|>"),
        (CHATML, ("It is ",), "4", SHOWN + "It is ", "4<|im_end|>"),
        (CHATML, (), "[THINK]hm[/THINK]4", SHOWN, "[THINK]hm[/THINK]4<|im_end|>"),
    ],
)
def test_a_given_answer_stands_as_the_template_places_a_turn(
    template, said, text, prompt, response
):
    policy = policy_of(template)
    answer = {"text": text, "finish_reason": "stop"}
    prompt_ids, ids = chat.turn_ids(policy, asked(*said), answer)
    assert policy.tokenizer.decode(prompt_ids) == prompt
    assert policy.tokenizer.decode(ids) == response
    _, cut = chat.turn_ids(policy, asked(*said), answer | {"finish_reason": "length"})
    assert cut == ids[:-1]


def test_an_answer_ends_at_the_first_token_of_its_turn_at_which_the_model_stops():
    for end, stops, wanted in (
        ("<|end|>", ("<|end|>", "<|im_end|>"), "<|im_end|>"),
        ("<|end|>", ("<|end|>",), "<|end|>"),
        ("<|im_end|>", ("<|im_end|>",), "<|im_end|>"),
    ):
        policy = policy_of(end=end, stops=stops)
        _, ids = chat.turn_ids(policy, asked(), {"text": "4", "finish_reason": "stop"})
        assert policy.tokenizer.decode(ids) == "4" + wanted
        plain = {"id": "a", "prompt": "2+2?"}
        _, ids = chat.turn_ids(policy, plain, {"text": "4", "finish_reason": "stop"})
        assert policy.tokenizer.decode(ids) == "4" + end


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_start|>", "<|user|>"])
def test_a_special_tokens_name_in_a_given_text_is_text(name):
    policy = policy_of()
    text = f"{name}a{name}"
    _, ids = chat.turn_ids(policy, asked(), {"text": text, "finish_reason": "stop"})
    assert policy.tokenizer.decode(ids) == text + "<|im_end|>"
    assert not {*ids[:-1]} & {*policy.tokenizer.all_special_ids}


def test_a_template_without_a_place_for_an_answer_is_refused_by_name():
    deaf = "{{ messages[0]['content'] }}"
    strict = "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}2"
    for template in (deaf, strict):
        with pytest.raises(BadInput, match="prompt 'a': "):
            answer = {"text": "4", "finish_reason": "stop"}
            chat.turn_ids(policy_of(template), asked(), answer)


def test_solutions_of_text_prompts_need_no_other_file(tmp_path):
    path = dump(tmp_path / "p.jsonl", [{"id": "a", "prompt": "2+2", "solution": "4"}])
    assert Solutions(path, "prompts")["a",]["prompt"] == "2+2"


# ---- thoughts


@pytest.mark.parametrize(
    "prompt, response, text, final",
    [
        (SHOWN, "4", "4", "4"),
        (SHOWN, "[THINK]a[/THINK]4<|im_end|>", "a4", "4"),
        (SHOWN, "[THINK]4", "4", ""),
        (SHOWN, "[THINK]a[/THINK]<|im_end|>", "a", ""),
        (SHOWN, "<think>a</think>\n4", "<think>a</think>\n4", "4"),
        (SHOWN, "<think>a", "<think>a", ""),
        (SHOWN + "<think>\n", "a", "a", ""),
        (SHOWN + "<think>\n", "a</think>4", "a</think>4", "4"),
        (SHOWN + "[THINK]", "a[/THINK]4", "a4", "4"),
        (SHOWN + "<think>\n\n</think>\n\n", "4", "4", "4"),
        ("what is <think>?" + SHOWN, "4", "4", "4"),
    ],
)
def test_what_is_thought_is_decided_from_ids_and_recorded(prompt, response, text, final):
    tokenizer = tokenizer_of()
    prompt_ids, ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, response)
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert chat.final_text(tokenizer, prompt_ids, ids) == final
    fields = {"prompt_ids": prompt_ids, "text": text, "final": final, "logprobs": []}
    fields |= {"response_ids": ids, "finish_reason": "stop", "loss_mask": []}
    record = sampling.rollout_record({"id": 1}, 0, {}, {}, fields)
    assert ("final" in record) == (final != text) and records.final_text(record) == final


@pytest.mark.parametrize(
    "text, seen",
    [
        ("7+5 #12 ", "7+5 #12 "),
        ("<think>7+5</think> #12 ", "#12"),
        ("<think>7+5</think> \n", ""),
        ("<think>7+5", ""),
        ("a</think>b</think>c", "c"),
        ("a<seed:think>b", "a"),
        ("<reasoning>a</reasoning>b", "b"),
        ("<|channel|>analysis<|message|>a assistant<|channel|>final<|message|>b", "b"),
    ],
)
def test_the_thoughts_of_foreign_texts_are_told_by_their_marks(text, seen):
    assert records.final_text({"text": text}) == seen


def test_graders_read_the_final_text(world, tmp_path):
    prompt = load(world.prompts)[0]
    row = load(world.rollouts)[0] | {"text": f"#{prompt['answer']}"}
    for final, reward in ((None, 1), ("", 0), ("#999999", 0)):
        rows = [row | ({} if final is None else {"final": final})]
        flags = dict(grader="answer", prompts=world.prompts, out=tmp_path / f"{final}.jsonl")
        rubric.main(argv("grade", rollouts=dump(tmp_path / "r.jsonl", rows), **flags))
        assert load(flags["out"])[0]["reward"] == reward
    (short,) = rubric.by_prompt(tmp_path / "r.jsonl", "rollouts").values()
    assert rubric.texts(short) == ["#999999"]
    for final, value in (("", 0.0), ("#9", 0.9), (None, 0.9)):  # of a judge that likes all
        answer = row if final is None else row | {"final": final}
        assert paid(answer, Reward(0.9)).value == value


# ---- prompts


def test_a_text_prompt_has_one_beginning_and_no_end():
    def tokenizer(text, add_special_tokens=True):
        ids = [1 if c == "^" else 2 if c == "$" else ord(c) for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    fake = types.SimpleNamespace(bos_token_id=1, eos_token_id=2, eos_token="$")
    fake = type("Fake", (), vars(fake) | {"__call__": lambda _, text: tokenizer(text)})()
    for text, ids in (("a", [1, 97]), ("^a", [1, 97]), ("", [1])):
        assert chat.text_prompt_ids(fake, text) == ids, text


USER = {"role": "user", "content": "2+2"}
GOLDEN = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "2+2"}, "id: expected .*missing"),
        ({"qid": 1, "prompt": "2+2"}, "id: .*rename `qid` to `id`"),
        (
            {"id": 1.0, "prompt": "2+2"},
            "id: expected a non-empty string or an integer, got 1.0",
        ),
        ({"id": 1, "question": "2+2"}, "got none: rename `question` to `prompt`"),
        ({"id": 1, "text": "2+2"}, "rename `text` to `prompt`"),
        ({"id": 1, "conversations": [USER]}, "rename `conversations` to `messages`"),
        ({"id": 1, "prompt": "2", "messages": [USER]}, "exactly one of .*got both"),
        ({"id": 1, "prompt": [USER]}, "prompt: .*a list of messages is called `messages`"),
        (
            {"id": 1, "messages": [{"from": "human", "value": "2"}]},
            r"\[0\].role: .*rename `from`",
        ),
        ({"id": 1, "messages": [USER | {"role": "human"}]}, 'got "human": write "user"'),
        ({"id": 1, "messages": [USER, USER | {"role": "bot"}]}, r"\[1\].*write "),
        ({"id": 1, "messages": [USER | {"role": "USR"}]}, "role: expected system, .*tool, got"),
        (
            {"id": 1, "messages": [USER | {"content": [{"type": "text"}]}]},
            '"content": a string',
        ),
        ({"id": 1, "messages": []}, "a non-empty list"),
        ({"id": 1, "prompt": "2+2", "solution": None}, "solution: .*null: leave the field out"),
        ({"id": 1, "messages": [USER, GOLDEN]}, "continue_final_message.*`solution`"),
        ({"id": 1, "messages": [USER], "continue_final_message": True}, "the assistant's"),
        ({"id": 1, "messages": [USER, GOLDEN], "continue_final_message": 1}, "true or false"),
    ],
)
def test_prompts_in_foreign_form_are_refused_with_what_to_write(row, words, tmp_path, capsys):
    path = dump(tmp_path / "p.jsonl", [row])
    message = refusal(files.main, ["check", str(path), "--kind", "prompts"], capsys)
    assert re.search(words, message), message


def test_prompts_that_mean_something_are_read(tmp_path):
    rows = [
        {"id": 1, "messages": [USER], "text": "a source", "step": 3, "reward": 1},
        {"id": 2, "prompt": "2+2", "solution": "4", "criteria": None},
        {"id": 3, "messages": [USER, GOLDEN], "continue_final_message": True},
        {"id": 4, "messages": [USER | {"role": "developer"}, GOLDEN, USER | {"role": "tool"}]},
    ]
    for row in rows:
        path = dump(tmp_path / "p.jsonl", [row])
        assert (
            files.guess_kind(path) == "prompts" and len(list(files.read(path, "prompts"))) == 1
        )


ROW = b'{"id": 1, "prompt": "2+2"}\r\n'


@pytest.mark.parametrize(
    "content, word",
    [
        (b"\xef\xbb\xbf" + ROW, None),
        (ROW.decode().encode("utf-16"), "UTF-16"),
        (gzip.compress(ROW, mtime=0), "gzip"),
        (b"[" + ROW.strip() + b"]", "a JSON object, got \\["),
        (b"[\n" + ROW + b"]\n", "JSON array"),
        (b'{\n "id": 1,\n "prompt": "2+2"\n}\n', "over several lines"),
        (b'id,prompt\n1,"2+2"\n', "a table"),
        (b"PAR1\x15\x04", "parquet"),
        (b'{"id": 1, "pro', "torn"),
    ],
)
def test_other_kinds_of_files_are_named(content, word, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    if word is None:
        assert len(list(files.read(path, "prompts"))) == 1
    else:
        message = refusal(files.main, ["check", str(path)], capsys)
        assert re.search(word, message), message
        assert word == "torn" or "torn" not in message


def test_a_file_completed_later_keeps_the_prompts_it_began_with(world, tmp_path, monkeypatch):
    prompts = dump(tmp_path / "p.jsonl", load(world.prompts)[:2])
    flags = dict(model=world.base, prompts=prompts, max_tokens=3, out=tmp_path / "r.jsonl")
    rollout.main(argv(n=1, **flags))
    rendered = sampling.render
    monkeypatch.setattr(sampling, "render", lambda *a: [*rendered(*a), 5])
    rollout.main(argv(n=3, **flags))
    rows = load(flags["out"])
    assert len(rows) == 6 and len({(r["id"], *r["prompt_ids"]) for r in rows}) == 2


# ---- what a template is


def test_templates_are_the_same_that_render_the_same(world, tmp_path, capsys):
    def changed(more):
        def change(tokenizer):
            tokenizer.chat_template += more

        return change

    same = variant(
        world.base, tmp_path / "s", changed("{% if tools %}{{ 'tools' }}{% endif %}")
    )
    other = variant(world.base, tmp_path / "o", changed("{{ '1' }}"))
    flags = dict(rollouts=world.rollouts, out=tmp_path / "s.jsonl")
    teacher.main(argv("score", model=same, **flags))
    message = refusal(teacher.main, argv("score", model=other, **flags | {"out": "x"}), capsys)
    assert "policy.template" in message
    # with tools they differ, and old files say nothing of what was rendered
    policy = load(world.rollouts)[0]["policy"]
    ours = load_policy(same).identity
    assert same_template(policy, ours) and not same_template(policy, ours, tools=True)
    assert not same_template({k: v for k, v in policy.items() if k != "renders"}, ours)


def test_a_tokenizer_with_several_templates_is_one_identity(tmp_path):
    tokenizer = tokenizer_of({"default": CHATML, "tool_use": CHATML + "{# tools #}"})
    before = identity_of("m", "w", tokenizer, {})
    tokenizer.save_pretrained(tmp_path)
    after = identity_of("m", "w", type(tokenizer).from_pretrained(tmp_path), {})
    assert before == after


def test_a_token_without_a_row_is_refused_only_where_it_occurs(world, tmp_path, capsys):
    def more(tokenizer):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})

    folder = variant(world.base, tmp_path / "m", more)
    ok = load(world.prompts)[:2]
    flags = dict(model=folder, n=1, max_tokens=3, out=tmp_path / "r.jsonl")
    rollout.main(argv(prompts=dump(tmp_path / "p.jsonl", ok), **flags))
    teacher.main(argv("score", model=folder, rollouts=flags["out"], out=tmp_path / "s.jsonl"))
    bad = [ok[0], {"id": "odd", "messages": [{"role": "user", "content": "<image>"}]}]
    flags |= dict(prompts=dump(tmp_path / "q.jsonl", bad), out=tmp_path / "q.out")
    assert "'odd': expected token ids below" in refusal(rollout.main, argv(**flags), capsys)
    rows = load(tmp_path / "r.jsonl")
    rows[0]["prompt_ids"].append(load_policy(folder).vocabulary)
    flags = dict(model=folder, rollouts=dump(tmp_path / "r2.jsonl", rows), out="x")
    assert "token ids below" in refusal(teacher.main, argv("score", **flags), capsys)
