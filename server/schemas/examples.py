"""Requests shown in the OpenAPI document; a test sends every one of them."""

__all__ = ["CLASSIFY_EXAMPLES", "EVALUATE_EXAMPLES", "INFER_EXAMPLES", "PREDICT_EXAMPLES"]

CLASSIFY_EXAMPLES: dict[str, dict[str, object]] = {
    "one_text": {
        "summary": "One text",
        "value": {"input": "transfer 100 dollars from checking to savings"},
    },
    "several_texts": {
        "summary": "Several texts, three best labels each",
        "value": {"input": ["my card was charged twice", "what's the weather"], "top_k": 3},
    },
    "ids": {
        "summary": "Texts with ids, cut at the end when too long",
        "value": {
            "input": [{"id": "ticket-1", "text": "I lost my card"}],
            "truncate": "end",
            "metadata": {"tenant": "acme"},
        },
    },
    "samples": {
        "summary": "Four posterior samples, shown one by one",
        "value": {
            "input": "book a table for two",
            "num_samples": 4,
            "seed": 1,
            "include": ["samples", "timings"],
        },
    },
    "mean_mask": {
        "summary": "One deterministic pass, without epistemic scores",
        "value": {"input": "book a table for two", "estimator": "mean_mask"},
    },
    "policy_limits": {
        "summary": "Limits of your own, without a guarantee",
        "value": {
            "input": "book a table for two",
            "policy": {"min_confidence": 0.9, "abstain": {"max_predictive_entropy": 1.0}},
        },
    },
    "question": {
        "summary": "Multiple choice (needs a multiple-choice adapter)",
        "value": {
            "input": {
                "question": "Which of these is a mammal?",
                "choices": ["trout", "whale", "lizard"],
            }
        },
    },
    "questions": {
        "summary": "Questions with a context and labels of their own (likewise)",
        "value": {
            "input": [
                {
                    "id": "q1",
                    "question": "is the sky blue",
                    "context": "On a clear day the sky looks blue.",
                    "choices": [
                        {"label": "A", "text": "yes"},
                        {"label": "B", "text": "no"},
                    ],
                }
            ]
        },
    },
}

EVALUATE_EXAMPLES: dict[str, dict[str, object]] = {
    "limits": {
        "summary": "Limits of your own, with a tenth of the questions out of scope",
        "value": {
            "policy": {"min_confidence": 0.9, "abstain": {"max_predictive_entropy": 1.0}},
            "out_of_scope_share": 0.1,
        },
    },
    "named": {
        "summary": "A policy of the adapter",
        "value": {"policy": {"name": "default"}, "delta": 0.05},
    },
}

PREDICT_EXAMPLES: dict[str, dict[str, object]] = {
    "one_text": {"summary": "One text", "value": {"inputs": "I lost my card"}},
    "batch": {
        "summary": "Two texts, cut at the end when too long",
        "value": {
            "inputs": [["my card was charged twice"], ["what's the weather"]],
            "truncate": True,
        },
    },
}

INFER_EXAMPLES: dict[str, dict[str, object]] = {
    "one_text": {
        "summary": "One text",
        "value": {
            "inputs": [
                {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["I lost my card"]}
            ]
        },
    },
    "some_outputs": {
        "summary": "Two texts in one column, two of the outputs, four posterior samples",
        "value": {
            "id": "42",
            "parameters": {"num_samples": 4, "seed": 1},
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [2, 1],
                    "data": [["my card was charged twice"], ["what's the weather"]],
                }
            ],
            "outputs": [{"name": "label"}, {"name": "decision"}],
        },
    },
}
