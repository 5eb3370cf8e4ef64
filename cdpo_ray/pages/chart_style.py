"""Style of all charts."""

# Okabe and Ito's palette, which colour-blind readers can distinguish; the base model is grey, as the baseline.
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#767676"
INK, FAINT = "#333333", "#D9D9D9"

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cdpo_ray",  # makes the output deterministic
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
