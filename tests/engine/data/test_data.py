"""Datasets: by index or streamed, plain or chat, the same rows in the same order whether interrupted or not."""

import json
import logging
from itertools import count

import pytest
import torch
from engine.conftest import build_model, build_tokenizer
from engine.training.test_trainer import ROWS, build_trainer, log_of, low_words, settings, timeless

from clp_engine.core.errors import ConfigError
from clp_engine.data.chat import encode_chat
from clp_engine.data.prompts import PromptDataset
from clp_engine.data.sources import read_rows
from clp_engine.data.streams import EndOfData, PromptStream, prompts_of
from clp_engine.policy import prompt_conditioning
from clp_engine.training.trainer import CLPTrainer
from clp_engine.training.trl_compat.dataloader_view import PromptLoader

READS_PARTS = (
    "{% for m in messages %}w1 {% for p in m['content'] %}{{ p['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)
READS_TEXTS = (
    "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
)
CHAT = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w9 w8"}]


class Rows:
    """An iterable whose epochs differ: in epoch e the rows begin e places later, and there is one less of them."""

    def __init__(self, rows=ROWS):
        self.rows, self.shift, self.read = list(rows), 0, 0

    def set_epoch(self, epoch):
        self.shift = epoch

    def __iter__(self):
        turned = self.rows[self.shift :] + self.rows[: self.shift]
        for row in turned[: len(turned) - self.shift]:
            self.read += 1
            yield row


def chat_tokenizer(template=READS_TEXTS):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def stream_trainer(tmp_path, source, **changes):
    return CLPTrainer(
        build_model("qwen2"),
        low_words,
        settings(tmp_path, **changes),
        source,
        processing_class=build_tokenizer(),
    )


def adapters(path):
    return (path / "policy" / "adapters.safetensors").read_bytes()


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_rows_of_epoch_after_epoch_and_reads_none_before_it_is_needed():
    source = Rows()
    stream = PromptStream(source, build_tokenizer())
    expected = [row["tag"] for shift in (0, 1) for row in (ROWS[shift:] + ROWS[:shift])[: 12 - shift]]
    tags = []
    for start in range(0, 20, 5):
        assert stream.epoch_number(start) == (start >= 12)
        tags += stream.batch(stream.indices(start, 5, 0, True)).columns["tag"]
        assert source.read == start + 5
    assert tags == expected[:20]
    assert stream.epoch(6, 0.1) == 0.5 and stream.epoch(12, 0.1) == 1.0 and stream.epoch(18, 0.1) == 1.5


def test_a_position_is_found_again_from_the_starts_of_the_epochs_alone():
    stream = PromptStream(Rows(), build_tokenizer())
    whole = stream.batch(range(30)).columns["tag"]
    for start in (0, 7, 12, 22, 25):
        later = PromptStream(Rows(), build_tokenizer())
        later.load_state_dict(stream.state_dict())
        assert later.batch(range(start, 30)).columns["tag"] == whole[start:]
        assert later.batch([3]).columns["tag"] == whole[3:4]  # and backwards
    changed = PromptStream(Rows(ROWS[:9]), build_tokenizer())
    changed.load_state_dict(stream.state_dict())
    with pytest.raises(ConfigError, match="epoch 0 of the dataset has 9 rows now and had 12"):
        changed.batch(range(5, 15))


def test_a_stream_trains_as_the_list_of_its_rows_does(tmp_path):
    class Again:
        def __iter__(self):
            return iter(ROWS)

    for name, rows in (("list", ROWS), ("stream", Again())):
        stream_trainer(tmp_path / name, rows, shuffle_dataset=False, max_steps=4).train()
    assert adapters(tmp_path / "list") == adapters(tmp_path / "stream")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2},
        {"partial_rollouts": True, "max_completion_length_per_step": 4},
        {"max_steps": -1, "max_generated_tokens": 600},
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_at_the_right_row_of_a_stream(tmp_path, changes):
    """12 rows, 11 in the second epoch; the checkpoint lies within the second one."""
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, **changes}
    stream_trainer(tmp_path / "whole", Rows(), **changes).train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    trainer = stream_trainer(tmp_path / "resumed", Rows(), **changes)
    assert trainer.train(resume_from_checkpoint=checkpoint).global_step > 4
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "resumed")
    logs = [list(map(timeless, log_of(tmp_path / name))) for name in ("whole", "resumed")]
    assert logs[0] == logs[1]


def test_a_generator_is_read_as_far_as_the_run_needs_and_ends_it_where_it_ends(tmp_path, caplog):
    read = []

    def endless():
        for i in count():
            read.append(i)
            yield ROWS[i % len(ROWS)]

    stream_trainer(tmp_path / "endless", endless(), max_steps=2).train()
    assert len(read) == 8
    with caplog.at_level(logging.WARNING):
        trainer = stream_trainer(tmp_path, iter(ROWS[:10]), max_steps=9)
        result = trainer.train()
    assert result.global_step == 2 and (tmp_path / "policy").is_dir()
    assert "the data ended after 10 rows, at step 2 of 9" in caplog.text


def test_a_generator_cannot_be_resumed_and_says_so(tmp_path, caplog):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with caplog.at_level(logging.WARNING):
        stream_trainer(tmp_path, iter(ROWS), **changes).train()
    assert "can be read once: checkpoints of this run can be used, not resumed from" in caplog.text
    with pytest.raises(
        ConfigError, match="of which 8 rows were read before the checkpoint; it can be read once"
    ):
        stream_trainer(tmp_path, iter(ROWS), **changes).train(resume_from_checkpoint=True)


def test_a_stream_needs_a_length_of_the_run(tmp_path):
    for source in (iter(ROWS), Rows()):
        with pytest.raises(ConfigError, match="has no length: give max_steps or max_generated_tokens"):
            stream_trainer(tmp_path, source, max_steps=-1, num_train_epochs=1)


def test_a_source_that_shuffles_is_asked_to_where_the_run_shuffles(tmp_path):
    class Shuffling(Rows):
        def shuffle(self, seed):
            return Shuffling(list(reversed(self.rows)))

    seen = []

    def watching(tag, completions, **_):
        seen.extend(tag[::4])
        return low_words(completions)

    for shuffle, first in ((True, 11), (False, 0)):
        seen.clear()
        changes = {"max_steps": 1, "seed": 5, "shuffle_dataset": shuffle}
        CLPTrainer(
            build_model("qwen2"),
            watching,
            settings(tmp_path / str(shuffle), **changes),
            Shuffling(),
            processing_class=build_tokenizer(),
        ).train()
        assert seen[0] == first


def test_the_end_and_a_second_pass_of_what_can_be_read_once():
    stream = PromptStream(iter(ROWS), build_tokenizer())
    stream.batch(range(12))
    with pytest.raises(EndOfData, match="after 12 rows"):
        stream.batch([12])
    with pytest.raises(ConfigError, match="row 3 of a list_iterator is asked for again"):
        stream.batch([3])
    with pytest.raises(ConfigError, match="the dataset is empty"):
        PromptStream(iter([]), build_tokenizer()).batch([0])

    class Exhausted:  # iter() gives the same iterator again
        rows = iter(ROWS)

        def __iter__(self):
            return (row for row in self.rows)

    with pytest.raises(EndOfData):
        PromptStream(Exhausted(), build_tokenizer()).batch(range(13))


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": ROWS, "test": ROWS}, "a mapping with the keys train, test; choose one"),
        ("w1 w2", "an iterable of rows; got str"),
        (7, "an iterable of rows; got int"),
        (
            [{"prompt": "w1", "log_extra": 1}],
            "a column 'log_extra', under which a reward function receives something else",
        ),
        ([{"prompt": "w1", "image": object()}], "a column 'image'; prompts are text here"),
        ([{"prompt": [1, 2]}], "a list of messages .*; got a list of int"),
        ([{"prompt": []}], "got an empty list"),
        ([{"prompt": None}], "got type NoneType"),
        ([{"prompt": [{"role": "user", "text": "w1"}]}], "a role and a content; got the keys role, text"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "image": 1}]}]}],
            "row 0 of the dataset: a message has a part of type 'image'",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_with_its_place(rows, message):
    with pytest.raises(ConfigError, match=message):
        prompts_of(rows, chat_tokenizer())


def test_a_later_row_is_checked_when_its_turn_comes():
    rows = [*ROWS[:3], {"prompt": 5}]

    class Table:  # as a datasets.Dataset: rows that are made when they are asked for
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    for dataset in (PromptDataset(Table(), build_tokenizer()), PromptStream(iter(rows), build_tokenizer())):
        with pytest.raises(
            ConfigError, match="row 3 of the dataset: a prompt is a text or a list of messages"
        ):
            dataset.batch(range(4))


def test_a_column_that_some_rows_lack_is_none_there():
    rows = [{"prompt": "w1"}, {"prompt": "w2", "hint": "x", "completion": "left out"}]
    assert PromptDataset(rows, build_tokenizer()).batch([0, 1]).columns == {"hint": [None, "x"]}


def test_a_column_without_images_may_be_called_images():
    assert PromptDataset([{"prompt": "w1", "images": None}], build_tokenizer()).batch([0]).columns == {
        "images": [None]
    }


# -- chat prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [READS_PARTS, READS_TEXTS], ids=["reads parts", "reads texts"])
def test_parts_of_text_are_read_whatever_the_template_knows(template):
    tokenizer = chat_tokenizer(template)
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "w5"}]},
        {"role": "user", "content": [{"type": "text", "text": "w9"}, {"type": "text", "text": " w8"}]},
    ]
    assert encode_chat(parts, tokenizer) == tokenizer("w1 w5 w1 w9 w8 w2").input_ids
    shown = prompt_conditioning.with_weighting(parts, encode_chat(parts, tokenizer), "w7 ", tokenizer)
    assert shown == tokenizer("w1 w5 w1 w7 w9 w8 w2").input_ids


@pytest.mark.parametrize(
    "content",
    [
        "{% if m['content'] is string %}{{ m['content'] }}{% endif %}",
        "{{ m['content'] | tojson }}",
        "{{ 'w1 ' + m['content'] }}",
    ],
    ids=["leaves them out", "writes JSON", "fails"],
)
def test_a_template_that_does_not_go_through_parts_gets_their_texts(content):
    tokenizer = chat_tokenizer("{% for m in messages %}" + content + " {% endfor %}w2")
    parts = [{"role": "user", "content": [{"type": "text", "text": "w9 w8"}]}]
    joined = [{"role": "user", "content": "w9 w8"}]
    assert encode_chat(parts, tokenizer) == encode_chat(joined, tokenizer)


def test_chat_prompts_without_a_template_are_refused():
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        PromptDataset([{"prompt": CHAT}], build_tokenizer()).batch([0])


def test_text_and_chat_prompts_share_a_dataset(tmp_path):
    seen = []

    def judge(prompts, completions, **_):
        seen.extend(zip(prompts, completions))
        return [float(isinstance(c, str)) for c in completions]

    CLPTrainer(
        build_model("qwen2"),
        judge,
        settings(tmp_path, max_steps=1),
        [{"prompt": CHAT}, {"prompt": "w1"}] * 2,
        processing_class=chat_tokenizer(),
    ).train()
    assert all(isinstance(c, str) == isinstance(p, str) for p, c in seen)
    assert any(p == CHAT and c[0]["role"] == "assistant" for p, c in seen)


# -- evaluation sets ---------------------------------------------------------------------------------------------------


def test_evaluation_sets_have_names_and_each_its_own_metrics(tmp_path):
    sets = {"short": ROWS[:3], "streamed": Rows(ROWS[3:8])}
    trainer = build_trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    logged = [e for e in log_of(tmp_path) if any(k.startswith("eval_") for k in e)]
    assert [sum(k.startswith(f"eval_{name}_") for k in e) > 5 for e, name in zip(logged, sets)] == [
        True,
        True,
    ]
    whole = trainer.evaluate()
    assert whole["eval_short_reward"] == logged[0]["eval_short_reward"]
    assert (
        trainer.evaluate("streamed")["eval_reward"]
        == whole["eval_streamed_reward"]
        == logged[1]["eval_streamed_reward"]
    )
    assert timeless(trainer.evaluate(ROWS[:3]))["eval_reward"] == whole["eval_short_reward"]
    with pytest.raises(ConfigError, match="eval_dataset='other': there are short, streamed"):
        trainer.evaluate("other")
    with pytest.raises(ConfigError, match="there are none with a name"):
        build_trainer(tmp_path, eval_dataset=ROWS).evaluate("other")
    with pytest.raises(ConfigError, match="ignore_keys"):
        trainer.evaluate(ignore_keys=["hidden"])


def test_an_evaluation_set_that_can_be_read_once_is_evaluated_once(tmp_path):
    trainer = build_trainer(tmp_path, eval_dataset=iter(ROWS[:5]))
    expected = build_trainer(tmp_path, eval_dataset=ROWS[:5]).evaluate()["eval_reward"]
    assert trainer.evaluate()["eval_reward"] == expected
    with pytest.raises(ConfigError, match="the evaluation set is a list_iterator, which can be read once"):
        trainer.evaluate()
    with pytest.raises(ConfigError, match="gave no rows"):
        trainer.evaluate(iter([]))


# -- the batches as callbacks see them ---------------------------------------------------------------------------------


def test_a_loader_gives_the_rows_in_the_order_of_the_run():
    dataset = PromptDataset(ROWS, build_tokenizer())
    loader = PromptLoader(dataset, prompts=5, group=2, passes=3, shuffle_seed=4)
    batches = [[row["tag"] for row in batch] for batch in loader]
    assert len(loader) == len(batches) == 6 and batches[0] == batches[2] != batches[3]
    order = [ROWS[i]["tag"] for i in dataset.indices(0, 10, 4, True)]
    assert batches[0] + batches[3] == [tag for tag in order for _ in range(2)]
    assert loader.dataset is ROWS and loader.batch_size == 10
    last = list(PromptLoader(dataset, prompts=5, group=1, drop_last=False))[-1]
    assert [row["tag"] for row in last] == [10, 11]
    once = PromptLoader(PromptStream(iter(ROWS), build_tokenizer()), 5, 2)
    with pytest.raises(TypeError, match="can be read once, and the run reads it"):
        list(once)
    with pytest.raises(TypeError):
        len(once)


def test_seeds_and_positions_determine_an_epoch_s_order():
    dataset = PromptDataset(ROWS, build_tokenizer())
    first, second = dataset.indices(0, 12, 1, True), dataset.indices(12, 12, 1, True)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert dataset.indices(7, 9, 1, True) == (first + second)[7:16]
    assert torch.equal(torch.tensor(dataset.indices(3, 4, 1, False)), torch.arange(3, 7))


# -- rows that cannot be used ------------------------------------------------------------------------------------------

BAD = {
    "None": (None, "got type NoneType"),
    "a number": (3, "got type int"),
    "empty": ("", "its prompt is empty"),
    "half of a character": ("w1 \ud83d", r"half of a character \('\\ud83d' at 3\)"),
    "blank": ("  ", "its prompt has no tokens"),
    "no messages": ([], "got an empty list"),
    "a part without a text": ([{"role": "user", "content": [{"type": "text"}]}], "type 'text' without a text"),
    "a part that is a number": ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "type 'text' without a text"),
    "half of a character in a part": (
        [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}], "half of a character"
    ),
    "a role the template refuses": ([{"role": "wizard", "content": "w1"}], "cannot be encoded .*only users speak"),
}  # fmt: skip


def strict_tokenizer():
    return chat_tokenizer(
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('only users speak') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_before_the_first_step_of_a_list_and_when_it_is_reached_in_a_stream(bad):
    prompt, reason = BAD[bad]
    rows = [{"prompt": "w1"}] * 5 + [{"prompt": prompt}] + [{"prompt": "w2"}] * 3
    with pytest.raises(ConfigError, match=f"row 5 of the dataset.*{reason}"):
        PromptDataset(rows, strict_tokenizer())
    stream = PromptStream((row for row in rows), strict_tokenizer())
    assert stream.batch(range(0, 4)).prompts == ["w1"] * 4
    with pytest.raises(ConfigError, match=f"row 5 of the dataset.*{reason}"):
        stream.batch(range(4, 8))


def test_bad_rows_are_left_out_where_that_is_asked_for_and_counted(caplog):
    good = [{"prompt": f"w{i}"} for i in range(6)]
    bad = [{"prompt": prompt} for prompt, _ in BAD.values()] + [{"text": "w1"}, 3]
    rows = [*good[:2], *bad, *good[2:]]
    for dataset in (
        PromptDataset(rows, strict_tokenizer(), skip_bad_rows=True),
        PromptStream(rows, strict_tokenizer(), skip_bad_rows=True),
    ):
        assert dataset.batch(range(6)).prompts == [row["prompt"] for row in good]
        assert dataset.skipped == len(bad)
    assert len(caplog.messages) == 2 and all("row 2 of the dataset" in text for text in caplog.messages)
    with pytest.raises(ConfigError, match="no row of the dataset can be used; row 0"):
        PromptDataset(bad, strict_tokenizer(), skip_bad_rows=True)


def test_a_run_says_how_many_rows_it_left_out(tmp_path):
    rows = [{"prompt": "w5 w6"}, {"prompt": ""}, {"prompt": "w7"}, {"prompt": None}]
    args = settings(tmp_path, max_steps=1, logging_steps=1, skip_bad_rows=True)
    CLPTrainer(build_model("qwen2"), low_words, args, rows, processing_class=build_tokenizer()).train()
    assert log_of(tmp_path)[0]["data/skipped_rows"] == 2


def test_lines_of_a_file_end_at_newlines_alone(tmp_path):
    text = "w1\u2028w2\x85w3\x0cw4"
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": text}, ensure_ascii=False) + "\n\n" + '{"prompt": "w5"}\r\n'
    )
    (tmp_path / "rows.txt").write_text(f"{text}\nw5\r\n")
    expected = [{"prompt": text}, {"prompt": "w5"}]
    assert read_rows(tmp_path / "rows.jsonl") == expected == read_rows(tmp_path / "rows.txt")
