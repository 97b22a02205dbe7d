"""Model folders from strangers: their code is not run, their templates end, their weights are
those that are hashed."""

import ast
import builtins
import io
import json
import pickle
import shutil
import sys
import time

import pytest
from conftest import ROOT, argv, dump, refusal, variant

import rollout
import train
from opd import chat, policy
from opd.files import first_difference
from worlds import sums


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    toy = tmp_path_factory.mktemp("toy")
    sums.main(argv(out=toy, train_prompts=4, eval_prompts=1, clean=4, mixed=4))
    return toy / "student"


@pytest.fixture
def folder(student, tmp_path):
    return shutil.copytree(student, tmp_path / "m")


def change(path, **fields):
    """Changes fields of a JSON file; None takes one out."""
    value = json.loads(path.read_text()) if path.exists() else {}
    for name, new in fields.items():
        value.pop(name, None)
        if new is not None:
            value[name] = new
    path.write_text(json.dumps(value))


def flags(folder):
    prompts = dump(folder.parent / "p.jsonl", [{"id": "a", "messages": ASK}])
    out = folder.parent / "r.jsonl"
    return argv(model=folder, prompts=prompts, out=out, n=1, max_tokens=4)


ASK = [{"role": "user", "content": "1+2=?"}]

# ---- code


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_not_run_whatever_stands_on_standard_input(
    where, folder, tmp_path, monkeypatch, capsys
):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass C: pass\n"
    (folder / "theirs.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM")
    auto_map = dict.fromkeys(names, "theirs.C") | {"AutoTokenizer": ["theirs.C", "theirs.C"]}
    change(folder / where, auto_map=auto_map, tokenizer_class="Theirs")
    change(folder / "config.json", model_type="theirs", architectures=["C"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run it"))
    message = refusal(rollout.main, flags(folder), capsys)
    assert "could not be loaded" in message and not ran.exists()


def test_no_call_leaves_the_question_open():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[bmoew]*/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if name.endswith(".from_pretrained"):
                options = {"**" + ast.unparse(k.value) for k in call.keywords if not k.arg}
                assert options & {"**NO_CODE", "**how", "**options"}, f"{path}: {name}"


def test_pickled_weights_are_not_read(folder, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    policy.load_policy(folder)
    (folder / "model.safetensors").unlink()
    assert "pickled weights are never loaded" in refusal(rollout.main, flags(folder), capsys)
    assert not (tmp_path / "ran").exists()


# ---- templates

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}"
TEMPLATES = {
    "loops": LOOP + "{% endfor %}",
    "text": "{{ 'a' * 10**10 }}",
    "filter": "{{ 'a' | center(10**10) }}",
    "power": "{{ (messages | length + 9) ** (10**8) }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a second message": "{% if messages | length > 1 %}" + LOOP + "{% endfor %}{% endif %}x",
    "doubling": "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a "
    "%}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_does_not_end_is_refused_in_a_line(
    template, folder, monkeypatch, capsys
):
    monkeypatch.setattr(chat, "SECONDS", 1)
    monkeypatch.setattr(chat, "MEMORY", 1 << 27)
    (folder / "chat_template.jinja").write_text(template)
    change(folder / "tokenizer_config.json", chat_template=template)
    began = time.time()
    assert "chat template does not end" in refusal(rollout.main, flags(folder), capsys)
    assert time.time() - began < 20


def test_a_template_is_tried_once_and_renders_what_transformers_does(student, monkeypatch):
    tokenizer = policy.load_tokenizer(student)
    expected = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    chat.tried().clear()
    tries = []
    monkeypatch.setattr(chat, "try_out", tries.append)
    for content in ("1+2=?", "3+4=?"):
        asked = [{"role": "user", "content": content}]
        text = chat.chat_text(tokenizer, {"id": "a", "messages": asked})
        assert text == expected.replace("1+2=?", content)
    assert len(tries) == 1


# ---- weights

INDEX = "model.safetensors.index.json"


def sharded(folder, names):
    """Moves the weights into files that an index names."""
    whole = folder / "model.safetensors"
    for name in names:
        shutil.copy(whole, folder / name)
    whole.unlink()
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["../m.safetensors", "{root}/m.safetensors", "sub/a.bin", 7])
def test_an_index_names_files_of_its_own_folder_only(name, folder, tmp_path, capsys):
    shutil.copy(folder / "model.safetensors", tmp_path / "m.safetensors")
    (folder / "model.safetensors").unlink()
    name = name.format(root=tmp_path) if isinstance(name, str) else name
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    assert "names of safetensors files in this" in refusal(rollout.main, flags(folder), capsys)


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: (sharded(f, ["a.safetensors"]) / "a.safetensors").unlink(), "there is none"),
        (lambda f: (sharded(f, []) / INDEX).write_text("{"), "a JSON object"),
        (lambda f: sharded(f, []), "no weight_map"),
        (lambda f: change(f / "adapter_config.json", base_model_name_or_path="x"), "adapter"),
        (lambda f: change(f / "config.json", transformers_weights="b.safetensors"), "no such"),
        (lambda f: (f / "config.json").write_text("[]"), "could not be loaded"),
        (lambda f: change(f / "config.json", hidden_size="x"), "could not be loaded"),
        (lambda f: change(f / "config.json", model_type=None), "could not be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "could not be loaded"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_in_a_line(break_it, words, folder, capsys):
    break_it(folder)
    assert words in refusal(rollout.main, flags(folder), capsys)


def test_the_hash_is_of_the_files_that_are_loaded(student, folder):
    one = policy.hash_weights(student)
    shutil.copy(folder / "model.safetensors", folder / "stray.safetensors")
    assert policy.hash_weights(folder) == one
    sharded(folder, ["a.safetensors"])
    assert policy.hash_weights(folder) == one


# ---- config and tokenizer files


def test_a_config_is_part_of_an_identity_but_not_of_the_weights_hash(student, tmp_path):
    same = shutil.copytree(student, tmp_path / "same")
    change(same / "config.json", transformers_version="9", use_cache=False, dtype="bfloat16")
    assert policy.hash_config(same) == policy.hash_config(student)
    again = variant(student, tmp_path / "again")
    assert policy.hash_config(again) == policy.hash_config(student)
    for name, field in (
        ("config.json", {"rms_norm_eps": 0.5}),
        ("generation_config.json", {"eos_token_id": 3}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ):
        other = shutil.copytree(student, tmp_path / name)
        change(other / name, **field)
        assert policy.hash_config(other) != policy.hash_config(student), name
        assert policy.hash_weights(other) == policy.hash_weights(student)
    mine, theirs = ({"policy": {"weights": "w", "config": c}} for c in ("a", "b"))
    assert "config" in first_difference(mine, theirs)
    assert first_difference({"policy": {"weights": "w"}}, theirs) is None  # of an older version


def test_a_file_is_not_continued_nor_trained_on_under_another_config(folder, capsys):
    rollout.main(flags(folder))
    change(folder / "config.json", rms_norm_eps=0.5)
    more = [*flags(folder), "--n", "2"]
    assert "was begun with config" in refusal(rollout.main, more, capsys)
    trained = dict(method="opd-full", model=folder, rollouts=folder.parent / "r.jsonl", steps=1)
    trained |= dict(teacher=folder, out=folder.parent / "out")
    assert "policy.config: expected" in refusal(train.main, argv(**trained), capsys)
