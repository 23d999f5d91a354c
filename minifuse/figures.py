"""Figures of commands: drawn without a screen, written as their name's end says."""

from pathlib import Path
from typing import TYPE_CHECKING

from minifuse.errors import MinifuseError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_figure(width: float, height: float, flag: str) -> "Figure":
    """An empty figure; sizes in inches.

    flag:   what asked for it
    raises: MinifuseError where matplotlib is missing
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MinifuseError(
            f"{flag} needs matplotlib, which is not installed; pip install 'minifuse[eval]'"
        ) from None
    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as SVG, PNG or PDF.

    raises: MinifuseError where the file cannot be written
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise MinifuseError(f"{path} cannot be written: {error.strerror}") from None
