"""A working example of each kind of plugin, one package each: `clt_plugins new` copies it, the author's guide links it.

In the copy, `clt_plugins.templates.<kind>`, `Example` and "example" are replaced by the plugin's own names.
"""
