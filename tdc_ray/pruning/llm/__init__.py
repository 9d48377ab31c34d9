"""A language model's side of a search: prompt, transport, reply, transcripts, budget.

It knows units and widths, and no search; a server's reply is data that is validated here. May be
used by pruning.proxies; no key leaves ``chat``.
"""
