"""The rewards of DocSum, in TRL's convention: keywords only, columns as lists, one float in [0, 1] per completion.

    coverage      ROUGE-L F against the reference
    brevity       1 up to `TARGET_WORDS`, linearly to 0 at `LIMIT_WORDS`; 0 if it is not a legible phrase
    faithfulness  share of the content words that the document supports; 0 if it is not a legible phrase

Coverage and brevity conflict. A reference has ten words on average, and with precision p a text of k words scores a coverage of
2 p k / (k + 10), which grows with k. Brevity falls with every word after the fourth.

Degenerate texts, and the rule that gives each a low reward:

    nothing, a full stop, one word             0: fewer than three words
    "the the the"                              0: repetition
    a sentence cut short, "Return the"         0: dangling end
    "Return the value" for every document      0: no specific word of this document
    a list of frequent words, for coverage     ROUGE-L counts words in order, and its precision falls with each wrong word
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from clp_engine.tasks.docsum.corpus import content_words, words
from clp_engine.tasks.docsum.dataset import title

TARGET_WORDS = 4
LIMIT_WORDS = 12
MIN_WORDS = 3
MIN_DISTINCT = 0.7
STEM = 5  # words are compared by their first letters, this many: "returns" supports "returned"

# Words that cannot end a phrase.
DANGLING = frozenset(
    """a an and any are as at be been being both by can could does each either every for from has have if in
    into is its may might must nor of on onto or per shall should such than that the their these this those to
    under upon using via was were when where whether which while who whose will with within without would not
    no""".split()
)
# Words of any documentation: a phrase with no other word of its document says nothing specific about it.
GENERIC = frozenset(
    """return returns returned returning get gets set sets given value values object objects default function
    functions method methods class classes instance instances type types name names list argument arguments
    parameter parameters optional true false none new call called input output result results data number int
    str string bool following example specified current make create""".split()
)

_TOKEN = re.compile(r"[a-z0-9]+")


@lru_cache(maxsize=8192)
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text.lower()))


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit of an integer per element of `a` (Hyyro 2004)."""
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    v = full
    for token in b:
        u = v & positions.get(token, 0)
        v = (v + u | v - u) & full
    return len(a) - v.bit_count()


def rouge_l(prediction: str, reference: str) -> float:
    """F = 2 P R / (P + R) = 2 L / (m + n), with L the longest common subsequence of the m and n tokens.

    Tokens are runs of letters a-z and digits in lower case, unstemmed: the tokens and the value of the
    `rouge-score` package. An empty text scores 0.
    """
    m, n = _tokens(prediction), _tokens(reference)
    return 2 * lcs_length(m, n) / (len(m) + len(n)) if m and n else 0.0


def rouge_1(prediction: str, reference: str) -> float:
    """F = 2 C / (m + n), with C the number of common tokens (each counted min(count in m, count in n) times). For reports."""
    m, n = _tokens(prediction), list(_tokens(reference))
    total = len(m) + len(n)
    common = 0
    for token in m:
        if token in n:
            n.remove(token)
            common += 1
    return 2 * common / total if total else 0.0


@lru_cache(maxsize=8192)
def _support(document: str, name: str) -> frozenset[str]:
    """Stems of the words in the summariser's input: the document and the object's short name."""
    return frozenset(w[:STEM] for w in words(f"{title(name)} {document}"))


def is_legible(text: str, support: frozenset[str]) -> bool:
    """Whether the text can pass for a phrase about its document. It must have

    - at least `MIN_WORDS` words, mostly letters, beginning with a letter;
    - no word twice in a row, and at least a share `MIN_DISTINCT` of different words;
    - an end that is not dangling (article, preposition, conjunction, auxiliary, comma);
    - a content word that the document supports and that is not `GENERIC`.
    """
    text = text.strip()
    tokens = words(text)
    if len(tokens) < MIN_WORDS or not text[0].isalpha() or text[-1] in ",;:-([{_/":
        return False
    if sum(c.isalpha() or c == " " for c in text) < 0.7 * len(text):
        return False
    if len(set(tokens)) < MIN_DISTINCT * len(tokens) or any(
        a == b for a, b in zip(tokens, tokens[1:], strict=False)
    ):
        return False
    if tokens[-1] in DANGLING:
        return False
    return any(w[:STEM] in support for w in content_words(text) if w not in GENERIC)


def _names(name: Sequence[str] | None, document: Sequence[str]) -> Sequence[str]:
    return [""] * len(document) if name is None else name


def coverage(*, completions: Sequence[str], reference: Sequence[str], **_: Any) -> list[float]:
    """`rouge_l(completion, reference)`.

    ROUGE-L instead of ROUGE-1: a bag of frequent words in any order earns ROUGE-1. ROUGE-L rewards the order that keeps
    the text readable.
    """
    return [rouge_l(c, r) for c, r in zip(completions, reference, strict=True)]


def brevity(
    *, completions: Sequence[str], document: Sequence[str], name: Sequence[str] | None = None, **_: Any
) -> list[float]:
    """min(1, max(0, (LIMIT - n) / (LIMIT - TARGET))) for n words; 0 if not `is_legible`."""
    rewards = []
    for text, doc, label in zip(completions, document, _names(name, document), strict=True):
        length = (LIMIT_WORDS - len(words(text))) / (LIMIT_WORDS - TARGET_WORDS)
        rewards.append(
            min(1.0, max(0.0, length)) if length > 0 and is_legible(text, _support(doc, label)) else 0.0
        )
    return rewards


def faithfulness(
    *, completions: Sequence[str], document: Sequence[str], name: Sequence[str] | None = None, **_: Any
) -> list[float]:
    """|distinct content words whose stem the document or name has| / |distinct content words|.

    "Return(s)" does not count, because it begins many summaries and carries no content to support.
    """
    rewards = []
    for text, doc, label in zip(completions, document, _names(name, document), strict=True):
        support = _support(doc, label)
        stems = {w[:STEM] for w in content_words(text)} - {"retur"}
        legible = bool(stems) and is_legible(text, support)
        rewards.append(len(stems & support) / len(stems) if legible else 0.0)
    return rewards


REWARDS: dict[str, Callable[..., list[float]]] = {
    "coverage": coverage,
    "brevity": brevity,
    "faithfulness": faithfulness,
}
