"""The colours of all pictures: an optimizer has one everywhere, told from the others without colour sense, too."""

INK, SOFT, GRID, WRONG = "#22223b", "#b8b8c8", "#e6e6ee", "#c1121f"
OPTIMIZERS = {
    "eta": "#d55e00",
    "zeta": "#0072b2",
    "muon": "#009e73",
    "normuon": "#cc79a7",
    "adamw": "#8a8a99",
    "adamuon": "#56b4e9",
    "soap": "#e6b800",
}
OTHERS = ("#7a6bd1", "#8a6d4b", "#3f6f5f", "#a04060", "#5b7fa6", "#9aa02c", "#444455", "#b08fc7")
BEFORE, AFTER = "#8a8a99", OPTIMIZERS["zeta"]  # whitening
