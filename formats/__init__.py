"""Demonstrations as files: LIBERO's HDF5 and folders of real-robot episodes, written, read and
validated.
"""
