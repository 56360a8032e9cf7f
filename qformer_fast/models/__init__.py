"""The Q-Former and the models around it."""
