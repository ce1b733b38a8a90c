"""Injections: what `optx.attach` adds to modules, one method per file."""
