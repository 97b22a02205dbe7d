"""What all pictures share: matplotlib figures without a display."""

from pathlib import Path

from opd.records import BadInput

# safe for the colour-blind
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#555555",
    "#8C6D31",
)


def refuse_existing(out, overwrite):
    """Refuses to replace a file unless told to; makes its folder."""
    if Path(out).exists() and not overwrite:
        raise BadInput(
            f"{out}: exists already: give another --out, or --overwrite to replace it"
        )
    Path(out).parent.mkdir(parents=True, exist_ok=True)


def check_picture(out, overwrite):
    """refuse_existing, and a name that is no picture's."""
    if Path(out).suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"{out}: expected a name that ends in .png, .svg or .pdf")
    refuse_existing(out, overwrite)


def new_picture(width, height):
    """An empty matplotlib figure, inches."""
    try:
        # no pyplot: a Figure draws with Agg, whatever the machine's display
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise BadInput("plots need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def tidy(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
