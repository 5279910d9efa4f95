"""Network parts that several policies share: frozen features, attention, the volume head and the
history.
"""
