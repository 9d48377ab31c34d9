"""What ``experiments/speed.py`` and ``experiments/scaling.py`` measure, section by section."""
