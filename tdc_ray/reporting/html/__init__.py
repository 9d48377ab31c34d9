"""The report: one page for a browser, and its tables as Markdown and CSV.

``run_tables``: tables of one run; ``comparison_tables``: several runs or trials side by side.
``load`` reads runs and sweeps, ``sections`` orders the page, ``write`` writes the files.
May be used by cli and experiments.
"""
