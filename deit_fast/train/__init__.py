"""The training loop and its parts; import ``deit_fast.train.loop`` for the loop itself."""
