"""Comparisons of policies, of rotations and of speed, and what of the simulator they need."""
