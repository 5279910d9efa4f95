"""Demonstrations as files: LIBERO's HDF5, folders of real-robot episodes and LeRobot's datasets;
written, read and validated.
"""
