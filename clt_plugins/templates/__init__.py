"""A working example of each kind of plugin: what `clt_plugins new` writes, and what the author's guide shows.

Each is a package of its own; `new` puts other names for `clt_plugins.templates.<kind>`, `Example` and "example".
"""
