"""Benchmarks, run by tools/bench. Never imported by the packages.

What makes these numbers meaningless, said first:
- another load on the machine: two cores are enough for one client and one server, not for a third;
- a different amount of memory in the page cache: every cold measurement drops caches first, every
  warm one reads everything once before;
- comparing runs of different days: only ratios within one run count. Competitors run in turn
  (A B A B ...), and ratios are of medians;
- another corpus: what deduplicates and compresses decides about every figure. The corpus is built
  from Debian packages of the day and stays fixed from then on in the cache directory.
"""
