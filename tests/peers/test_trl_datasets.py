"""The dataset formats of TRL's GRPOTrainer: the same prompts, tokens and columns in the same order."""

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
from datasets import Dataset, DatasetDict, IterableDataset
from engine.conftest import build_tokenizer
from engine.data.test_data import CHAT, READS_PARTS, READS_TEXTS, adapters
from peers.both_trainers import BOTH, ROWS, our_trainer, trl_trainer

from clp_engine.core.errors import ConfigError


def generated():
    yield from ROWS


def chat_tokenizer(template=READS_TEXTS):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def recorded(folder, rows, **options):
    """What the reward functions of both trainers saw, batch after batch: prompts and every column."""
    seen = {}
    for name, build in BOTH.items():
        calls = seen[name] = []

        def record(
            prompts, completions, trainer_state, log_extra, log_metric, completion_ids, _into=calls, **columns
        ):
            _into.append((prompts, columns))
            return [float(i % 3) for i in range(len(prompts))]

        build(folder / name, record, rows(name), **options).train()
    return seen


@pytest.mark.parametrize(
    "rows",
    [
        Dataset.from_list(ROWS),
        IterableDataset.from_generator(generated),
        Dataset.from_list(ROWS).to_iterable_dataset(),
    ],
    ids=["Dataset", "IterableDataset", "IterableDataset of a Dataset"],
)
def test_unshuffled_rows_come_in_trl_s_order_over_two_epochs(tmp_path, rows):
    seen = recorded(tmp_path, lambda name: rows, max_steps=6)
    assert seen["clp"] == seen["trl"] and len(seen["clp"]) == 6
    assert [numbers["number"][::4] for _, numbers in seen["clp"]][:5] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [0, 1],
    ]


def test_a_streamed_dataset_is_shuffled_as_trl_shuffles_it(tmp_path):
    seen = recorded(
        tmp_path,
        lambda name: IterableDataset.from_generator(generated),
        max_steps=6,
        shuffle_dataset=True,
        seed=3,
    )
    assert seen["clp"] == seen["trl"]
    numbers = [n for _, columns in seen["clp"] for n in columns["number"][::4]]
    assert (
        sorted(numbers[:8]) == list(range(8)) and numbers[:4] != numbers[8:] and numbers[:8] != list(range(8))
    )


def test_chat_prompts_and_their_columns(tmp_path):
    """`datasets` gives every message the keys of all of them, None where one has none."""
    rows = Dataset.from_list(
        [
            {"prompt": [*CHAT[:1], {"role": "user", "content": f"w{i}", "name": "x"}], "level": {"of": i}}
            for i in range(4)
        ]
    )
    seen = recorded(tmp_path, lambda name: rows, max_steps=2, tokenizer=chat_tokenizer())
    assert seen["clp"] == seen["trl"]


@pytest.mark.parametrize("template", [READS_PARTS, READS_TEXTS], ids=["parts", "texts"])
def test_chat_prompts_have_trl_s_tokens(tmp_path, template):
    parts = template is READS_PARTS
    prompts = [
        [
            {"role": "system", "content": [{"type": "text", "text": "w5"}] if parts else "w5"},
            {"role": "user", "content": [{"type": "text", "text": "w9 w8"}] if parts else "w9 w8"},
            {"role": "assistant", "content": [{"type": "text", "text": "w7"}] if parts else "w7"},
        ][:turns]
        for turns in (2, 3)
    ]
    rows = [{"prompt": prompt} for prompt in prompts] * 4
    tokenizer = chat_tokenizer(template)
    theirs = trl_trainer(tmp_path / "trl", lambda completions, **_: [0.0], rows, tokenizer=tokenizer)
    ours = our_trainer(tmp_path / "clp", lambda completions, **_: [0.0], rows, tokenizer=tokenizer)
    tokens, images, _ = theirs._tokenize_prompts(prompts)
    assert images is None and ours.train_dataset.batch([0, 1]).token_ids == tokens


def test_texts_have_trl_s_tokens(tmp_path):
    tokenizer = build_tokenizer("t5")  # adds an end token
    theirs = trl_trainer(tmp_path / "trl", lambda completions, **_: [0.0], tokenizer=tokenizer)
    ours = our_trainer(tmp_path / "clp", lambda completions, **_: [0.0], tokenizer=tokenizer)
    tokens, _, _ = theirs._tokenize_prompts([row["prompt"] for row in ROWS])
    assert ours.train_dataset.batch(range(8)).token_ids == tokens


def test_a_streamed_dataset_needs_max_steps_in_both(tmp_path):
    rows = IterableDataset.from_generator(generated)
    with pytest.raises(ConfigError, match="give max_steps or max_generated_tokens"):
        our_trainer(tmp_path / "clp", lambda completions, **_: [0.0], rows, max_steps=-1)
    with pytest.raises(ValueError, match="max_steps"):
        trl_trainer(tmp_path / "trl", lambda completions, **_: [0.0], rows, max_steps=-1).train()


def test_a_shuffled_stream_is_resumed_to_the_bit(tmp_path):
    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 5, "shuffle_dataset": True}
    our_trainer(tmp_path / "whole", reward, IterableDataset.from_generator(generated), **options).train()
    resumed = our_trainer(tmp_path / "resumed", reward, IterableDataset.from_generator(generated), **options)
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-5")
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "resumed")


@pytest.mark.parametrize("kind", [dict, DatasetDict], ids=["dict", "DatasetDict"])
def test_evaluation_sets_with_names_give_metrics_with_trl_s_names(tmp_path, kind):
    sets = kind({"short": Dataset.from_list(ROWS[:4]), "long": Dataset.from_list(ROWS[4:])})
    logged = {}
    for name, build in BOTH.items():
        trainer = build(
            tmp_path / name,
            lambda completions, **_: [0.0] * len(completions),
            eval_dataset=sets,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=1,
            per_device_eval_batch_size=8,
        )
        trainer.train()
        logged[name] = [
            set(e) for e in trainer.state.log_history if any(key.startswith("eval_") for key in e)
        ]
    assert len(logged["clp"]) == len(logged["trl"]) == 2
    for ours, theirs, name in zip(logged["clp"], logged["trl"], sets):
        prefix = f"eval_{name}_"
        # TRL writes the metrics that it gathers itself under eval_ alone, whatever the set: the last one counts there.
        gathered = {
            key.replace("eval_", prefix, 1)
            for key in theirs
            if not key.startswith(prefix) and key.startswith("eval_")
        }
        assert {f"{prefix}reward", f"{prefix}runtime"} <= ours
        missing = (gathered | {key for key in theirs if key.startswith(prefix)}) - ours
        assert missing <= {f"{prefix}loss", f"{prefix}num_tokens"} | {
            m for m in missing if "clip_ratio" in m or "terminated" in m
        }
