"""The checks: a module for each kind of plugin, named by `Slot.kind`, and the modules of `registry.SHARED`."""
