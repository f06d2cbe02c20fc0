"""The data: how its batches are divided among the workers, and the loaders that read them."""
