"""Which parameter gets which treatment, and as which matrices: from its name, and from the model's modules."""
