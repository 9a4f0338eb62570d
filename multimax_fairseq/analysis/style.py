"""Colours and sizes of all the project's figures. A mapping has one colour everywhere; this imports nothing heavy.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; lines also differ in style or marker.
"""

from zlib import crc32

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#595959"

MAPPING_COLOURS = {
    "softmax": GREY,
    "multimax": BLUE,
    "sparsemax": VERMILLION,
    "entmax15": GREEN,
    "entmax": ORANGE,
    "evsoftmax": PURPLE,
}
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

ONE_COLUMN, TWO_COLUMNS = 3.3, 7.0  # inch, of a paper
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "figure.dpi": 200,
    "svg.fonttype": "none",  # text as text, which can be edited and searched
    "pdf.fonttype": 42,
    "svg.hashsalt": "multimax-analyze",  # the same picture gives the same file
    "text.parse_math": False,  # labels are any text; and a second font takes as long to write into a PDF as the rest
}


def colour_of(mapping: str) -> str:
    """The colour of a mapping by its name; a registered one gets one of two, by its name too."""
    return MAPPING_COLOURS.get(mapping) or (SKY, BLACK)[crc32(mapping.encode()) % 2]
