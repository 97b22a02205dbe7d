"""The rules of the house: what may import what, who reads the command line, which words the
core knows, and that every command explains itself."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ["rollout", "teacher", "rubric", "train", "eval"]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("", "opd/", "methods/", "worlds/", "experiments/")
    for path in sorted(ROOT.glob(f"{folder}**/*.py" if folder else "*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
OPTIONAL = (
    "openai",
    "matplotlib",
    "triton",
    "opd.kernel_triton",
    "math_verify",
    "reasoning_gym",
)


def functions(module):
    return [n for n in ast.walk(TREES[module]) if isinstance(n, ast.FunctionDef)]


def imported(tree):
    """Full names of what a tree imports, at any depth:  from opd import files -> opd.files"""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    return names


def own_imports(module):
    """Modules of this repository that a module imports."""
    return {name for name in imported(TREES[module]) if name in MODULES}


def layer(module):
    return "stage" if module in STAGES else module.partition(".")[0]


# ---- imports

MAY_IMPORT = {
    "opd": {"opd"},
    "methods": {"opd", "methods"},
    "worlds": {"opd", "worlds"},
    "stage": {"opd", "methods", "worlds"},
    "experiments": {"opd", "methods", "worlds", "stage", "experiments"},
}


def system(module):
    """The method that a module belongs to."""
    return module.split(".")[1] if module.count(".") else module


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    broken = {m for m in own_imports(module) if layer(m) not in MAY_IMPORT[layer(module)]}
    # methods/rows.py collects the systems, which never import each other
    if layer(module) == "methods" and module not in ("methods.rows", "methods.__main__"):
        broken |= {
            m
            for m in own_imports(module)
            if layer(m) == "methods" and system(m) != system(module)
        }
    assert not broken


def test_no_module_imports_itself_over_others():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(own_imports(module) - {module, *OPTIONAL}):
                visit(other, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top_but_for_optional_packages(module):
    inside = {name for f in functions(module) for name in imported(f)}
    broken = {
        n for n in inside if not n.startswith(OPTIONAL) and f"{n}.kernel_triton" not in inside
    }
    assert not broken


# ---- the command line

FLAG_HELPERS = re.compile(
    r"main|add_\w*flags|\w*from_flags|check_flags|failure_limit|trainer_settings|input_files"
)


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) != "experiments"])
def test_only_main_and_helpers_of_flags_know_the_namespace(module):
    broken = [
        f.name
        for f in functions(module)
        if "args" in [a.arg for a in f.args.args + f.args.kwonlyargs]
        and not FLAG_HELPERS.fullmatch(f.name)
    ]
    assert not broken


def flags_and_reads(tree):
    """({destinations of add_argument, settings of a study}, {attributes read of args or
    settings})."""
    flags, reads = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            name = getattr(node.args[0], "value", None)
            keywords = {k.arg: k.value for k in node.keywords}
            if "dest" in keywords:
                name = keywords["dest"].value
            if name:
                flags.add(name.lstrip("-").replace("-", "_"))
        # a study's settings are fields: `rounds: int = setting(20, ...)`
        if isinstance(node, ast.AnnAssign) and "= setting(" in ast.unparse(node):
            flags.add(node.target.id)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value).split(".")[-1] in ("args", "s", "settings"):
                reads.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            reads |= {str(c.value) for c in ast.walk(node) if isinstance(c, ast.Constant)}
    return flags, reads


def unread(module):
    """Flags that neither a module nor one that it imports or is imported by reads."""
    flags, reads = flags_and_reads(TREES[module])
    near = own_imports(module) | {m for m in MODULES if module in own_imports(m)}
    for other in near:
        reads |= flags_and_reads(TREES[other])[1]
    # getattr(settings, f"{kind}_learning_rate") reads all of that kind
    ends = tuple(r for r in reads if r[:1] == "_")
    return {f for f in flags - reads - {"command"} if not (ends and f.endswith(ends))}


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_is_read(module):
    assert not unread(module)


def test_the_check_notices_a_dead_flag():
    tree = ast.parse('p.add_argument("--used")\np.add_argument("--dead-flag")\nargs.used\n')
    flags, reads = flags_and_reads(tree)
    assert flags - reads == {"dead_flag"}


def help_of(command, capsys):
    """What `python -m command --help` shows."""
    module, *words = command.split()
    main = importlib.import_module(module)
    if not hasattr(main, "main"):
        main = importlib.import_module(f"{module}.__main__")
    with pytest.raises(SystemExit) as stop:
        main.main([*words, "--help"])
    assert stop.value.code == 0
    return main.main, words, capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "worlds.sums",
        "worlds.forks",
        "worlds.agents",
        "rollout",
        "teacher answer",
        "teacher score",
        "rubric create",
        "rubric grade",
        "train",
        "eval",
        "opd.files check",
        "methods.prefix weigh",
        "methods.sod weigh",
        "methods.simct score",
        "methods.simct align",
        "methods.unified support",
        "experiments.controls shuffle-scores",
        "experiments.prefix_null",
        "experiments.sod_controls",
        "experiments.sod_drift",
        "experiments.simct_regroup",
        "experiments.report gaps",
        "experiments.real_tasks make",
        "experiments.real_tasks pilot",
        "experiments.ropd",
        "experiments.opd",
        "experiments.unified",
        "experiments.lightning",
        "experiments.prefix",
        "experiments.stable",
        "experiments.sod",
        "experiments.opsd",
    ],
)
def test_help_opens_with_a_runnable_example_and_unknown_flags_fail(command, capsys):
    main, words, shown = help_of(command, capsys)
    module = command.split()[0]
    program = f"{module}.py" if module in STAGES else f"-m {module}"
    assert re.search(rf"^    python {re.escape(program)} ", shown, re.M)
    for wrong in ("--no-such-flag", "--ou"):  # unknown, and an abbreviation of --out
        with pytest.raises(SystemExit) as stop:
            main([*words, wrong, "x"])
        assert stop.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.parametrize("stage, most", [("train", 30), ("rollout", 22)])
def test_a_stage_has_few_flags(stage, most, capsys):
    _, _, shown = help_of(stage, capsys)
    flags = re.findall(r"^  (--[a-z-]+)", shown, re.M)
    assert len(flags) <= most


# ---- the pages

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_on(page):
    """Yields the words after `python` of every command in a page's shell blocks, the page's
    shell variables filled in."""
    variables = {}
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line)
            if given := re.match(r'(\w+)="(.*?)"', line):
                variables[given[1]] = given[2]
            elif found := re.search(r"\bpython (?:-m )?([a-z_]\w*[\w. ].*)", line):
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_on_a_page_use_flags_that_exist(page, capsys):
    for module, *words in commands_on(page):
        module = module.removesuffix(".py")
        if module == "pytest" or module.startswith("bench.") or module.endswith(".NAME"):
            continue
        verb = [w for w in words[:1] if re.fullmatch("[a-z][a-z-]*", w)]
        shown = help_of(" ".join([module, *verb]), capsys)[2]
        if module in ("eval", "experiments.real_tasks"):  # they hand flags on to the sampler
            shown += help_of("rollout", capsys)[2]
        known = re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]*)", shown, re.M)
        used = {w.split("=")[0] for w in words if w.startswith("--")}
        assert used <= {*known}, module


# ---- words

SYSTEMS = re.compile(
    r"\b(gad|discriminators?|stable.?opd|simct|uld|sod|lightning|sparse.to.dense|"
    r"unified|ledger)\b",
    re.I,
)
FIELDS = {"opd.records": {"discriminator"}}  # fields of records that files hold


@pytest.mark.parametrize("module", [m for m in MODULES if layer(m) in ("opd", "stage")])
def test_the_core_names_no_system_but_ropd(module):
    found = {m[0].lower() for m in SYSTEMS.finditer(MODULES[module].read_text())}
    assert not found - FIELDS.get(module, set())
