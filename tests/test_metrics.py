"""Metrics: one conformance suite over the table, then each variant against its own rule."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_vlm.config.evaluation import METRIC_MODES
from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.metrics import METRICS, SampleScore
from raytune_vlm.evaluate.metrics.tree_distance import Tree, tree_distance
from raytune_vlm.json_tokens import json2token

NTED = METRICS["nted@donut"]
F1 = METRICS["field_f1@donut"]
EXACT = METRICS["exact_match@strip"]
CER = METRICS["cer@micro"]

TEA = "<s_menu><s_nm>TEA</s_nm><s_cnt>2</s_cnt></s_menu>"
TEXTS = [
    "",
    " \n",
    "plain text",
    "شاي بالنعناع",
    "抹茶ラテ",
    "e\u0301",
    "\ud800 lone surrogate",
    "\x00",
    TEA,
    "<s_menu><s_nm>TEA</s_nm><sep/><s_nm>BUN</s_nm></s_menu>",
    "<s_a>x</s_a><sep/><s_a>y</s_a>",
    "<s_open><s_menu>TEA",
    "</s_menu><sep/><s_></s_>",
    "<s_a></s_a>",
]
GARBAGE = {
    "text": "z" * 20_000,
    "unclosed tags": "<s_a>" * 4_000,
    "broken tags": "<s_" * 3_000,
    "deep": "".join(f"<s_{n}>" for n in range(1_500))
    + "x"
    + "".join(f"</s_{n}>" for n in reversed(range(1_500))),
    "list of texts": "<s_a>" + "x<sep/>" * 2_850 + "</s_a>",
    "list of fields": "<s_nm>x</s_nm><sep/>" * 1_000,
}


NOT_EQUALITY = {
    "cider@coco": "a corpus of one sample scores 0",
    "bleu1@coco": "a text without words scores 0",
    "bleu2@coco": "a text of one word scores 0",
    "bleu3@coco": "a text of two words scores 0",
    "bleu4@coco": "a text of three words scores 0",
    "json_valid@strict": "the answer does not matter",
    "medical_closed@llava_med": "the prediction must say yes or no",
}
"""Metrics that do not give every text full marks against itself, and why."""
COUNTS_REPETITION = {"medical_open@llava_med_recall", "medical_open@llava_med_f1"}
ANNOTATORS = {name for name in METRICS if name.startswith("vqa@")}
MOST = {"cider@coco": 10.0}


# The contract, for every entry of the table.


def test_table_matches_the_config() -> None:
    assert {name: metric.mode for name, metric in METRICS.items()} == METRIC_MODES
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("name", [name for name in METRICS if name not in NOT_EQUALITY])
def test_identical_texts_score_best(name: str) -> None:
    best = 1.0 if METRICS[name].mode == "max" else 0.0
    for text in TEXTS:
        assert METRICS[name].score(text, [text]).value == best


@pytest.mark.parametrize("name", METRICS)
def test_any_two_texts_have_a_finite_score(name: str) -> None:
    for prediction in TEXTS:
        for reference in TEXTS:
            score = METRICS[name].score(prediction, [reference])
            assert isinstance(score, SampleScore)
            assert 0 <= score.value < float("inf")
            assert 0 <= score.weight < float("inf")
            assert METRICS[name].mode == "min" or score.value <= MOST.get(name, 1)


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.timeout(5)
def test_garbage_is_scored_in_time(name: str, kind: str) -> None:
    reference = "<s_menu>" + "<sep/>".join(["<s_nm>TEA</s_nm><s_cnt>2</s_cnt>"] * 30) + "</s_menu>"
    score = METRICS[name].score(GARBAGE[kind], [reference])
    assert score.value < 0.1 or METRICS[name].mode == "min" or name in COUNTS_REPETITION
    assert score.value > 0.9 or METRICS[name].mode == "max"


@pytest.mark.parametrize("name", METRICS)
def test_missing_prediction_is_empty_text(name: str) -> None:
    missing: list[Any] = [None, float("nan")]
    for value in missing:
        assert METRICS[name].score(value, [TEA]) == METRICS[name].score("", [TEA])


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ANNOTATORS])
def test_best_reference_counts(name: str) -> None:
    alone = METRICS[name].score(TEA, [TEA])
    assert METRICS[name].score(TEA, ["other", TEA, "<s_a>1</s_a>"]) == alone


@pytest.mark.parametrize("name", METRICS)
def test_reference_is_required(name: str) -> None:
    with pytest.raises(EvaluationError, match="at least one reference"):
        METRICS[name].score(TEA, [])
    with pytest.raises(EvaluationError, match="list"):
        METRICS[name].score(TEA, TEA)


# Plain text.


def test_exact_match_strips_only() -> None:
    assert EXACT.score(" 42\n", ["42"]).value == 1
    assert EXACT.score("Yes", ["yes"]).value == 0
    assert EXACT.score("é", ["e\u0301"]).value == 0


def test_cer_is_the_corpus_rate() -> None:
    scores = [CER.score("abc", ["abd"]), CER.score("", ["x"]), CER.score(" abcde ", ["abcde"])]
    total = sum(score.value * score.weight for score in scores)
    assert total / sum(score.weight for score in scores) == pytest.approx(2 / 9)


def test_cer_of_an_empty_reference_counts_what_was_invented() -> None:
    assert CER.score("abc", [""]) == SampleScore(3.0, 1.0)
    assert CER.score("", [" "]) == SampleScore(0.0, 1.0)


def test_cer_counts_code_points() -> None:
    assert CER.score("شاي", ["شاى"]).value == pytest.approx(1 / 3)
    assert CER.score("é", ["e\u0301"]) == SampleScore(1.0, 2.0)


# Documents.


@pytest.mark.parametrize(
    ("prediction", "accuracy"),
    [
        (TEA, 1.0),
        ("<s_menu><s_cnt>2</s_cnt><s_nm>TEA</s_nm></s_menu>", 1.0),  # keys have no order
        ("<s_menu><s_nm>TEE</s_nm><s_cnt>2</s_cnt></s_menu>", 1 - 1 / 8),  # one character
        ("<s_menu><s_nm>TEA</s_nm></s_menu>", 1 - 2 / 8),  # cnt and its text
        ("<s_menu><s_nn>TEA</s_nn><s_cnt>2</s_cnt></s_menu>", 1 - 1 / 8),  # one key
        ("", 0.0),
        ("TEA", 1 - 5 / 8),  # as in Donut, text without tags is a field: 3 characters and a node
    ],
)
def test_tree_accuracy_by_hand(prediction: str, accuracy: float) -> None:
    """The reference's tree weighs menu 1 + <subtree> 1 + nm 1 + TEA 3 + cnt 1 + "2" 1 = 8."""
    assert NTED.score(prediction, [TEA]).value == pytest.approx(accuracy, abs=1e-12)


def test_tree_accuracy_depends_on_list_order_and_fields_do_not() -> None:
    first = json2token({"menu": [{"nm": "TEA"}, {"nm": "BUN"}]})
    second = json2token({"menu": [{"nm": "BUN"}, {"nm": "TEA"}]})
    assert NTED.score(first, [second]).value < 1
    assert F1.score(first, [second]).value == 1


def test_pairs_too_large_to_compare_score_zero_unless_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = "<s_menu><s_nm>TEE</s_nm><s_cnt>2</s_cnt></s_menu>"
    monkeypatch.setattr("raytune_vlm.evaluate.metrics.cord.MAX_CELLS", 10)
    assert NTED.score(other, [TEA]).value == 0
    assert NTED.score(TEA, [TEA]).value == 1


def test_empty_documents() -> None:
    assert NTED.score("", [""]).value == 1
    assert NTED.score("<s_a>x</s_a>", [""]).value == 0
    assert F1.score("", ["<s_a></s_a>"]) == SampleScore(1.0, 0.0)
    assert F1.score("<s_a>x</s_a>", [""]) == SampleScore(0.0, 1.0)


def test_field_f1_counts_repeated_fields_once_each() -> None:
    prediction = json2token({"nm": ["TEA", "TEA", "BUN"]})
    reference = json2token({"nm": ["TEA", "BUN", "HAM", "JAM"]})
    assert F1.score(prediction, [reference]) == SampleScore(4 / 7, 7.0)


def test_field_f1_adds_up_to_the_micro_average() -> None:
    generator = random.Random(0)
    corpus = [
        tuple(Counter(generator.choices("abcd", k=generator.randint(0, 6))) for _ in range(2))
        for _ in range(50)
    ]
    common = sum((first & second).total() for first, second in corpus)
    missed = sum((first - second).total() + (second - first).total() for first, second in corpus)
    scores = [
        F1.score(
            json2token({"k": list(predicted.elements())}),
            [json2token({"k": list(gold.elements())})],
        )
        for predicted, gold in corpus
    ]
    micro = sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)
    assert micro == pytest.approx(common / (common + missed / 2))


# The tree edit distance.

Nested = tuple[str, bool, tuple["Nested", ...]]
LEAVES = st.text("ab", min_size=1, max_size=3).map(lambda text: (text, True, ()))
NODES = st.recursive(
    LEAVES,
    lambda children: st.tuples(
        st.sampled_from("xy"), st.just(False), st.lists(children, max_size=3).map(tuple)
    ),
    max_leaves=4,
)


def to_tree(nested: Nested) -> Tree:
    tree = Tree()

    def visit(node: Nested) -> None:
        leftmost = len(tree)
        for child in node[2]:
            visit(child)
        tree.add(node[0], leftmost, is_leaf=node[1])

    visit(nested)
    return tree


def weight(node: Nested) -> int:
    return len(node[0]) if node[1] else 1


def by_definition(first: tuple[Nested, ...], second: tuple[Nested, ...], memo: Any) -> int:
    """The textbook recursion on forests: remove, insert or match the two rightmost roots."""
    if (first, second) in memo:
        return int(memo[first, second])
    if not first and not second:
        return 0
    costs = []
    if first:
        inside = (*first[:-1], *first[-1][2])
        costs.append(by_definition(inside, second, memo) + weight(first[-1]))
    if second:
        inside = (*second[:-1], *second[-1][2])
        costs.append(by_definition(first, inside, memo) + weight(second[-1]))
    if first and second:
        one, other = first[-1], second[-1]
        if one[1] and other[1]:
            update = round(CER.compare(one[0], other[0]).value * len(other[0]))
        elif one[1] or other[1]:
            update = 1 + len(one[0] if one[1] else other[0])
        else:
            update = int(one[0] != other[0])
        below = by_definition(one[2], other[2], memo)
        costs.append(by_definition(first[:-1], second[:-1], memo) + below + update)
    memo[first, second] = min(costs)
    return min(costs)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(NODES, NODES)
def test_tree_distance_is_the_textbook_recursion(first: Nested, second: Nested) -> None:
    distance = tree_distance(to_tree(first), to_tree(second))
    assert distance == by_definition((first,), (second,), {})
    assert distance == tree_distance(to_tree(second), to_tree(first))
    assert distance >= abs(sum(to_tree(first).weights) - sum(to_tree(second).weights))


def test_levels_put_roots_after_those_they_contain() -> None:
    tree = to_tree(
        ("x", False, (("a", True, ()), ("y", False, (("b", True, ()), ("a", True, ())))))
    )
    assert tree.key_roots == [2, 3, 4]
    assert tree.levels == [[2], [3], [4]]
