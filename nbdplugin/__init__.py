"""The nbdkit plugin: `dedup` is the script that nbdkit runs, `session` the logic behind it."""
