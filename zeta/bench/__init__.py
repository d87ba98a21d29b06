"""What `zeta bench` measures: Newton-Schulz, an optimizer's step, and its share of a training step, on any device."""
