"""How to choose what is cut: scores, schemes, the memory bank, the rounds."""
