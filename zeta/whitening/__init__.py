"""What whitening does to a run's own matrices: scale, spectrum, evenness. `zeta inspect` shows it."""
