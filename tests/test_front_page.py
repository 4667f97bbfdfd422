"""README.md, CONTRIBUTING.md and CHANGELOG.md are short, their code runs, and their links and commands lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks():
    return re.findall(r"^```python\n(.*?)^```", text("README.md"), re.M | re.S)


def anchors(path):
    """Of the headings of a Markdown file, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_has_at_most_150_lines():
    assert text("README.md").count("\n") <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        path, _, heading = link.partition("#")
        if not path.startswith("http"):
            there = ROOT / path if path else ROOT / page
            if not there.exists() or heading and heading not in anchors(there):
                broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    rules = re.findall(r"^([a-z][\w -]*):", text("Makefile"), re.M)
    assert set(re.findall(r"(?:`|^    )make ([a-z]\w*)", text(page), re.M)) <= set(" ".join(rules).split())
    commands = {path.stem for path in (ROOT / "clp_engine" / "cli").glob("*.py")}
    assert set(re.findall(r"(?:`|^    |bin/)clp-engine ([a-z]\w*)", text(page), re.M)) <= commands


@pytest.mark.parametrize(
    "start",
    ["from clp_engine import CLPConfig, CLPTrainer", "from clp_engine import CLPConfig as", "import torch"],
)
def test_the_readmes_python_runs(start, tmp_path, monkeypatch, capsys):
    [code] = [block for block in blocks() if block.startswith(start)]
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"(max_steps\W+)\d+", r"\g<1>1", code)
    code = re.sub(r"(per_device_train_batch_size\W+)64", r"\g<1>16", code).replace("limit=64", "limit=4")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    if "policy" in names:
        assert (tmp_path / "runs" / "mine" / "report.json").is_file()
        assert (tmp_path / "runs" / "mine" / "brief" / "adapter_config.json").is_file()


def test_every_block_of_python_is_among_those():
    assert len(blocks()) == 3


def test_the_changelog_lists_the_public_names_for_extensions():
    import clp_engine

    listed = set(
        re.findall(r"`(\w+)`", text("CHANGELOG.md").partition("Public names")[2].partition("###")[0])
    )
    assert listed and listed <= set(clp_engine.__all__)


def test_pre_commit_hooks_fetch_nothing_and_run_the_tools_of_the_virtual_environment():
    content = yaml.safe_load(text(".pre-commit-config.yaml"))
    assert {repo["repo"] for repo in content["repos"]} == {"local"}
    hooks = [hook for repo in content["repos"] for hook in repo["hooks"]]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy", "lint-imports"]
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks)
