"""Metrics on documents written as tags: `nted@donut` and `field_f1@donut`.

The rules are those of Donut (Kim et al. 2022, "OCR-free Document Understanding Transformer";
clovaai/donut, `donut/util.py`, class `JSONParseEvaluator`: `normalize_dict`, `flatten`, `cal_acc`,
`cal_f1`), except where the docstrings say otherwise. Prediction and reference are tagged text and
are read by `raytune_vlm.json_tokens.token2json`, so text without tags is one field named
`text_sequence`, and empty text is the empty document.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from raytune_vlm.evaluate.metrics.base import SampleScore
from raytune_vlm.evaluate.metrics.tree_distance import Tree, num_cells, tree_distance
from raytune_vlm.json_tokens import token2json

MAX_CELLS = 200_000_000
"""Pairs of trees that would take more table cells than this (3 to 7 s) are not compared."""
MAX_DEPTH = 64
"""Documents nested deeper than this are read as text without tags."""


def tree_edit_accuracy(prediction: str, reference: str) -> SampleScore:
    """`nted@donut`: max(0, 1 - distance(prediction, reference) / distance({}, reference)).

    The distance is the edit distance of the two documents as trees; that of the empty document is
    the weight of the reference's tree. The order of list items matters, that of keys does not.

    Three rules of ours. An empty reference scores 1 against an empty prediction and 0 against any
    other (Donut computes 0/0 for the former and arrives at 0). The literal text `<leaf>` in a value
    counts as text (Donut erases it). A pair beyond `MAX_CELLS` that is not equal scores 0; runaway
    predictions seldom get that far, because one of twice the reference's weight is known to score
    0 without comparing: no edit changes the weight by more than it costs.
    """
    predicted, gold = _tree(_document(prediction)), _tree(_document(reference))
    if predicted == gold:
        return SampleScore(1.0)
    weight, predicted_weight = sum(gold.weights) - 1, sum(predicted.weights) - 1
    if predicted_weight >= 2 * weight or num_cells(predicted, gold) > MAX_CELLS:
        return SampleScore(0.0)
    return SampleScore(max(0.0, 1.0 - tree_distance(predicted, gold) / weight))


def field_f1(prediction: str, reference: str) -> SampleScore:
    """`field_f1@donut`: F1 over (path of keys, text) pairs, weighted by the number of pairs.

    With tp pairs in common (each counted as often as it stands in both), value = 2 tp / weight and
    weight = predicted + reference pairs, so the aggregate is Donut's `cal_f1`, which is
    micro-averaged over the corpus: tp / (tp + (fp + fn) / 2). List positions do not matter.

    An empty document predicted as empty has value 1 and weight 0: like in Donut it adds nothing,
    and a corpus of nothing else (where Donut divides by zero) scores 1.
    """
    predicted = Counter(_flatten(_document(prediction)))
    gold = Counter(_flatten(_document(reference)))
    weight = predicted.total() + gold.total()
    if not weight:
        return SampleScore(1.0, 0.0)
    return SampleScore(2 * (predicted & gold).total() / weight, float(weight))


def _document(text: str) -> Any:
    """The normalised document; text nested deeper than `MAX_DEPTH` is one `text_sequence`."""
    try:
        return _normalise(token2json(text))
    except RecursionError:
        return _normalise({"text_sequence": text})


def _normalise(value: Any, depth: int = 0) -> Any:
    """A dict of lists, a list of such dicts, or a list of texts; everything empty left out.

    Keys are ordered by length, then alphabetically. In a list that is not all dicts only the texts
    stay. A value that is no list becomes a list of one.
    """
    if depth > MAX_DEPTH:
        raise RecursionError(f"the document is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        output = {}
        for key in sorted(value, key=lambda key: (len(key), key)):
            child = _normalise(value[key], depth + 1)
            if child:
                output[key] = child if isinstance(child, list) else [child]
        return output
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            items = (_normalise(item, depth) for item in value)
            return [item for item in items if item]
        return [item.strip() for item in value if isinstance(item, str) and item.strip()]
    text = str(value).strip()
    return [text] if text else []


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(keys joined by dots, text) of every text of a normalised document."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flatten(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from _flatten(item, path)
    else:
        yield path, value


def _tree(document: Any) -> Tree:
    """`<root>` over keys over `<subtree>` (a list item) over keys ... over texts."""
    tree = Tree()

    def visit(label: str, value: Any) -> None:
        leftmost = len(tree)
        children = value.items() if isinstance(value, dict) else (("<subtree>", v) for v in value)
        for name, child in children:
            if isinstance(child, str):
                tree.add(child, len(tree), is_leaf=True)
            else:
                visit(name, child)
        tree.add(label, leftmost, is_leaf=False)

    visit("<root>", document)
    return tree
