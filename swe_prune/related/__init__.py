"""Systems of the seed papers that are not pruning criteria, one file each.

dsmoe      an MLP in blocks that tokens switch on and off (arXiv 2502.12455)
ecomls     switching between models of different cost while they serve (arXiv 2404.11411)
ling       fine-grained experts with a shared one (arXiv 2503.05139); spikes, its loss spikes
reasoning  a reward for short right answers (arXiv 2502.04463)
retrikt    a store of the teacher's for a pruned student; a stand-in for arXiv 2310.15594
ssprop     back-propagation through a part of the output channels (arXiv 2408.12561)
trawl      stacked weights at low rank, written back (arXiv 2406.17261)
"""
