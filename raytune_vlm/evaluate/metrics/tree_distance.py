"""The edit distance between two ordered labelled trees.

The algorithm is that of K. Zhang and D. Shasha 1989, "Simple fast algorithms for the editing
distance between trees and related problems", SIAM Journal on Computing 18(6): forest distances for
every pair of key roots. The costs are those of Donut (clovaai/donut, `donut/util.py`,
`JSONParseEvaluator`): see `Tree.weights` and `_update_costs`.

Rows of the forest tables are computed as arrays: the minimum over insertions within a row is a
running minimum, and key roots of the second tree that do not contain each other share one row.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

Integers = NDArray[np.int64]


@dataclass
class Tree:
    """An ordered tree as lists in post-order (children before their parent, the root last)."""

    labels: list[str] = field(default_factory=list)
    is_leaf: list[bool] = field(default_factory=list)
    """Whether the node is a text; the other nodes are keys, list items and the root."""
    leftmost: list[int] = field(default_factory=list)
    """The index of each node's leftmost descendant, itself if it has no children."""

    def add(self, label: str, leftmost: int, *, is_leaf: bool) -> None:
        """Append the next node in post-order."""
        self.labels.append(label)
        self.is_leaf.append(is_leaf)
        self.leftmost.append(leftmost)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def weights(self) -> list[int]:
        """What inserting or removing each node costs: the characters of a text, 1 for others."""
        pairs = zip(self.labels, self.is_leaf, strict=True)
        return [len(label) if is_leaf else 1 for label, is_leaf in pairs]

    @cached_property
    def key_roots(self) -> list[int]:
        """The last node of each leftmost descendant, ascending."""
        return sorted({left: node for node, left in enumerate(self.leftmost)}.values())

    @cached_property
    def levels(self) -> list[list[int]]:
        """The key roots by how many other key roots contain them, the innermost first."""
        levels: list[list[int]] = []
        around: list[int] = []
        for root in reversed(self.key_roots):
            while around and self.leftmost[around[-1]] > root:
                around.pop()
            if len(around) == len(levels):
                levels.append([])
            levels[len(around)].append(root)
            around.append(root)
        return levels[::-1]

    @cached_property
    def num_rows(self) -> int:
        """How many rows the forest tables of all key roots have together."""
        return sum(root - self.leftmost[root] + 1 for root in self.key_roots)


def num_cells(first: Tree, second: Tree) -> int:
    """How many table cells `tree_distance` computes: its cost, at 15 to 35 ns a cell."""
    return first.num_rows * second.num_rows


def tree_distance(first: Tree, second: Tree) -> int:
    """The least total cost of insertions, removals and updates that turns one tree into the other.

    Symmetric; never below `abs(sum(first.weights) - sum(second.weights))`. Memory is about
    40 bytes x `len(first)` x `len(second)`.
    """
    if first.num_rows * len(second.levels) > second.num_rows * len(first.levels):
        first, second = second, first
    bound = 2 * (sum(first.weights) + sum(second.weights)) + 1
    updates = _update_costs(first, second)
    distances = np.zeros((len(first), len(second)), dtype=np.int64)
    levels = [_Level.of(second, roots, bound) for roots in second.levels]
    for root in first.key_roots:
        for level in levels:
            level.fill(first, root, updates, distances)
    return int(distances[-1, -1])


def _update_costs(first: Tree, second: Tree) -> Integers:
    """The cost [len(first), len(second)] of turning one node into another, after Donut.

    Two texts: their Levenshtein distance. A text and another node: 1 + the length of the text. Two
    other nodes: 0 if their labels are equal, else 1.
    """
    texts_a, texts_b = np.array(first.is_leaf), np.array(second.is_leaf)
    costs = 1 + np.where(texts_a[:, None], np.array(first.weights)[:, None], second.weights)
    both = np.ix_(texts_a, texts_b)
    labels_a, labels_b = np.array(first.labels, object), np.array(second.labels, object)
    if texts_a.any() and texts_b.any():
        scorer = Levenshtein.distance
        costs[both] = cdist(labels_a[texts_a], labels_b[texts_b], scorer=scorer, dtype=np.int64)
    neither = np.ix_(~texts_a, ~texts_b)
    costs[neither] = labels_a[~texts_a][:, None] != labels_b[~texts_b]
    return np.asarray(costs, dtype=np.int64)


@dataclass(frozen=True)
class _Level:
    """Key roots of the second tree that do not contain each other, laid side by side.

    Each root has one segment of cells: an empty forest, then its nodes in post-order.
    """

    nodes: Integers
    """[cells] The node that each cell adds to the forest."""
    before: Integers
    """[cells] The cell of the forest that is left when the node's whole subtree is taken away."""
    starts: Integers
    """[roots] The empty forests."""
    spine: Integers
    """The cells whose forest is a single tree."""
    inserted: Integers
    """[cells] The cost of inserting the whole forest."""
    shift: Integers
    """[cells] `inserted` plus a step a segment, so that a running minimum restarts at each."""
    bound: int
    """More than any distance."""

    @classmethod
    def of(cls, tree: Tree, roots: list[int], bound: int) -> "_Level":
        leftmost, weights = np.array(tree.leftmost), np.array(tree.weights)
        ranges = [np.arange(leftmost[root] - 1, root + 1) for root in roots]
        sizes = np.array([len(cells) for cells in ranges])
        segment = np.repeat(np.arange(len(roots)), sizes)
        starts = np.cumsum(sizes) - sizes
        first = leftmost[np.array(roots)][segment]
        nodes = np.concatenate(ranges)
        nodes[starts] = 0
        before = starts[segment] + leftmost[nodes] - first
        before[starts] = starts
        on_spine = leftmost[nodes] == first
        on_spine[starts] = False
        added = weights[nodes]
        added[starts] = 0
        total = np.cumsum(added)
        inserted = total - total[starts][segment]
        return cls(
            nodes=nodes,
            before=before,
            starts=starts,
            spine=np.flatnonzero(on_spine),
            inserted=inserted,
            shift=inserted + segment * bound,
            bound=bound,
        )

    def fill(self, tree: Tree, root: int, updates: Integers, distances: Integers) -> None:
        """Compute the forest tables of one key root of the first tree; store the tree distances."""
        left = tree.leftmost[root]
        table = np.empty((root - left + 2, len(self.nodes)), dtype=np.int64)
        table[0] = self.inserted
        spine_nodes = self.nodes[self.spine]
        for row, node in enumerate(range(left, root + 1), start=1):
            previous = table[row - 1]
            matched = table[tree.leftmost[node] - left][self.before] + distances[node][self.nodes]
            matched[self.starts] = self.bound
            is_tree = tree.leftmost[node] == left
            if is_tree:
                matched[self.spine] = previous[self.spine - 1] + updates[node][spine_nodes]
            np.minimum(previous + tree.weights[node], matched, out=matched)
            matched -= self.shift
            np.add(np.minimum.accumulate(matched), self.shift, out=table[row])
            if is_tree:
                distances[node, spine_nodes] = table[row][self.spine]
