"""Checkpoints, the training loop, checks on held-out demonstrations, and the numbers that are
reported.
"""
