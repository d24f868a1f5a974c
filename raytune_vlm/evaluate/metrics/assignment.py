"""The cheapest assignment of rows to columns."""

import numpy as np
from numpy.typing import NDArray


def assign(costs: NDArray[np.float64]) -> list[tuple[int, int]]:
    """(row, column) pairs of the least total cost, as many as the shorter side has, by row.

    Kuhn 1955 and Munkres 1957, in the form with shortest augmenting paths (Jonker and Volgenant
    1987): rows x rows x columns steps.

    Parameters
    ----------
    costs
        [rows, columns], finite.
    """
    if costs.shape[0] > costs.shape[1]:
        return sorted((row, column) for column, row in assign(costs.T))
    num_rows, num_columns = costs.shape
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns + 1)
    owner = np.full(num_columns + 1, -1)  # the last column is where each new row starts
    for row in range(num_rows):
        owner[num_columns] = row
        column = num_columns
        distance = np.full(num_columns, np.inf)
        before = np.full(num_columns, -1)
        seen = np.zeros(num_columns + 1, dtype=bool)
        while owner[column] >= 0:
            seen[column] = True
            here = owner[column]
            open_columns = ~seen[:-1]
            reduced = costs[here] - row_price[here] - column_price[:-1]
            nearer = open_columns & (reduced < distance)
            distance[nearer] = reduced[nearer]
            before[nearer] = column
            step = distance[open_columns].min()
            column = int(np.flatnonzero(open_columns)[distance[open_columns].argmin()])
            row_price[owner[seen]] += step
            column_price[seen] -= step
            distance[open_columns] -= step
        while column != num_columns:
            owner[column] = owner[before[column]]
            column = int(before[column])
    return sorted(
        (int(owner[column]), column) for column in range(num_columns) if owner[column] >= 0
    )
