"""The documentation builds without a warning, its links lead somewhere, its pages have what they take from the code."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import site_pages  # noqa: E402
from docstring_lists import to_markdown  # noqa: E402


class Page(HTMLParser):
    """What a page defines, links to and loads, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads, self.words = set(), [], [], []
        self._in_script = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self._in_script = tag in ("script", "style")
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.loads += [given["src"]] if tag in ("script", "img", "iframe") and given.get("src") else []
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loads.append(given["href"])

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if not self._in_script:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def plain(text: str) -> str:
    """Without what Markdown may take for its own."""
    return " ".join(re.sub(r"[`*]", "", text).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_link_leads_to_a_page_and_a_place_on_it(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if urlsplit(target).scheme:
                continue
            there = (path.parent / target).resolve() if target else path
            if not there.exists() or anchor and there.suffix == ".html" and anchor not in pages[there].ids:
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(pages):
    assert [
        load for page in pages.values() for load in page.loads if urlsplit(load).scheme not in ("", "data")
    ] == []


@pytest.mark.parametrize("package", ["clp_engine", "clp_kernels"])
def test_every_public_name_is_in_the_reference_with_its_docstring(package, site, pages):
    import importlib

    module, page = importlib.import_module(package), pages[site / "api" / f"{package}.html"]
    names = site_pages.public_names(package)
    assert {name.rsplit(".", 1)[1] for name in names} == set(module.__all__)
    for name in names:
        assert name in page.ids
        said = to_markdown((getattr(module, name.rsplit(".", 1)[1]).__doc__ or "").strip())
        assert plain(said.splitlines()[0].replace("&lt;", "<")) in plain(page.text), name


def test_every_setting_and_every_command_is_there(site, pages):
    import dataclasses

    from clp_engine.training.settings.config import CLPConfig

    settings, commands = pages[site / "settings.html"].text, pages[site / "command-line.html"].text
    assert all(f"{option.name} " in settings for option in dataclasses.fields(CLPConfig))
    for command in ("demo", "train", "evaluate", "generate", "steer", "export", "compare", "info"):
        assert f"usage: clp-engine {command}" in commands
    assert "--allow-remote" in commands and "--learning-rate" in commands


def test_measurements_and_examples_are_put_in(site, pages):
    from bench.core import schema

    for name in ("cpu_e2e", "cpu_kernels"):
        page = pages[site / "benchmarks" / f"{name}.html"]
        result = schema.load(ROOT / "bench" / "results" / f"{name}.json")
        assert all(case.title in page.text for case in result.cases)
        assert result.environment["commit"][:7] in page.text
    assert "Interleaved." in pages[site / "benchmarks" / "how.html"].text
    examples = pages[site / "examples.html"].text
    for path in (ROOT / "examples").glob("*.py"):
        assert " ".join(path.read_text().splitlines()[0].strip('"').split()) in examples


def test_no_mark_of_the_build_is_left(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<!-- (api|settings|command-line|file)|--8&lt;--|<p>:::", text), path


def test_argument_lines_become_a_list_and_prose_and_code_stay():
    docstring = """What is computed: <x>.

weight      (N, K);  bias (N,) or None
gate_index
            the row's own `<a>`
seed, rows: of everything
    random
Raises ValueError.

Prose that goes on with
seed: not an argument.

    x: code <b>"""
    assert (
        to_markdown(docstring)
        == """What is computed: &lt;x>.

- `weight`: (N, K);  bias (N,) or None
- `gate_index`: the row's own `<a>`
- `seed`, `rows`: of everything random

Raises ValueError.

Prose that goes on with
seed: not an argument.

    x: code <b>"""
    )
