"""The soak: clients verify every byte they read while maintenance runs on the same store.

`client` is one verifying reader, `clients` all of them and what they saw, `maintenance` the loops
of commands, `watch` what the store's file and its reader table look like meanwhile, `content` the
images, `__main__` one run and its verdict. Nothing here is imported by the product.
"""
