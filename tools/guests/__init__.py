"""Guests: Debian kernels that this machine lacks, under qemu, driven from here step by step.

`guest.Guest` is the API; below it `cache` (kernels and programs from Debian packages, kept in the
user's cache), `cpio` (archives that the kernel unpacks), `content` (what a guest boots into),
`forward` (unix sockets of this machine, for the guest's network). `agent` and `inside` run in the
guest. Never imported by the packages.

What makes its numbers meaningless, said first:
- time: the processor is emulated. Bytes, pages and requests count; seconds do not;
- /proc/meminfo's Cached holds the guest's own root file system: only growth counts;
- busybox's cat and cp use sendfile, which is not how programs read: measure with `inside`.
"""
