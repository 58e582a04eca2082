"""Tables of results for any width: where figures would be cut, texts stand below their row."""

from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

BETWEEN = 3
"""Spaces that a column takes besides its cells."""
LEAST_WORDS = 36
"""Width that a column of text takes at least, unless it needs less."""


class Listing(Table):
    """A table whose columns of figures (`no_wrap`) are always seen whole."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, or rows with their texts below them."""
        widths = [_width(column) for column in self.columns]
        needed = [
            width if column.no_wrap else min(width, LEAST_WORDS)
            for column, width in zip(self.columns, widths, strict=True)
        ]
        if sum(needed) + BETWEEN * len(needed) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        yield Text.from_markup(str(self.title or ""), style="table.title")
        yield from self._rows(options.max_width)
        if self.caption:
            yield Text.from_markup(str(self.caption), style="table.caption")
        yield Text()

    def _rows(self, width: int) -> Iterator[RenderableType]:
        """Yield rows: figures below their names, texts below them.

        Where that does not fit either, texts come first and figures stand beside their names.
        """
        figures = [column for column in self.columns if column.no_wrap]
        texts = [column for column in self.columns if not column.no_wrap]
        names = [str(column.header) for column in figures]
        widths = [_width(column) for column in figures]
        fits = sum(widths) + 2 * (len(widths) - 1) <= width
        if fits:
            yield Text(_aligned(names, widths), style="table.header")
        for number, row in enumerate(self.rows):
            cells = [_plain(column, number) for column in figures]
            words = [list(column.cells)[number] for column in texts]
            text = Text("  ").join(Text.from_markup(str(each)) for each in words if str(each))
            style = row.style or ""
            if fits:
                yield Text(_aligned(cells, widths), style=style)
            if text:
                yield Padding(text, (0, 0, 0, 4 if fits else 0))
            if not fits:
                paired = Text(_paired(names, cells, width - 4), style=style)
                yield Padding(paired, (0, 0, 0, 4))


def _plain(column: Column, number: int) -> str:
    return Text.from_markup(str(list(column.cells)[number])).plain


def _width(column: Column) -> int:
    """Return the width of a column's longest line."""
    cells = [Text.from_markup(str(cell)).plain for cell in (column.header, *column.cells)]
    return max(cell_len(line) for cell in cells for line in [*cell.splitlines(), ""])


def _paired(names: list[str], cells: list[str], width: int) -> str:
    """Return figures beside their names, in lines that break between them alone."""
    lines = [""]
    for name, cell in zip(names, cells, strict=True):
        longer = f"{lines[-1]}  {name} {cell}" if lines[-1] else f"{name} {cell}"
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(f"{name} {cell}")
    return "\n".join(lines)


def _aligned(cells: list[str], widths: list[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
