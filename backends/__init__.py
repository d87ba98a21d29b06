"""One module a library, each with the same names: `newton_schulz` (fused) and `Zeta` (that library's optimizer)."""
