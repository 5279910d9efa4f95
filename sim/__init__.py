"""LIBERO: scenes, what varies in them, who acts, the workers that run episodes, and an episode's
account.
"""
