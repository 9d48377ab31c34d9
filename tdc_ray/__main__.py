"""``python -m tdc_ray``: the same as ``tdc-ray``."""

from tdc_ray.cli.main import main

main()
