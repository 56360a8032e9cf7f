"""Other people's checkpoints and code."""
