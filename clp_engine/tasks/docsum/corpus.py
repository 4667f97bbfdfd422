"""(document, summary) pairs from the documentation strings of an ordinary Python installation.

A docstring is read as

    summary    its first paragraph, on one line, markup removed
    document   everything after it, without doctests, code, tables, formulas and "See Also" lists

and becomes a pair if both are prose and the document says something about what the summary says (`_is_pair`).
Sources are parsed with `ast`; no module is imported.

Splits. Two summaries that differ in case, digits, punctuation or identifiers only ("Base class for Foo",
"Base class for Bar2") have the same `group_key`; of a group one pair is kept, and the split is a hash of the
group key:

    u = sha256(group_key) / 2^256;    test if u < 0.05, validation if u < 0.10, train otherwise

so a pair keeps its split whatever else is installed. Train pairs that share more than a third of their
eight-word shingles with a held-out pair are dropped (`_Overlap`), so neither the same nor nearly the same
text lies in two splits.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# (import name, distribution name). Those that are not installed are left out.
PACKAGES = (
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("tokenizers", "tokenizers"),
    ("safetensors", "safetensors"),
    ("huggingface_hub", "huggingface_hub"),
    ("accelerate", "accelerate"),
    ("peft", "peft"),
    ("triton", "triton"),
    ("numpy", "numpy"),
    ("sympy", "sympy"),
    ("networkx", "networkx"),
    ("matplotlib", "matplotlib"),
    ("jinja2", "Jinja2"),
    ("fsspec", "fsspec"),
    ("pybind11", "pybind11"),
    ("_pytest", "pytest"),
    ("hypothesis", "hypothesis"),
    ("rich", "rich"),
    ("pydantic", "pydantic"),
    ("setuptools", "setuptools"),
    ("packaging", "packaging"),
    ("psutil", "psutil"),
    ("tqdm", "tqdm"),
)
# Tests carry no documentation, vendored copies repeat what is elsewhere.
SKIPPED_FOLDERS = frozenset(
    "test tests testing _vendor _vendored vendored site-packages idlelib lib2to3 turtledemo".split()
)
# Model definitions of transformers: one generated text per architecture, many times over.
SKIPPED_FILES = re.compile(r"(test_|modeling_|modular_|configuration_).*\.py")
# Functions that attach a docstring to a compiled function: the text is their last string argument.
DOC_SETTERS = frozenset(["add_docstr", "add_newdoc"])

SPLITS = ("train", "validation", "test")
SUMMARY_WORDS = (4, 30)
DOCUMENT_WORDS = (15, 2000)
SHINGLE = 8
MAX_OVERLAP = 1 / 3

STOPWORDS = frozenset(
    """a about above after all also an and any are as at be because been before being between both but by can
    could did do does doing done each either else etc for from had has have having he her here how i if in
    into is it its itself just may might more most much must no nor not of off on once one only onto or other
    our out over own per same shall she should so some such than that the their them then there these they
    this those through thus to too two under until up upon us used using use uses very via was we were what
    when where whether which while who whose why will with within without would yet you your""".split()
)

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+")


def words(text: str) -> list[str]:
    """Lower-cased runs of letters (with an apostrophe inside) or of digits; `_` and `.` separate words."""
    return _WORD.findall(text.lower())


def content_words(text: str) -> list[str]:
    """`words` that are not stop words, not numbers and longer than one letter."""
    return [w for w in words(text) if len(w) > 1 and w not in STOPWORDS and not w[0].isdigit()]


@dataclass(frozen=True)
class Docstring:
    """One parsed docstring; `summary` or `document` may be empty."""

    name: str  # dotted: module, class, function
    summary: str
    document: str  # one paragraph a line


@dataclass(frozen=True)
class Pair:
    name: str
    document: str
    reference: str
    split: str


# --- cleaning -----------------------------------------------------------------------------------------------

_INLINE = (
    (re.compile(r":math:`[^`]*`|\$[^$\n]{1,200}\$|\\\\?\([^)\n]*\\\\?\)"), " "),
    (re.compile(r":[a-zA-Z:]+:`~?\.?([^`<]*?)\s*(?:<[^`]*>)?`"), r"\1"),  # :func:`~torch.abs`
    (re.compile(r"\[(?:`+)?([^\]`\n]+?)(?:`+)?\]\([^)\s]*\)"), r"\1"),  # [text](address)
    (re.compile(r"\[`+~?([^`\]]+)`+\]"), r"\1"),  # [`Name`]
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <address>`_
    (re.compile(r"`+~?([^`]*)`+_{0,2}"), r"\1"),
    (re.compile(r"\[[\w#*, .+-]{1,20}\]_"), " "),  # [1]_
    (re.compile(r"<?https?://[^\s>)\]]+>?"), " "),
    (re.compile(r"(?<![\w*])\*{1,2}([^\s*][^*\n]*?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"</?[a-zA-Z][^<>\n]{0,40}>"), " "),
    (re.compile(r"\|(\w[\w. ]*)\|"), r"\1"),
    (re.compile(r"\{\w*\}"), " "),
    (re.compile(r"[*#~^=\-]{3,}"), " "),
    (re.compile(r"\s+([,.;:!?)](?:\s|$))"), r"\1"),
)
_SPACE = re.compile(r"\s+")
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?\.?$|^[\w., ()\[\]]+ = [\w.]+\(.*\)$", re.S)
_UNDERLINE = re.compile(r"^\s*([=\-~^*#`'\"+.])\1{2,}\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\.\s+([\w:-]*?)::\s*(.*)$")
_FIELD = re.compile(
    r"^\s*:(param|type|raises?|returns?|rtype|keyword|arg|var|ivar|cvar)\b\s*([^:]*):\s*(.*)$"
)
_LIST_MARK = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+")
_DROPPED_SECTION = re.compile(
    r"^\s*(see also|references?|examples?|example usage|usage|authors?|doctests?|methods|attributes|shapes?|"
    r"version history)"
    r"\s*:{0,2}\s*$",
    re.I,
)
_SECTION = re.compile(
    r"^\s*(args|arguments|parameters|params|other parameters|keyword args|keyword arguments|returns?|"
    r"yields?|raises|warns|warnings?|notes?|explanation|description|output|input|outputs|inputs)\s*:{0,2}\s*$",
    re.I,
)
_PROSE_DIRECTIVES = frozenset(
    "note warning tip important versionadded versionchanged seealso attention caution hint".split()
)


def clean_inline(text: str) -> str:
    """One line of plain text: rst and markdown markup, links, formulas and repeated white space removed."""
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return _SPACE.sub(" ", text).strip()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _prose_lines(lines: list[str]) -> Iterator[str]:
    """`lines` without code, doctests, tables, formulas, underlines and the sections that hold no prose."""
    skip_deeper = -1  # inside a block that lasts while lines are indented deeper than this
    in_doctest = in_fence = in_dropped = False
    for i, line in enumerate(lines):
        stripped = line.strip()
        if stripped.startswith("```"):
            in_fence = not in_fence
            continue
        if in_fence:
            continue
        if not stripped:
            in_doctest = False
            yield ""
            continue
        underlined = i + 1 < len(lines) and _UNDERLINE.match(lines[i + 1]) is not None
        if underlined or _SECTION.match(stripped) or _DROPPED_SECTION.match(stripped):
            in_dropped = _DROPPED_SECTION.match(stripped) is not None
            skip_deeper = -1
            if _SECTION.match(stripped):
                yield ""
            continue
        if in_dropped:
            continue
        if skip_deeper >= 0:
            if _indent(line) > skip_deeper:
                continue
            skip_deeper = -1
        if stripped.startswith((">>>", "In [")):
            in_doctest = True
        if in_doctest or _UNDERLINE.match(line) or stripped.startswith(("|", "+-", "@", "%")):
            continue
        directive = _DIRECTIVE.match(line)
        if directive:
            if directive.group(1) in _PROSE_DIRECTIVES:
                text = "" if directive.group(1).startswith("version") else directive.group(2)
                yield text
            else:
                skip_deeper = _indent(line)
            continue
        if stripped.startswith(".. "):  # comments, targets, footnotes
            skip_deeper = _indent(line)
            continue
        field = _FIELD.match(line)
        if field:
            if field.group(1) not in ("type", "rtype"):
                yield ""
                yield f"{field.group(2)}: {field.group(3)}" if field.group(2) else field.group(3)
            continue
        if stripped.endswith("::"):
            skip_deeper = _indent(line)
            line = line.rstrip()[:-1]
        if _LIST_MARK.match(line):
            yield ""
            line = _LIST_MARK.sub("", line)
        yield line


def _paragraphs(lines: Iterable[str]) -> list[str]:
    """Paragraphs (separated by empty lines), each cleaned and on one line, if of two words or more."""
    result, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line.strip())
        elif current:
            text = clean_inline(" ".join(current))
            # a backslash that survived belongs to a formula
            if len(words(text)) >= 2 and "\\" not in text and ">>>" not in text:
                result.append(text)
            current = []
    return result


def parse_docstring(name: str, text: str) -> Docstring:
    """Summary (first paragraph that is not a signature) and document (the rest) of a raw docstring."""
    lines = inspect.cleandoc(text).splitlines()
    start = 0
    summary = ""
    while start < len(lines):
        while start < len(lines) and not lines[start].strip():
            start += 1
        end = start
        while end < len(lines) and lines[end].strip() and not _UNDERLINE.match(lines[end]):
            end += 1
        raw = " ".join(line.strip() for line in lines[start:end])
        if (
            end < len(lines)
            and _UNDERLINE.match(lines[end])
            and not (start < end and _SECTION.match(lines[end - 1]))
        ):
            start = end + 1  # a title
        elif _SIGNATURE.match(raw):
            start = end
        else:
            summary = clean_inline(raw)
            start = end
            break
    return Docstring(name, summary, "\n".join(_paragraphs(_prose_lines(lines[start:]))))


# --- reading sources ----------------------------------------------------------------------------------------


def _source_roots() -> list[tuple[str, Path]]:
    """(module prefix, folder) of the standard library and of each installed package of `PACKAGES`."""
    roots = [("", Path(sysconfig.get_paths()["stdlib"]))]
    for name, _ in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
        if spec is not None and spec.submodule_search_locations:
            roots.append((name, Path(next(iter(spec.submodule_search_locations)))))
    return roots


def _source_files() -> Iterator[tuple[str, Path]]:
    for prefix, root in _source_roots():
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(f for f in subfolders if f not in SKIPPED_FOLDERS)
            for file in sorted(files):
                if file.endswith(".py") and not SKIPPED_FILES.fullmatch(file):
                    path = Path(folder, file)
                    parts = [p for p in path.relative_to(root).with_suffix("").parts if p != "__init__"]
                    yield ".".join(filter(None, [prefix, *parts])), path


def _strings_of(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module and everything defined in it, however deep."""
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield name, text
            for child in node.body:
                inner = getattr(child, "name", None) if hasattr(child, "body") else None
                stack.append((f"{name}.{inner}" if inner else name, child))
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for child in node.body:
                inner = getattr(child, "name", None) if hasattr(child, "body") else None
                stack.append((f"{name}.{inner}" if inner else name, child))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            function = getattr(call.func, "attr", getattr(call.func, "id", None))
            if function in DOC_SETTERS and call.args:
                text = next((s for s in map(_string, reversed(call.args)) if s), None)
                if text:
                    # add_docstr(torch.abs, text); add_newdoc("numpy", "absolute", text)
                    labels = [_string(a) or ast.unparse(a) for a in call.args[:-1]]
                    yield ".".join(labels), text


def _string(node: ast.expr) -> str | None:
    """The text of a string constant, or of a string constant that is formatted or concatenated; else None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _string(node.func.value)
    if isinstance(node, ast.Tuple) and len(node.elts) == 2:  # numpy: (attribute, text)
        return _string(node.elts[1])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_string(node.left) or "") + (_string(node.right) or "") or None
    return None


def _strings_in(module: str, source: str) -> list[tuple[str, str]]:
    """`_strings_of` the parsed source; nothing if it does not parse (a template, another Python's syntax)."""
    # A syntax tree has no cycles: collections triggered by its many nodes are a third of the parsing time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        return list(_strings_of(module, ast.parse(source)))
    except SyntaxError:
        return []
    finally:
        if enabled:
            gc.enable()


def collect() -> list[Docstring]:
    """Every docstring of the sources, parsed; equal raw texts once; in the order of the sources."""
    seen: set[str] = set()
    result = []
    for module, path in _source_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        if '"""' not in source and "'''" not in source:
            continue
        for name, text in _strings_in(module, source):
            if len(text) > 12 and text not in seen:
                seen.add(text)
                result.append(parse_docstring(name, text))
    return result


# --- pairs and splits ---------------------------------------------------------------------------------------


def group_key(summary: str) -> str:
    """The summary in lower case, identifiers (CamelCase, snake_case, dotted, CAPITALS) and digits masked."""
    kept = []
    for token in summary.split():
        token = token.strip(".,;:!?()[]{}'\"")
        plain = re.fullmatch(r"[A-Za-z]?[a-z'-]+|[AI]", token)
        kept.append(token.lower() if plain else "_")
    return " ".join(kept)


def split_of(summary: str) -> str:
    """The split a summary belongs to, by the hash of its group key (see the module's docstring)."""
    u = int.from_bytes(hashlib.sha256(group_key(summary).encode()).digest()[:8], "big") / 2**64
    return "test" if u < 0.05 else "validation" if u < 0.10 else "train"


def _is_pair(doc: Docstring) -> bool:
    """Summary and document are prose of sensible length, and the document supports part of the summary.

    Prose: mostly letters, a capital at the beginning, stop words present. Support: at least a third of the
    summary's content words begin like a word of the document (first five letters, so that "returns" supports
    "returned").
    """
    n_summary, n_document = len(words(doc.summary)), len(words(doc.document))
    if not (
        SUMMARY_WORDS[0] <= n_summary <= SUMMARY_WORDS[1]
        and DOCUMENT_WORDS[0] <= n_document <= DOCUMENT_WORDS[1]
    ):
        return False
    if not re.match(r"[A-Z][a-z]*[\w']* ", doc.summary) or doc.summary.endswith((":", ",", "(")):
        return False
    if re.search(r"[=<>{}\\|_]{2}|\bTODO\b|\bFIXME\b|deprecated|[Cc]opyright|^Note", doc.summary):
        return False
    for text, minimum in ((doc.summary, 0.75), (doc.document, 0.7)):
        if sum(c.isalpha() or c == " " for c in text) < minimum * len(text) or not text.isascii():
            return False
    content = content_words(doc.summary)
    document = words(doc.document)
    if len(content) < 2 or sum(w in STOPWORDS for w in document) < 0.2 * len(document):
        return False
    stems = {w[:5] for w in document}
    return sum(w[:5] in stems for w in content) >= len(content) / 3


def _shingles(text: str) -> set[int]:
    tokens = words(text)
    return {
        int.from_bytes(
            hashlib.blake2b(" ".join(tokens[i : i + SHINGLE]).encode(), digest_size=8).digest(), "big"
        )
        for i in range(max(1, len(tokens) - SHINGLE + 1))
    }


class _Overlap:
    """How much of one of `texts` a text repeats: max over texts of |common shingles| / |its shingles|."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._owners: dict[int, list[int]] = {}
        self._sizes: list[int] = []
        for i, text in enumerate(texts):
            shingles = _shingles(text)
            self._sizes.append(len(shingles))
            for s in shingles:
                self._owners.setdefault(s, []).append(i)

    def __call__(self, text: str) -> float:
        shared = Counter(i for s in _shingles(text) for i in self._owners.get(s, ()))
        return max((n / self._sizes[i] for i, n in shared.items()), default=0.0)


def make_pairs(docstrings: Iterable[Docstring]) -> list[Pair]:
    """One pair per group of summaries and per document, sorted by name; no near-copies across splits."""
    seen: set[str] = set()
    candidates = []
    for doc in sorted(docstrings, key=lambda d: (d.name, d.summary, d.document)):
        if not _is_pair(doc):
            continue
        # documents that begin alike are variants of one text
        keys = {"s:" + group_key(doc.summary), "d:" + " ".join(words(doc.document)[:12])}
        if keys & seen:
            continue
        seen |= keys
        candidates.append(Pair(doc.name, doc.document, doc.summary, split_of(doc.summary)))
    result: list[Pair] = []
    for split in ("test", "validation", "train"):  # each is kept clear of those before it
        overlap = _Overlap(f"{p.reference}\n{p.document}" for p in result)
        result += [
            p
            for p in candidates
            if p.split == split and overlap(f"{p.reference}\n{p.document}") <= MAX_OVERLAP
        ]
    return sorted(result, key=lambda p: p.name)


def training_docstrings(docstrings: Iterable[Docstring], pairs: Iterable[Pair]) -> list[Docstring]:
    """The docstrings that may be trained on: train split, and no near-copy of a held-out pair."""
    overlap = _Overlap(f"{p.reference}\n{p.document}" for p in pairs if p.split != "train")
    return [
        d
        for d in docstrings
        if split_of(d.summary) == "train" and overlap(f"{d.summary}\n{d.document}") <= MAX_OVERLAP
    ]


# --- cache --------------------------------------------------------------------------------------------------


def _cache_path() -> Path:
    """The cache file of this builder (its source) in this environment (versions of Python and packages)."""
    versions = [platform.python_version()]
    for name, distribution in PACKAGES:
        if importlib.util.find_spec(name) is not None:
            try:
                versions.append(f"{distribution}={importlib.metadata.version(distribution)}")
            except importlib.metadata.PackageNotFoundError:
                versions.append(f"{distribution}=unknown")
    digest = hashlib.sha256(Path(__file__).read_bytes() + "\n".join(versions).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "clp-engine" / f"docsum-{digest}.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file, then rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def build(cache: bool = True) -> list[Pair]:
    """All pairs of this environment, sorted by name; read from the user's cache, or built and left there."""
    path = _cache_path() if cache else None
    if path is not None and path.exists():
        return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = make_pairs(collect())
    if path is not None:
        write_atomically(path, "".join(json.dumps(asdict(p)) + "\n" for p in pairs))
    return pairs
