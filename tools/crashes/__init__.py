"""What a crash leaves behind: commands killed at chosen instants (tools/crash_loop), and power lost
between any two writes of a disk (tools/power_loss), each held against a model of the store.

`corpus` has the images; `program` runs commands, `instants` kills them, `tracing` follows them call
by call; `model` knows what the store must hold, `observed` what it does hold; `plans` decides what
is done to whom, `serving` kills servers, `twins` compares with a store that was never killed,
`supervising` and `rounds` are the loop. Of power loss, `recording` is the nbdkit
plugin, `disk` the file system on it, `states` what a disk may hold after it, `outage` the loop.
"""
