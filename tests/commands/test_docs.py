"""README and docs/: links lead somewhere, pages made from the code are whole, and documented
commands run.

Every block of commands is run here, on a small catalogue and with smaller models under the
documented names, unless a comment before it says why not:  <!-- needs: WHAT -->  for a cluster,
real data, time; <!-- run by: FILE -->  where another test or .ci/run does; <!-- all commands below
need: WHAT -->  for the rest of a page. `deepspeed` and `dist-vasp --ranks` are one rank here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import yaml

from docs import reference
from tests.support.browser import CHROMIUM, WHY_NOT, Browser
from tests.support.invoke import Commands
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"^(python|dist-vasp|deepspeed|torchrun|make|pip|source|sbatch|tests/|\.ci/)")
_MARK = re.compile(r"<!-- (needs|run by|all commands below need): (.+) -->")


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """(mark, commands) of every block; the mark is empty where this file has to run them.

    A command that ends in a backslash continues on the next line.
    """
    found: list[tuple[str, list[str]]] = []
    mark, rest, inside, fence = "", "", False, ""
    for line in re.sub(r" \\\n +", " ", page.read_text()).splitlines():
        marked = _MARK.fullmatch(line)
        if marked:
            mark = f"{marked[1]}: {marked[2]}"
            rest = mark if marked[1].startswith("all") else rest
            inside = False
            continue
        opened = re.fullmatch(r"```(\w*)", line)
        if opened:
            fence = "" if fence else opened[1] or "text"
            inside = False
            continue
        code = (
            line
            if fence in ("sh", "bash")
            else line[4:]
            if line.startswith("    ") and not fence
            else None
        )
        if code is None:
            if inside and line.strip():
                inside, mark = False, ""
            continue
        if _COMMAND.match(code):
            if not inside:
                found.append((mark or rest, []))
            inside = True
            found[-1][1].append(code.split("  #")[0].strip())
    return found


def test_every_command_is_run_or_says_why_not():
    kinds = set()
    for page in PAGES:
        for mark, commands in blocks(page):
            kind, _, what = mark.partition(": ")
            kinds.add(kind)
            if kind == "run by":
                text = (ROOT / what).read_text()
                for command in commands:
                    script = re.search(r"(?:launch/|^dist-vasp )(\w+)", command)
                    sign = (
                        f"launch.{script[1]}"
                        if script
                        else "make test-slow"
                        if "pytest" in command
                        else command.split("  ")[0]
                    )
                    assert sign in text, f"{what} does not run {command}"
    assert kinds == {"", "needs", "run by", "all commands below need"}
    assert sum(len(c) for page in PAGES for mark, c in blocks(page) if not mark) >= 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A project folder after the demo and a first training: interactions.csv, demo/, data/mine,
    runs/mine, model/, small configs/."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("ml-1m", "demo"):
        path = folder / "configs" / f"{name}.yaml"
        small = yaml.safe_load(path.read_text())
        small["data"] |= {"batch_size": 64, "workers": 0}
        small["model"] |= {"hidden": 8, "latent": 4, "encoder_layers": 2, "decoder_layers": 2}
        small |= {"parallel": {"lanes": 4}, "device": "cpu"}
        small["run"] |= {"max_steps": 3}
        path.write_text(yaml.safe_dump(small))
    commands = Commands(folder)
    commands.succeed(
        "python -m data_tools.synthesize demo/interactions.parquet --users 300 "
        "--items 400 --interactions 20000",
        "python -m data_tools.shard demo/interactions.parquet demo/shards "
        "--val_users 20 --test_users 40",
        "python launch/train.py --config configs/demo.yaml",
        "python launch/export.py --run demo/run --output model",
    )
    pa_csv.write_csv(
        pq.read_table(folder / "demo" / "interactions.parquet"), folder / "interactions.csv"
    )
    shutil.copytree(folder / "demo" / "shards", folder / "data" / "mine")
    shutil.copytree(folder / "demo" / "run", folder / "runs" / "mine", symlinks=True)
    return folder


_MADE = {
    "data/mine": r"(data_tools\.|dist-vasp )shard .*data/mine(?!.*--dry_run)",
    "runs/mine": r"train.* --run(\.dir)? runs/mine(?!.*--dry_run)",
    "model": r"--output model",
}


_LONG = ["catalogue.md", "layout.md"]  # their commands train


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name in _LONG else [])
        for p in PAGES
        if any(not mark for mark, _ in blocks(p))
    ],
)
def test_commands_of_a_page(page, prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "project", symlinks=True)
    lines = [line for mark, commands in blocks(page) if not mark for line in commands]
    for path, maker in _MADE.items():
        if any(re.search(maker, line) for line in lines):
            shutil.rmtree(folder / path)  # the page makes it
    commands = Commands(folder)
    for line in lines:
        if line.startswith("source "):
            continue
        typed = re.sub(r"^deepspeed (--num_\w+ \d+ )?", "python ", line)
        typed = re.sub(r"^dist-vasp (\w+)( --ranks \d+)?", r"python -m dist_vasp \1", typed)
        if re.search(r"launch/benchmark.py|dist_vasp benchmark", typed):
            typed += " --rounds 1 --steps 1 --modes weak"
        done = commands.run(typed)
        assert done.status == 0, f"{page.name}: {line}\n{done.out}{done.err}"


def test_python_of_the_pages(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "project", symlinks=True)
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "python.md"):
        scripts = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
        assert scripts, page
        commands = Commands(folder)
        done = commands.run("\n".join(scripts))
        assert done.status == 0, done.err


def _slug(title: str) -> str:
    text = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", title).lower()).strip()
    return re.sub(r"[-\s]+", "-", text)


def _anchors(page: Path) -> set[str]:
    text = page.read_text()
    if page.stem in ("configuration", "python") and page.parent.name == "docs":
        text += getattr(reference, page.stem)()
    return {
        _slug(t) for t in re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links(page):
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
    ):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path)
        assert file.is_file(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in _anchors(file), (
            f"{page.name} links to {target}; {file.name} has {sorted(_anchors(file))}"
        )


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {page.name for page in PAGES[1:]}


def test_pages_made_from_the_code():
    from dist_vasp.config.parser_errors import known_keys

    told = set(re.findall(r"^\| `([\w.]+)` \|", reference.configuration(), re.M))
    assert set(known_keys()) <= told
    assert all(
        len(row.split(" | ")) == 4 and not row.endswith("|  |")
        for row in reference.configuration().splitlines()
        if row.startswith("| `")
    )
    python = reference.python()
    assert all(
        f"### Recommender.{name}\n" in python
        for name in ("load", "export", "recommend", "similar_items", "explain", "title")
    )
    assert (
        "<!-- generated -->" in (ROOT / "docs" / "python.md").read_text()
        and "<!-- generated -->" in (ROOT / "docs" / "configuration.md").read_text()
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without a warning."""
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*build, "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_asks_for_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in [*pages, *site.rglob("*.css")]:
        text = page.read_text()
        fetched = re.findall(
            r"<(?:script|img|iframe|source)[^>]+src=[\"']?(?:https?:)?//[^>]+>|<link(?![^>]*canonical)[^>]+href=[\"']?(?:https?:)?//[^>]+>|url\([\"']?(?:https?:)?//[^)]*",
            text,
        )
        assert not fetched, f"{page.name} fetches {fetched[:3]}"
    assert "parallel.partitions" in (site / "configuration.html").read_text()


_SEARCH = """new Promise(found => {
    const field = document.querySelector("input.md-search__input");
    field.focus();
    field.value = "popularity";
    field.dispatchEvent(new Event("input", {bubbles: true}));
    field.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}));
    const links = () => [...document.querySelectorAll(".md-search-result__link")].map(a => a.href);
    const wait = left => links().length || !left ? found(links()) : setTimeout(wait, 100, left - 1);
    wait(200);
})"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_the_site_is_searched_and_read_from_disk(site):
    questions = {
        "overflow": "document.documentElement.scrollWidth - window.innerWidth",
        "wide": "[...document.querySelectorAll('.md-typeset__scrollwrap')].filter("
        "e => e.scrollWidth > e.clientWidth + 1).length",
        "broken": "[...document.images].filter(i => !i.naturalWidth).length",
    }
    with Browser() as browser:
        seen = browser.visit(site / "index.html", 1280, "light", {"found": _SEARCH}, full=False)
        assert any("closed-form.html" in link for link in seen.values["found"]), seen.values
        for page in sorted(site.glob("*.html")):
            if page.name == "404.html":  # it is made for a host: its paths begin at the root
                continue
            for width, scheme in ((1280, "light"), (390, "dark")):
                seen = browser.visit(page, width, scheme, questions, full=False)
                assert seen.complaints == [] and seen.values["broken"] == 0, page
                assert seen.values["overflow"] <= 0, (page, width)
                assert width < 1280 or seen.values["wide"] == 0, f"{page.name}: a table is cut"
