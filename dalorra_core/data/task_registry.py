"""The names of tasks and what they stand for: data sets, splits, labels, prompt; reads nothing.

The published protocol's tasks, its combined sets, those it is tried on after a shift, and small
sets of texts for runs with few rows.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from dalorra_core.data.encode import Truncation
from dalorra_core.data.prompts import PromptKind
from dalorra_core.errors import ConfigError

__all__ = ["TASKS", "Task", "TaskSource", "find_task"]


@dataclass(frozen=True)
class TaskSource:
    """One data set of a task.

    Attributes:
        folder: Its folder under the root.
        evaluation_split: Split that is reported.
        train_split: Split to train on; None where there is none.
        held_out_split: Split to tune on that is neither; None holds rows out of the training rows.
    """

    folder: str
    evaluation_split: str = "validation"
    train_split: str | None = "train"
    held_out_split: str | None = None


@dataclass(frozen=True)
class Task:
    """What a name stands for.

    Attributes:
        name: Its name.
        kind: ``text`` or ``choice``.
        sources: Data sets, whose rows are put one after the other.
        labels: Labels in the order of the probabilities; None for those of the folder's
            ``labels.json``, in alphabetical order.
        reserved: Labels that no row of this task has, for tasks that its adapter is tried on.
        domain: Group of labels in ``labels.json``; None for all but the out-of-scope label.
        selects: Whether rows with other labels are left out, or are an error when encoded.
        prompt: Template; None for the default of the kind.
        compat_prompt: What the prompt family ``rl_compat`` means here; None: just that.
        truncate: How a prompt over the limit is cut.
        train_rows: Training rows of a low-data run; None for all.
        per_class: Training rows of each class of a low-data run; None for all.
        note: What a reader of its numbers should know.
    """

    name: str
    kind: PromptKind
    sources: tuple[TaskSource, ...]
    labels: tuple[str, ...] | None = None
    reserved: tuple[str, ...] = ()
    domain: str | None = None
    selects: bool = False
    prompt: str | None = None
    compat_prompt: str | None = None
    truncate: Truncation = "start"
    train_rows: int | None = None
    per_class: int | None = None
    note: str = ""

    @property
    def is_for_evaluation_only(self) -> bool:
        """Whether there is nothing to train on."""
        return all(source.train_split is None for source in self.sources)


_WG_S = TaskSource("winogrande_s")
_WG_M = TaskSource("winogrande_m")
_ARC_C = TaskSource("arc_challenge")
_ARC_E = TaskSource("arc_easy")
_OBQA = TaskSource("openbookqa")
_BOOLQ = TaskSource("boolq")
_LETTERS = ("A", "B", "C", "D", "E")
_WORDS = ("True", "False")
_CLINC = TaskSource("clinc150", evaluation_split="test", held_out_split="validation")
_CLINC_DOMAINS = (
    "auto_and_commute",
    "banking",
    "credit_cards",
    "home",
    "kitchen_and_dining",
    "meta",
    "small_talk",
    "travel",
    "utility",
    "work",
)
_TWICE = "winogrande_s is part of winogrande_m and both share one evaluation file"

_PUBLISHED = (
    Task("winogrande_s", "choice", (_WG_S,), ("A", "B"), compat_prompt="rl_compat_plain"),
    Task("winogrande_m", "choice", (_WG_M,), ("A", "B"), compat_prompt="rl_compat_plain"),
    Task("arc_challenge", "choice", (_ARC_C,), _LETTERS, note="3 to 5 choices"),
    Task("arc_easy", "choice", (_ARC_E,), _LETTERS, note="3 to 5 choices"),
    Task(
        "openbookqa",
        "choice",
        (_OBQA,),
        ("A", "B", "C", "D"),
        reserved=("E",),
        compat_prompt="rl_compat_obqa",
        note="E is never a choice here; ARC has it, on which the same adapter is tried",
    ),
    Task("boolq", "choice", (_BOOLQ,), _WORDS),
)
_COMBINED = (
    Task("aao", "choice", (_ARC_E, _ARC_C, _OBQA), _LETTERS),
    Task("wb", "choice", (_WG_M, _BOOLQ), ("A", "B", *_WORDS), compat_prompt="rl_compat_plain"),
    Task(
        "combined",
        "choice",
        (_WG_S, _ARC_C, _ARC_E, _WG_M, _OBQA, _BOOLQ),
        (*_LETTERS, *_WORDS),
        note=f"{_TWICE}: 640 training and 1267 evaluation rows are there twice",
    ),
)
_SHIFTED = tuple(
    Task(
        name,
        "choice",
        (TaskSource(name, "test", train_split=None),),
        ("A", "B", "C", "D"),
        compat_prompt="rl_compat_plain",
        note=note,
    )
    for name, note in (
        ("mmlu_college_chemistry", ""),
        ("mmlu_college_physics", "11 of the 102 questions are repeats"),
    )
)
_TEXTS = (
    Task(
        "sst2",
        "text",
        (TaskSource("sst2", "test", held_out_split="validation"),),
        prompt="{text}\nSentiment:",
        truncate="end",
        train_rows=640,
    ),
    Task(
        "trec",
        "text",
        (TaskSource("trec", "test"),),
        prompt="{text}\nAnswer type:",
        truncate="end",
        train_rows=640,
    ),
    Task(
        "sms_spam",
        "text",
        (TaskSource("sms_spam", "test"),),
        prompt="{text}\nLabel:",
        truncate="end",
        train_rows=640,
        note="336 training and 78 test messages are repeats",
    ),
    Task("banking77", "text", (TaskSource("banking77", "test"),), truncate="end", per_class=10),
    Task("clinc150", "text", (_CLINC,), selects=True, truncate="end", per_class=10),
    *(
        Task(
            f"clinc150_{domain}",
            "text",
            (_CLINC,),
            domain=domain,
            selects=True,
            truncate="end",
            per_class=10,
        )
        for domain in _CLINC_DOMAINS
    ),
    Task(
        "clinc150_oos",
        "text",
        (TaskSource("clinc150", "test", train_split=None),),
        ("oos",),
        selects=True,
        truncate="end",
        note="the out-of-scope rows",
    ),
    Task("ag_news", "text", (TaskSource("ag_news", "test", train_split=None),), truncate="end"),
)

TASKS: Mapping[str, Task] = {
    task.name: task for task in (*_PUBLISHED, *_COMBINED, *_SHIFTED, *_TEXTS)
}


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ConfigError: There is none of that name; says which there are.

    Example:
        >>> find_task("boolq").labels
        ('True', 'False')
    """
    found = TASKS.get(name)
    if found is None:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; the closest is {close[0]!r}" if close else ""
        raise ConfigError(f"a task must be one of {', '.join(TASKS)}, got {name!r}{hint}")
    return found
