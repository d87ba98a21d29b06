"""The parts of train_lm.py: one language model and one loop, whose arrays are torch's (on_torch) or MLX's (on_mlx)."""
