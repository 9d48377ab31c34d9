"""What is shown: terminal, TensorBoard, figures, the report's page.

Computes nothing that a run needs; a run emits events, and sinks here show them.
May be used by cli and experiments.
"""
