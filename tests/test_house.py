"""The house rules that a machine can hold: imports, what loads torch, what must not stand in the
code, README and docs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from scripts import house

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distill"

# From the ground up: a module imports from lower layers, and a folder's modules from each other.
LAYERS = (
    ("__init__",),
    ("errors", "formatting", "languages", "reasoning", "secret_patterns"),
    ("records", "callables"),
    ("config",),
    ("storage",),
    ("models",),
    ("tasks",),
    ("responders",),
    ("corpus",),
    ("generation",),
    ("training",),
    ("evaluation",),
    ("economics",),
    ("report",),
    ("publishing",),
    ("pipeline",),
    ("planning",),
    ("recipe",),
    ("status", "verify", "api"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
WITHOUT_TORCH = """
errors records config.tree config.yaml_file storage.files storage.log storage.progress
storage.environment storage.run_folder models.weights models.download models.chat_template
tasks.task tasks.checkers models.registry models.loading pipeline formatting planning.machine
planning.work planning.cost planning.plan status cli corpus.corpus corpus.prompts
corpus.privacy corpus.contamination responders.terms responders.token_counts
responders.endpoint.endpoint responders.prices responders.responder generation.generate
generation.filters responders.store
""".split()
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "sacrebleu"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield each imported module's full name, and whether the import stands at the module's top."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def unit(path: Path) -> str:
    """Return the layer's name of a file: its folder in the package, or the module itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", sources("distill"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    mine = unit(path)
    if path == PACKAGE / "__init__.py":
        return  # it offers `distill.run`, and loads it only when asked
    assert mine in RANK, f"{mine} has no layer: add it to LAYERS"
    for name, _ in imports(path):
        first, *rest = name.split(".")
        if first != "distill" or not rest:
            continue
        other = rest[0] if rest[0] in RANK else "__init__"
        assert other == mine or RANK[other] < RANK[mine], f"{mine} imports {name}"


def test_accelerate_stands_where_processes_meet():
    users = {
        unit(path)
        for path in sources("distill")
        for name, _ in imports(path)
        if name.startswith("accelerate")
    }
    assert users <= {"training", "responders"}


def test_what_must_start_fast_loads_nothing_heavy():
    modules = [f"distill.{name}" for name in WITHOUT_TORCH]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = {HEAVY!r} & set(sys.modules)\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {("pickle", "load"), ("pickle", "loads"), ("yaml", "load"), ("torch", "load")}


@pytest.mark.parametrize(
    "path", sources("distill", "scripts", "eval"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_is_executed_or_unpickled(path):
    if path == PACKAGE / "tasks" / "sandbox" / "inside.py":
        return  # which lives in the sandbox, to do just that
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in CALLS, f"line {node.lineno}"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            assert (node.func.value.id, node.func.attr) not in METHODS, f"line {node.lineno}"


@pytest.mark.parametrize(
    "path", sources("distill", "scripts", "eval"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_modules_say_what_they_are(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    assert path.stem not in {"utils", "helpers", "manager", "base", "common"}


def tracked() -> list[Path]:
    """Return the files that git tracks, or all of the tree where there is no git."""
    try:
        listed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True
        )
        names = listed.stdout.splitlines() if listed.returncode == 0 else []
    except FileNotFoundError:
        names = []
    paths = [ROOT / name for name in names] or [p for p in PACKAGE.rglob("*") if p.is_file()]
    return [path for path in paths if path.is_file() and path.stat().st_size < 1_000_000]


MARKS = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b")
LOCAL = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/\w")


def test_nothing_is_unfinished_and_no_path_is_of_one_machine():
    for path in tracked():
        if path.suffix in {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".lock", ".txt"}:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                where = f"{path.relative_to(ROOT)}:{number}"
                assert not (path.suffix == ".py" and MARKS.search(line)), where
                assert path.is_relative_to(ROOT / "tests") or not LOCAL.search(line), where


def test_held_out_prompts_are_read_by_the_evaluation_only():
    allowed = {"pipeline.py", "report/report.py", "generation/filters.py"}
    for path in sources("distill", "scripts", "eval"):
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        if "heldout.jsonl" in path.read_text():
            assert name in allowed or name.startswith(("evaluation/", "plain_baseline")), name


def test_functions_are_small():
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in sources("distill", "scripts", "eval")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[len(lengths) * 9 // 10] <= 45


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [ruff, *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "distill|configs|data|docs|eval|scripts|tests"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def test_the_house_script_counts(tmp_path):
    for name in ("distill/a/one.py", "distill/b/one.py", "tests/test_one.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("class Row:\n    pass\n")
    (tmp_path / "README.md").write_text("two words")
    (tmp_path / "distill/a/two.py").write_text(
        "def _twice(x: Any): ...\n"
        "def _once(config: Config):\n    found = _twice(_twice(1))\n_once(2)\n"
    )
    figures, places = house.measure(tmp_path)
    assert list(figures.values()) == [8, 3, 4, "1 / 2 / 2", 1, 1, 1, 1, 1, 1, 2, 2]
    assert "distill/a/two.py:2: called once: _once" in places
    assert "distill/a/one.py, distill/b/one.py: type name: Row" in places


@every_page
def test_paths_in_the_docs_exist(page):
    """Hold what looks like a path of ours against the tree: `distill/storage/log.py`,
    configs/*.yaml, a map's first column."""
    for name in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]*[\w*/]", page.read_text()):
        assert list(ROOT.glob(name.rstrip("/"))), f"{page.name} names {name}"


def test_the_tests_that_the_docs_name_exist():
    files = list((ROOT / "tests").rglob("*.py"))
    names = {path.stem for path in files} | {
        name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {name for page in PAGES for name in re.findall(r"\btest_\w+", page.read_text())}
    gone = [name for name in named if not any(one.startswith(name) for one in names)]
    assert len(named) > 50 and not gone


def test_the_map_is_the_tree():
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    names = [name.removesuffix("/") for name in re.findall(r"^  (\S+)", block, re.M)]
    tree = {
        path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))
    }
    assert sorted(names) == sorted(tree - {"__init__.py", "__main__.py"})
    ranks = [RANK[name.removesuffix(".py")] for name in names]
    assert ranks == sorted(ranks, reverse=True), "a line stands above what may import it"


def test_the_docs_name_every_kind():
    """What a user may choose stands in the docs: kinds of files, checkers, losses, teachers,
    stages, exit codes."""
    from distill.config.learning import SOFT
    from distill.config.teachers import TEACHERS
    from distill.config.tree import Corpus, Filters
    from distill.corpus.readers import BINARY_SUFFIXES, SUFFIXES
    from distill.errors import Exit
    from distill.pipeline import STAGES
    from distill.tasks.checkers import KINDS

    teachers = [str(kind.model_fields["kind"].default) for kind in TEACHERS]
    outputs = [f"`{name.split('/')[0]}" for stage in STAGES for name in stage.outputs]
    for page, names in {
        "corpus.md": [
            f"`{name}`" for name in (*SUFFIXES, *BINARY_SUFFIXES, *KINDS, *Filters.model_fields)
        ],
        "../README.md": [*SUFFIXES, *BINARY_SUFFIXES],
        "soft-labels.md": [f"`{name}`" for name in ("ce", *SOFT)],
        "teachers.md": [f"`{name}`" for name in teachers],
        "formats.md": [*outputs, *(f"| {code:d} |" for code in Exit)],
    }.items():
        text = (ROOT / "docs" / page).read_text()
        lacking = [name for name in names if name not in text]
        assert not lacking, f"docs/{page} does not name {lacking}"
    described = Corpus.model_fields["path"].description or ""
    lacking = [name for name in (*SUFFIXES, *BINARY_SUFFIXES) if name[1:] not in described]
    assert not lacking, f"the description of corpus.path does not name {lacking}"


@every_page
def test_commands_in_the_docs_exist(page):
    verbs = set(re.findall(r"(?:^\s*|`)(?:\.venv/bin/)?distill ([a-z]\w*)", page.read_text(), re.M))
    from typer.main import get_command

    from distill.cli import app

    known = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert verbs <= set(known), f"{page.name} names {verbs - set(known)}"


def slug(heading: str) -> str:
    """Return the anchor that a heading gets: lower case, hyphens for spaces, no other marks."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@every_page
def test_links_in_the_docs_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


@every_page
def test_config_keys_in_the_docs_exist(page):
    """Hold what the docs write as a key of the config, such as `train.loss` or train.seed=1,
    against the config's tree."""
    from distill.config.tree import Config

    for section, rest in re.findall(
        rf"(?<![\w./])({'|'.join(Config.model_fields)})\.(\w+(?:\.\w+)*)", page.read_text()
    ):
        kind = Config.model_fields[section].annotation
        if rest.split(".")[-1] in {"json", "jsonl", "py", "md", "html", "yaml"}:
            continue
        for key in rest.split("."):
            fields = getattr(kind, "model_fields", None)
            if fields is None:  # a mapping of the user's own, such as teacher.extra_body
                break
            assert key in fields, f"{page.name} names the key {section}.{rest}"
            kind = fields[key].annotation


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_shipped_yaml_is_plain(path):
    from distill.config.yaml_file import parse_yaml, read_text

    assert parse_yaml(read_text(path), path) is not None
    yaml.safe_load(path.read_text())
