"""All 15 public data sets, where they lie beside the repository; skipped where they do not."""

import json

import pytest

from dalorra_core.data.examples import gold_label
from dalorra_core.data.labels import collect_labels, resolve_label_tokens
from dalorra_core.data.prompts import prompt_template, render
from dalorra_core.data.readers import read_source
from tests.support.tiny_data_sets import SHARED_DATA as DATA
from tests.support.tiny_data_sets import needs_shared_data
from tests.support.tiny_tokenizer import tiny_tokenizer

pytestmark = needs_shared_data

SIZES = {  # train, validation, test
    "ag_news": (None, None, 7600),
    "arc_challenge": (1119, 299, 1172),
    "arc_easy": (2251, 570, 2376),
    "banking77": (10003, None, 3080),
    "boolq": (9427, 3270, None),
    "clinc150": (15100, 3100, 5500),
    "mmlu_college_chemistry": (None, None, 100),
    "mmlu_college_physics": (None, None, 102),
    "openbookqa": (4957, 500, 500),
    "pubmedqa": (500, None, 500),
    "sms_spam": (4441, None, 1133),
    "sst2": (6920, 872, 1821),
    "trec": (5452, None, 500),
    "winogrande_m": (2558, 1267, None),
    "winogrande_s": (640, 1267, None),
}


@pytest.mark.parametrize("task", SIZES)
def test_every_split_reads_and_renders(task: str) -> None:
    for split, size in zip(("train", "validation", "test"), SIZES[task], strict=True):
        if size is None:
            assert not (DATA / task / f"{split}.jsonl").exists()
            continue
        examples = read_source(DATA / task, split)
        assert len(examples) == size
        template = prompt_template("text" if hasattr(examples[0], "text") else "choice")
        for example in examples[:100]:
            assert render(example, template).body
            assert gold_label(example) is not None


@pytest.mark.parametrize(("task", "count"), [("clinc150", 150), ("banking77", 77)])
def test_many_labels_get_distinct_tokens(task: str, count: int) -> None:
    labels = collect_labels(read_source(DATA / task, "test"), exclude={"oos"})
    listed = json.loads((DATA / task / "labels.json").read_text(encoding="utf-8"))["labels"]
    assert labels == tuple(sorted(set(listed) - {"oos"}))
    label_set = resolve_label_tokens(labels, tiny_tokenizer())
    assert len(set(label_set.token_ids)) == len(labels) == count
