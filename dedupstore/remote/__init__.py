"""Images in object stores: docs/remote-format.md.

`layout` is the format as pure functions. `objects` reads and writes objects, with `directory` and
`bucket` behind it. `remote` is one remote: what it has, verified. `pushing` and `collecting` change
it. `configuration` is which remotes a store knows. Nothing here is on the path of a local read.
"""
