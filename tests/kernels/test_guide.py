"""docs/kernels.md: its code runs in the order of the page, and its loop learns."""

import guide
import torch


def test_the_pages_code_runs():
    namespace = {}
    for block in guide.blocks():
        guide.run(block, namespace)
    history = namespace["history"]
    assert len(history) == 60
    first, last = (torch.stack([scores for scores, _ in part]).mean() for part in (history[:8], history[-8:]))
    assert last > first + 0.05  # rewards rise
    assert 0 < history[-1][1] < 5 and history[0][1] == 0  # away from the reference, which it starts at


def test_every_block_belongs_to_some_test():
    total = guide.PAGE.read_text(encoding="utf-8").count("```python\n")
    assert total == sum(len(guide.blocks(library)) for library in (None, *guide.LIBRARIES)) >= 5
