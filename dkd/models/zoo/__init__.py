"""Build models for small images as their papers and public implementations do.

The modules name the taps of the stages. Every model has the tap `pool` besides: the mean over positions that its linear
head reads, or, in Network in Network, which has no such head, the logits.
"""
