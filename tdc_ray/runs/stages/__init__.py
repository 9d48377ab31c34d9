"""The stages of a run: base, expert of a group, fine-tune, times, precision.

``base_trainer`` is Ray Train on the driver, ``base_worker`` what one of its ranks does.
May be used by runs.
"""
