"""Best-fit-decreasing bin packing on a histogram: which rows to form from pieces of given lengths.

In: how many pieces there are of each length. Out: `Shapes`, the different rows and how often each occurs. Pieces of
one length are alike here; which of them lies where is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from pipeline.data.order import Indices

Runs = tuple[tuple[int, int], ...]  # (length, how many of them) in a row, longest first


@dataclass(frozen=True)
class Shapes:
    """Rows that look alike are one shape, described by runs of slots of one length.

    first_row (S + 1,): shape s makes up rows [first_row[s], first_row[s + 1]). first_run (S + 1,): its runs, likewise.
    length, slots (R,): of a run. ordinal (R,): how many slots of this length there are in rows of earlier shapes; -1
    for the run that pads a row, so that lengths times slots of every shape sum to the size of a row.
    """

    first_row: Indices
    first_run: Indices
    length: Indices
    slots: Indices
    ordinal: Indices


def best_fit(counts: list[int], *, size: int) -> list[tuple[Runs, int]]:
    """Fill rows of `size` with counts[l] pieces of each length l <= size; return the rows' runs and how many are alike.

    From the longest piece to the shortest, each goes to the fullest row that still has room, a new one if none has
    (Johnson 1973: in the worst case 11/9 of the least number of rows). Rows with equal room are served together, so
    that the work depends on the number of lengths and not on that of pieces.
    """
    rows: dict[int, list[tuple[Runs, int]]] = defaultdict(list)  # by the room that is left
    rooms: list[int] = []  # its keys in order
    empty: Runs = ()

    def put(runs: Runs, number: int, room: int) -> None:
        if number and not rows[room]:
            insort(rooms, room)
        if number:
            rows[room].append((runs, number))

    for length in range(size, 0, -1):
        left = counts[length]
        while left:
            at = bisect_left(rooms, length)
            room, runs, number = size, empty, left  # as many empty rows as could be needed
            if at < len(rooms):
                room = rooms[at]
                runs, number = rows[room].pop()
                if not rows[room]:
                    del rooms[at]
            fitting = room // length
            filled = min(number, left // fitting)
            if filled:
                put((*runs, (length, fitting)), filled, room - fitting * length)
                left -= filled * fitting
            else:
                put((*runs, (length, left)), 1, room - left * length)
                left, filled = 0, 1
            if runs:
                put(runs, number - filled, room)
    return [group for room in rooms for group in rows[room]]


def pack_shapes(counts: Indices, *, size: int) -> Shapes:
    """The rows of `size` that hold counts (size + 1,) pieces of each length, and where their slots are numbered."""
    seen = [0] * (size + 1)
    first_row, first_run = [0], [0]
    table: list[tuple[int, int, int]] = []
    for runs, number in best_fit(counts.tolist(), size=size):
        for length, slots in runs:
            table.append((length, slots, seen[length]))
            seen[length] += slots * number
        padding = size - sum(length * slots for length, slots in runs)
        if padding:
            table.append((padding, 1, -1))
        first_row.append(first_row[-1] + number)
        first_run.append(len(table))
    assert seen == counts.tolist(), "packing lost or invented pieces"
    columns = np.array(table, dtype=np.int64).reshape(-1, 3).T
    return Shapes(np.array(first_row), np.array(first_run), length=columns[0], slots=columns[1], ordinal=columns[2])
