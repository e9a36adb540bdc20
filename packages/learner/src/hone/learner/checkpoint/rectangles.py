"""A range of a flattened block of columns as rectangles of the whole matrix, so that one cut of a matrix can be read as any other."""

from collections.abc import Iterator
from dataclasses import dataclass

from hone.learner.checkpoint.pieces import Columns


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Rows top .. bottom and columns left .. right of a matrix; its first element stands at `offset` of the range it is of."""

    top: int
    bottom: int
    left: int
    right: int
    offset: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def numel(self) -> int:
        """Elements."""
        return (self.bottom - self.top) * self.width

    def meets(self, other: "Rectangle") -> "Rectangle | None":
        """What both have (its offset means nothing), or None."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rectangle(top=top, bottom=bottom, left=left, right=right, offset=0) if top < bottom and left < right else None


def rectangles(start: int, numel: int, columns: Columns) -> Iterator[Rectangle]:
    """Elements start .. start + numel of the flattened columns: the rest of a first row, whole rows, the beginning of a last one."""
    low, high = columns
    width, end, at = high - low, start + numel, start
    while at < end:
        row, column = divmod(at, width)
        if column or end - at < width:
            stop = min(end, (row + 1) * width)
            yield Rectangle(top=row, bottom=row + 1, left=low + column, right=low + column + stop - at, offset=at - start)
        else:
            stop = end - end % width
            yield Rectangle(top=row, bottom=stop // width, left=low, right=high, offset=at - start)
        at = stop
