"""The training loop and its parts; import ``deit_fast.training.loop`` for the loop itself."""
