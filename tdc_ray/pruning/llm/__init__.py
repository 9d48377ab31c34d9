"""A language model's side of a search: prompt, transport, reply, transcripts, budget.

Knows of units and widths, and no search; what a server says is data that is validated here.
May be used by pruning.proxies; no key leaves ``chat``.
"""
