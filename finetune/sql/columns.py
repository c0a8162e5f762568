"""Tests whether two results hold the same rows in some order of columns, without trying every order.

Trying all orders takes (number of columns)! comparisons, which is infeasible for twenty columns. Instead, labels of columns
and rows are refined in turn (colour refinement, the usual first step of a graph isomorphism test): the label of a column
follows from its values and the labels of the rows they occur in, the label of a row from its values and the labels of the
columns they occur in, until no label becomes more specific. Columns that still have equal labels are distinguished by pairing
one of each result and refining again.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import count

Columns = list[tuple[int, ...]]
"""The columns of a result, with each value replaced by a number that identifies it in both results."""
Labels = list[int]
"""One number per column. Columns of two results may be paired only if their labels are equal."""


def equal_in_some_column_order(gold: Sequence[tuple[Hashable, ...]], predicted: Sequence[tuple[Hashable, ...]]) -> bool:
    """Whether some order of the predicted columns makes both results the same multiset of rows.

    Both results must have rows, all of the same width. This takes a few passes over all values; only a result constructed
    to be highly symmetric takes more.
    """
    number = _numbering()

    def transposed(rows: Sequence[tuple[Hashable, ...]]) -> Counter[tuple[int, ...]]:
        # Equal columns of one result are interchangeable, so one entry with a count represents them.
        return Counter(tuple(number[value] for value in column) for column in zip(*rows, strict=True))

    gold_columns, predicted_columns = transposed(gold), transposed(predicted)
    label = _numbering()
    gold_labels = [label[times, *sorted(column)] for column, times in gold_columns.items()]
    predicted_labels = [label[times, *sorted(column)] for column, times in predicted_columns.items()]
    return _can_pair(list(gold_columns), gold_labels, list(predicted_columns), predicted_labels)


def _can_pair(gold: Columns, gold_labels: Labels, predicted: Columns, predicted_labels: Labels) -> bool:
    kinds = 0
    while sorted(gold_labels) == sorted(predicted_labels):
        if len(set(gold_labels)) == len(gold):
            return _rows_by_label(gold, gold_labels) == _rows_by_label(predicted, predicted_labels)
        if len(set(gold_labels)) == kinds:
            return _can_pair_by_guessing(gold, gold_labels, predicted, predicted_labels)
        kinds = len(set(gold_labels))
        number = _numbering()
        gold_labels = _refined(gold, gold_labels, number)
        predicted_labels = _refined(predicted, predicted_labels, number)
    return False


def _refined(columns: Columns, labels: Labels, number: defaultdict[Hashable, int]) -> Labels:
    """New labels, which differ where the old ones did, and also where values occur in rows of different labels."""
    rows = [number[_multiset(zip(labels, row, strict=True))] for row in zip(*columns, strict=True)]
    return [
        number[label, _multiset(zip(rows, column, strict=True))] for label, column in zip(labels, columns, strict=True)
    ]


def _can_pair_by_guessing(gold: Columns, gold_labels: Labels, predicted: Columns, predicted_labels: Labels) -> bool:
    sizes = Counter(gold_labels)
    label = min((label for label, size in sizes.items() if size > 1), key=sizes.__getitem__)
    one = _marked(gold_labels, gold_labels.index(label))
    partners = [index for index, other in enumerate(predicted_labels) if other == label]
    return any(_can_pair(gold, one, predicted, _marked(predicted_labels, partner)) for partner in partners)


def _marked(labels: Labels, position: int) -> Labels:
    return [-1 if index == position else label for index, label in enumerate(labels)]


def _rows_by_label(columns: Columns, labels: Labels) -> Counter[tuple[int, ...]]:
    ordered = [column for _, column in sorted(zip(labels, columns, strict=True))]
    return Counter(zip(*ordered, strict=True))


def _multiset(items: "zip[tuple[int, int]]") -> Hashable:
    return frozenset(Counter(items).items())


def _numbering() -> defaultdict[Hashable, int]:
    """Maps equal keys to the same number, counting up in order of appearance."""
    return defaultdict(count().__next__)
