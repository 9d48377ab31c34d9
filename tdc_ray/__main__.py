"""``python -m tdc_ray``: the same as ``tdc-ray``."""

from tdc_ray.cli import main

main()
