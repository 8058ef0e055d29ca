"""Images as block devices and mounts of this host. Needs root; Linux only.

`targets` finds out what to mount for an image, and is the only one that knows the store; `mounts`
is the API (attach, detach, mount, unmount, reconnect, list, plan) and needs no more than such a
target. Below it `anchors` (EROFS mounts and overlays), `attachments` (one device per image or view,
and how it is let go), `nbd` (the kernel's devices) over `netlink`, `devices` (the server's files,
where there are none), `servers` (the store's nbdkit), `handshake` (what a server says of an
export), `sharing` (what this kernel offers), `state` (the runtime directory) and `kernel` (system
calls, /proc and /sys). Nothing but the command line imports this package.

Truth is what the kernel says. A record in the runtime directory holds only what the kernel cannot
know: which image a device is, which names were asked for. So a reboot, a kill -9 or a plain
umount(8) leaves nothing that the next command would not see and clean up.
"""
