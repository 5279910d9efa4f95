"""Comparisons of policies, of rotations and of speed, and what the simulator has to hold for them."""
