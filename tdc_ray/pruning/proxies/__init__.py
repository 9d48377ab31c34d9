"""What proposes pruning schemes: the offline search, scores, a language model.

Each is given a ``ProposalRequest`` and the memory bank, and returns schemes.
May be used by pruning.search.
"""
