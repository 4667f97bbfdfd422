"""Tables in text: every report's columns line up, in Markdown and in the terminal."""

from clp_engine.core import tables
from clp_engine.core.statistics import Interval


def test_a_markdown_table_lines_up_and_says_where_each_column_is_aligned():
    text = tables.markdown(["method", "KL"], [["soup", "0.5"], ["a long name", "12.25"]], left=1)
    assert text.split("\n") == [
        "| method      |    KL |",
        "| ----------- | ----: |",
        "| soup        |   0.5 |",
        "| a long name | 12.25 |",
    ]
    assert tables.markdown(["x"], [["1.5"]]) == "|   x |\n| --: |\n| 1.5 |"


def test_columns_and_pairs_keep_what_is_wider_than_they_are():
    assert tables.columns([["lora", "3"], ["a long name", "12,345"]], (6, 4)) == [
        "lora     3",
        "a long name12,345",
    ]
    assert tables.pairs({"torch": "2.13", "a long name": "x"}, 8) == ["torch   2.13", "a long namex"]


def test_an_interval_is_written_in_the_format_of_its_numbers():
    value = Interval(0.12345, -1.0, 2.5)
    assert f"{value:.3f}" == "0.123 [-1.000, 2.500]" and f"{value:.2g}" == "0.12 [-1, 2.5]"


def test_a_compact_table_pads_nothing_and_keeps_its_columns():
    lines = tables.compact(["name", "a|b"], [["x", 1], ["much longer", "|"]])
    assert lines == ["| name | a\\|b |", "|---|---|", "| x | 1 |", "| much longer | \\| |"]
