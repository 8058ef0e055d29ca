"""Remotes for tests and benchmarks: real servers on loopback, and a link in front of them that is
as slow, narrow and unreliable as it is told to be. Never imported by the packages."""
