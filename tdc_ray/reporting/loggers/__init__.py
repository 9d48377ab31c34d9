"""Experiment trackers beside TensorBoard, through their own clients: ``--log-to``."""
