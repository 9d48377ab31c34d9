"""The least-squares refit of the weights that read what was pruned.

Start at ``refit``, which walks the network; ``least_squares`` solves, ``error_weights`` weighs
images.
May be used by pruning.
"""
