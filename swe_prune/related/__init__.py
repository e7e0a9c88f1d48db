"""Systems that the seed papers stand beside and that are no pruning criterion, one file each.

ecomls   switching between models of different cost while they serve (arXiv 2404.11411)
"""
