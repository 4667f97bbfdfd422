"""The rewards of DocSum: values worked out by hand, and what an optimiser would try."""

import pytest

from clp_engine.tasks.docsum import REWARDS, brevity, coverage, faithfulness, rouge_1, rouge_l
from clp_engine.tasks.docsum.rewards import LIMIT_WORDS, TARGET_WORDS, lcs_length

DOCUMENT = (
    "The graph is traversed from the source. Nodes that were visited are skipped; "
    "the number of edges is counted."
)
NAME = "networkx.algorithms.traversal.count_reachable_edges"


def score(reward, *completions, document=DOCUMENT, reference="Return the number of edges."):
    n = len(completions)
    return reward(
        prompts=["?"] * n,
        completions=list(completions),
        completion_ids=[[1]] * n,
        document=[document] * n,
        reference=[reference] * n,
        name=[NAME] * n,
        trainer_state=None,
        log_extra=None,
        log_metric=None,
    )


def test_names_and_order():
    assert list(REWARDS) == ["coverage", "brevity", "faithfulness"]


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ("abcbdab", "bdcaba", 4),
        ("", "abc", 0),
        ("abc", "", 0),
        ("abc", "abc", 3),
        ("abc", "cba", 1),
        ("aaab", "aa", 2),
    ],
)
def test_lcs_is_the_textbook_dynamic_program(a, b, expected):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert lcs_length(a, b) == table[-1][-1] == expected


def test_lcs_longer_than_a_machine_word():
    a = [str(i % 7) for i in range(150)]
    assert lcs_length(a, a) == 150
    assert lcs_length(a, a[3:]) == 147


def test_rouge_by_hand():
    # LCS "the cat the mat" = 4 of 5 and 6 tokens: F = 2 * 4 / 11; in common as a bag: 4 as well
    assert rouge_l("the cat on the mat", "The cat, under the mat, sat.") == pytest.approx(8 / 11)
    # order: in common 3 of 3 and 3 (F 1), in order 1 (F 1/3)
    assert rouge_1("c b a", "a b c") == pytest.approx(1.0)
    assert rouge_l("c b a", "a b c") == pytest.approx(1 / 3)
    # a token counts as often as in both: "the" once
    assert rouge_1("the the the", "the end") == pytest.approx(2 * 1 / 5)
    assert rouge_l("", "the end") == 0 == rouge_1("", "the end")
    assert rouge_l("the end", "...") == 0


def test_coverage_is_rouge_l():
    # 5 tokens each, "return the ... of edges" in order: 4
    assert score(coverage, "Return the number of edges", "Return the sum of edges", "") == pytest.approx(
        [1, 0.8, 0]
    )


def test_brevity_falls_linearly_from_target_to_limit():
    words = "Count edges that can be reached from one source while nodes".split()
    words += "seen before are skipped and never again visited".split()
    for n in (6, 9, 11, 12, 15, 19):  # prefixes that end in a noun or a verb
        expected = min(1.0, max(0.0, (LIMIT_WORDS - n) / (LIMIT_WORDS - TARGET_WORDS)))
        assert score(brevity, " ".join(words[:n])) == [pytest.approx(expected)], words[:n]
    assert score(brevity, "Return reachable edges.", "Count the reachable edges.") == [1.0, 1.0]
    assert score(brevity, "Count the edges " + " ".join(f"w{chr(97 + i)}" for i in range(LIMIT_WORDS))) == [
        0.0
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        ".",
        "...!?",
        "Edges",
        "Count edges",  # two words
        "edges edges edges edges",
        "Edges and edges and edges and edges",
        "Return the number of the",  # cut short
        "Count the edges that",
        "Count the visited edges,",
        "Return the value.",  # of any document
        "Return a new instance of the given class.",
        "Compute the hypotenuse of triangles.",  # of another document
        "the a of to in a the",
        "1 2 3 4 edges",
        "-- edges -- __ == || nodes ##",
        "<|summary|> edges nodes number",
    ],
)
def test_degenerate_text_earns_neither_brevity_nor_faithfulness(text):
    assert score(brevity, text) == [0.0]
    assert score(faithfulness, text) == [0.0]


def test_faithfulness_by_hand():
    # content words number, visited (the document has them), cats (it has not); "return" does not count
    assert score(faithfulness, "Return the number of visited cats") == [pytest.approx(2 / 3)]
    # stems: "visiting" by "visited"; the name supports "reachable"
    assert score(faithfulness, "Visiting reachable nodes.") == [1.0]
    # repeating a supported word does not raise the share: {edges, cats}
    assert score(faithfulness, "Count edges and more edges of cats", document="counted edges") == [
        pytest.approx(2 / 3)
    ]


def test_coverage_and_brevity_conflict():
    long = "Return the number of edges that can be reached from the source."
    short = "Count reachable edges."
    (c_long, c_short), (b_long, b_short) = (
        score(r, long, short, reference=long) for r in (coverage, brevity)
    )
    assert c_long > c_short + 0.3 and b_short > b_long + 0.3


def test_column_of_another_length_raises():
    with pytest.raises(ValueError):
        coverage(completions=["a", "b"], reference=["a"])


def test_name_is_optional():
    assert brevity(completions=["Count the edges."], document=["number of edges"]) == [1.0]


def test_a_phrase_that_fits_every_document_is_not_about_this_one():
    document = "The value that is returned is a new instance of the given class; the edges were counted."
    for phrase in ("Return the value.", "Return a new instance of the given class."):
        assert score(brevity, phrase, document=document) == [0.0]
    assert score(brevity, "Return the edges.", document=document) == [1.0]
