"""``tdc-ray report``: runs and sweeps as one page for a browser, Markdown and CSV."""
