"""Systems that the seed papers stand beside and that are no pruning criterion, one file each.

ecomls   switching between models of different cost while they serve (arXiv 2404.11411)
ssprop   back-propagation through a part of the output channels (arXiv 2408.12561)
trawl    stacked weights at low rank, written back (arXiv 2406.17261)
"""
